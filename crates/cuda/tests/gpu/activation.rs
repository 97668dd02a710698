//! Activations, gates and their dropout against float64.

use switchyard_cuda::{
    Activation, ActivationGradients, Address, Columns, ExpertNoise, Format, Hidden, HiddenDropout, UsedRows,
    activate, activate_backward, clear_empty_rows,
};

use crate::noise::{STEP, dropout_factor, key, noise, scaled, word, words};
use crate::support::{Buffer, assert_close, assert_rounded, normal, queue};

const ACTIVATIONS: [Activation; 4] =
    [Activation::Relu, Activation::GeluTanh, Activation::Gelu, Activation::Silu];

const RATE: f64 = 0.25;

/// What approximations of exponentials in float32 may be off, in either format.
const TOLERANCE: f64 = 3e-5;

/// Standard normal distribution function, from the series of the error function.
fn normal_cdf(x: f64) -> f64 {
    let z = x.abs() / std::f64::consts::SQRT_2;
    let (mut term, mut sum, mut n) = (z, 0.0, 0.0);
    while term > 1e-18 {
        sum += term;
        n += 1.0;
        term *= 2.0 * z * z / (2.0 * n + 1.0);
    }
    let half_erf = sum * (-z * z).exp() / std::f64::consts::PI.sqrt();
    0.5 + half_erf.copysign(x)
}

fn value(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Relu => x.max(0.0),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh())
        }
        Activation::Gelu => x * normal_cdf(x),
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}

fn derivative(activation: Activation, x: f64) -> f64 {
    if activation == Activation::Relu {
        return f64::from(u8::from(x > 0.0));
    }
    let h = 1e-5;
    (value(activation, x + h) - value(activation, x - h)) / (2.0 * h)
}

/// A layer's hidden values as the tests lay them out.
struct Case {
    rows: usize,
    d_ff: usize,
    format: Format,
    activation: Activation,
    gated: bool,
    /// `x` and `linear` in one matrix.
    packed: bool,
}

impl Case {
    fn hidden(&self, dropout: Option<HiddenDropout>, used: Option<UsedRows>) -> Hidden {
        Hidden {
            rows: self.rows,
            d_ff: self.d_ff,
            format: self.format,
            activation: self.activation,
            stride: self.stride(),
            used,
            dropout,
        }
    }

    fn stride(&self) -> usize {
        if self.packed { 2 * self.d_ff } else { self.d_ff }
    }

    /// `x` and `linear`, NaN where nothing may be read.
    fn inputs(&self, holds: &[bool]) -> [Vec<f64>; 2] {
        [1, 2].map(|seed| {
            let mut values = normal(seed, self.rows * self.d_ff, self.format);
            for (row, &holds) in values.chunks_mut(self.d_ff).zip(holds) {
                if !holds {
                    row.fill(f64::NAN);
                }
            }
            values
        })
    }

    /// Both in the memory that their strides make of them.
    fn laid_out(&self, values: &[Vec<f64>; 2]) -> [Vec<f64>; 2] {
        if !self.packed {
            return values.clone();
        }
        let rows = values[0].chunks(self.d_ff).zip(values[1].chunks(self.d_ff));
        [rows.flat_map(|(x, linear)| [x, linear].concat()).collect(), Vec::new()]
    }

    fn addresses(&self, buffers: &[Buffer; 2]) -> [Address; 2] {
        let second =
            if self.packed { buffers[0].at().plus(self.d_ff * self.format.bytes()) } else { buffers[1].at() };
        [buffers[0].at(), if self.gated { second } else { Address::NONE }]
    }

    /// Runs both passes; `factors` are those of dropout.
    fn check(
        &self,
        dropout: Option<HiddenDropout>,
        factors: Option<&[f32]>,
        used: Option<UsedRows>,
        holds: &[bool],
    ) {
        let Self { rows, d_ff, format, activation, gated, .. } = *self;
        let len = rows * d_ff;
        let what = format!(
            "{activation:?} [{rows}, {d_ff}] {format:?}, gated {gated}, packed {}, dropout {dropout:?}",
            self.packed
        );
        let hidden = self.hidden(dropout, used);
        let inputs @ [x, linear] = &self.inputs(holds);
        let buffers = self.laid_out(inputs).map(|values| Buffer::floats(&values, format));
        let [x_at, linear_at] = self.addresses(&buffers);
        let out = Buffer::poisoned(len, format);
        // SAFETY: all buffers have the values of `hidden`.
        unsafe { activate(queue(), x_at, linear_at, out.at(), hidden) }.expect("sizes that there are");
        let factor = |i: usize| factors.map_or(1.0, |factors| factors[i]);
        let gate = |i: usize| if gated { linear[i] } else { 1.0 };
        let kept = |i: usize, value: f64| if holds[i / d_ff] { value } else { 0.0 };
        let expected: Vec<f64> =
            (0..len).map(|i| kept(i, value(activation, x[i]) * gate(i) * f64::from(factor(i)))).collect();
        let found = out.read_floats(format);
        // What dropout is given has been rounded once.
        let roundings = if dropout.is_some() { 2 } else { 1 };
        assert_rounded(&what, &found, &expected, TOLERANCE, roundings, format);
        for i in 0..len {
            assert!(
                (found[i] == 0.0) == (expected[i] == 0.0) || expected[i].abs() < 1e-5,
                "{what}: zero at {i}"
            );
        }

        let g = normal(3, len, format);
        let gradient = Buffer::floats(&g, format);
        let outs = self.laid_out(&[vec![f64::NAN; len], vec![f64::NAN; len]]);
        let outs = outs.map(|values| Buffer::floats(&values, format));
        let [x_gradient, linear_gradient] = self.addresses(&outs);
        let at = ActivationGradients {
            gradient: gradient.at(),
            x: x_at,
            linear: linear_at,
            x_gradient,
            linear_gradient,
        };
        // SAFETY: as above.
        unsafe { activate_backward(queue(), at, hidden) }.expect("sizes that there are");
        let through = |i: usize| scaled(g[i], factor(i), format);
        let gx = (0..len).map(|i| kept(i, through(i) * gate(i) * derivative(activation, x[i]))).collect();
        let gl = (0..len).map(|i| kept(i, through(i) * value(activation, x[i]))).collect();
        let expected = self.laid_out(&[gx, gl]);
        let parts = if gated && !self.packed { 2 } else { 1 };
        for (found, expected) in outs.iter().zip(&expected).take(parts) {
            let (mut found, mut expected) = (found.read_floats(format), expected.clone());
            if self.packed && !gated {
                // The second half of a row belongs to nobody.
                for values in [&mut found, &mut expected] {
                    *values = values.chunks(2 * d_ff).flat_map(|row| &row[..d_ff]).copied().collect();
                }
            }
            assert_close(&format!("{what}, backward"), &found, &expected, TOLERANCE, format);
        }
    }
}

impl Case {
    /// Every result that may be written where an input is, against the same result in memory of its own.
    fn check_in_place(&self, hidden: Hidden) {
        let Self { rows, d_ff, format, gated, packed, .. } = *self;
        let len = rows * d_ff;
        let what = format!("{hidden:?}, gated {gated}");
        let inputs = self.laid_out(&self.inputs(&vec![true; rows]));
        let fresh = || inputs.clone().map(|values| Buffer::floats(&values, format));
        let gradient = || Buffer::floats(&normal(3, len, format), format);
        let inputs_used = if gated && !packed { 2 } else { 1 };

        let (buffers, out) = (fresh(), Buffer::poisoned(len, format));
        let [x, linear] = self.addresses(&buffers);
        // SAFETY: all buffers have the values of `hidden`, here and below.
        unsafe { activate(queue(), x, linear, out.at(), hidden) }.expect("sizes that there are");
        let expected = out.read_floats(format);
        for place in 0..if packed { 0 } else { inputs_used } {
            let buffers = fresh();
            let [x, linear] = self.addresses(&buffers);
            // SAFETY: as above.
            unsafe { activate(queue(), x, linear, buffers[place].at(), hidden) }.expect("as before");
            assert_eq!(buffers[place].read_floats(format), expected, "{what}, in place of input {place}");
        }

        // What stands beside `x` in a packed layer without a gate stays as it is, so it begins equal.
        let (buffers, outs, g) = (fresh(), fresh(), gradient());
        let [x, linear] = self.addresses(&buffers);
        let [x_gradient, linear_gradient] = self.addresses(&outs);
        let at = ActivationGradients { gradient: g.at(), x, linear, x_gradient, linear_gradient };
        // SAFETY: as above.
        unsafe { activate_backward(queue(), at, hidden) }.expect("as before");
        let expected = outs.map(|out| out.read_floats(format));
        let at = ActivationGradients { x_gradient: x, linear_gradient: linear, ..at };
        // SAFETY: as above.
        unsafe { activate_backward(queue(), at, hidden) }.expect("as before");
        let found = buffers.map(|buffer| buffer.read_floats(format));
        for place in 0..inputs_used {
            assert_eq!(found[place], expected[place], "{what}, gradient in place of input {place}");
        }
        if !packed {
            let (buffers, outs, g) = (fresh(), fresh(), gradient());
            let [x, linear] = self.addresses(&buffers);
            let linear_gradient = if gated { outs[1].at() } else { Address::NONE };
            let at = ActivationGradients { gradient: g.at(), x, linear, x_gradient: g.at(), linear_gradient };
            // SAFETY: as above.
            unsafe { activate_backward(queue(), at, hidden) }.expect("as before");
            assert_eq!(g.read_floats(format), expected[0], "{what}, in place of the gradient");
        }
    }
}

fn cases() -> impl Iterator<Item = Case> {
    let shapes = [(1, 8), (7, 264), (13, 1024), (5, 3080)];
    ACTIVATIONS.into_iter().flat_map(move |activation| {
        [Format::F32, Format::Bf16].into_iter().flat_map(move |format| {
            [(false, false), (true, false), (true, true), (false, true)].into_iter().flat_map(
                move |(gated, packed)| {
                    shapes.map(|(rows, d_ff)| Case { rows, d_ff, format, activation, gated, packed })
                },
            )
        })
    })
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn dense_layers_forward_and_backward() {
    let step = Buffer::of(&[STEP]);
    for case in cases() {
        let holds = vec![true; case.rows];
        case.check(None, None, None, &holds);
        let columns = (case.rows == 7).then_some(Columns { first: 3, total: 1001 });
        let noise = noise(&step, columns);
        let factors: Vec<f32> =
            words(&noise, case.rows, case.d_ff).into_iter().map(|word| dropout_factor(word, RATE)).collect();
        case.check(Some(HiddenDropout::Tokens(RATE, noise)), Some(&factors), None, &holds);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn experts_draw_by_token_and_leave_empty_slots_zero() {
    const SLOTS: usize = 6;
    const FIRST_EXPERT: u32 = 5;
    let step = Buffer::of(&[STEP]);
    let counts = [3, 0, 2, 1, 0, 0];
    let places: Vec<[u32; 2]> = (0..18_u32).map(|slot| [slot * 7 % 5, slot * 11 % 13]).collect();
    let (counts_at, places_at) = (Buffer::of(&counts), Buffer::of(places.as_flattened()));
    let used = UsedRows { counts: counts_at.at(), segment_rows: 3 };
    let holds: Vec<bool> = (0..18).map(|row| row % 3 < counts[row / 3] as usize).collect();
    for columns in [None, Some(Columns { first: 40, total: 100 }), Some(Columns { first: 1, total: 41 })] {
        let noise = ExpertNoise {
            key: key(&step),
            places: places_at.at(),
            slots: SLOTS,
            first_expert: FIRST_EXPERT,
            columns,
        };
        for case in cases().filter(|case| case.rows == 1) {
            let case = Case { rows: 18, d_ff: 40, ..case };
            let Columns { first, total } = columns.unwrap_or(Columns { first: 0, total: 40 });
            let factor = |row: usize, column: usize| {
                let [batch_row, token] = places[row];
                let plane = FIRST_EXPERT + (row / SLOTS) as u32;
                dropout_factor(word(token as usize * total + first + column, batch_row, plane), RATE)
            };
            let factors: Vec<f32> = (0..18)
                .flat_map(|row| (0..40).map(move |column| (row, column)))
                .map(|(r, c)| factor(r, c))
                .collect();
            case.check(Some(HiddenDropout::Experts(RATE, noise)), Some(&factors), Some(used), &holds);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn results_may_take_the_place_of_inputs() {
    let step = Buffer::of(&[STEP]);
    for case in cases().filter(|case| case.rows == 7) {
        for dropout in [None, Some(HiddenDropout::Tokens(RATE, noise(&step, None)))] {
            case.check_in_place(case.hidden(dropout, None));
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn only_empty_rows_are_cleared() {
    let counts = [3, 0, 2, 1, 0, 5];
    let counts_at = Buffer::of(&counts);
    for format in [Format::F32, Format::Bf16] {
        let case =
            Case { rows: 30, d_ff: 1032, format, activation: Activation::Relu, gated: false, packed: false };
        let before = normal(1, case.rows * case.d_ff, format);
        let values = Buffer::floats(&before, format);
        // SAFETY: the buffer has the values of `hidden`.
        let clear = |used| unsafe { clear_empty_rows(queue(), values.at(), case.hidden(None, used)) };
        clear(None).unwrap();
        assert_eq!(values.read_floats(format), before);
        clear(Some(UsedRows { counts: counts_at.at(), segment_rows: 5 })).unwrap();
        let after = values.read_floats(format);
        for (row, (after, before)) in after.chunks(case.d_ff).zip(before.chunks(case.d_ff)).enumerate() {
            let holds = row % 5 < counts[row / 5] as usize;
            assert!(after.iter().zip(before).all(|(a, b)| *a == if holds { *b } else { 0.0 }), "row {row}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_dropout_has_left_of_a_relu_is_its_mask() {
    let step = Buffer::of(&[STEP]);
    for format in [Format::F32, Format::Bf16] {
        let case =
            Case { rows: 13, d_ff: 776, format, activation: Activation::Relu, gated: false, packed: false };
        let len = case.rows * case.d_ff;
        let drawn = case.hidden(Some(HiddenDropout::Tokens(RATE, noise(&step, None))), None);
        let done = case.hidden(Some(HiddenDropout::Done(RATE)), None);
        let (x, g) = (
            Buffer::floats(&normal(1, len, format), format),
            Buffer::floats(&normal(2, len, format), format),
        );
        let [left, by_noise, by_mask] = [(); 3].map(|()| Buffer::poisoned(len, format));
        let at = ActivationGradients {
            gradient: g.at(),
            x: x.at(),
            linear: Address::NONE,
            x_gradient: by_noise.at(),
            linear_gradient: Address::NONE,
        };
        // SAFETY: all buffers have `len` values.
        unsafe {
            activate(queue(), x.at(), Address::NONE, left.at(), drawn).unwrap();
            activate_backward(queue(), at, drawn).unwrap();
            let at = ActivationGradients { x: left.at(), x_gradient: by_mask.at(), ..at };
            activate_backward(queue(), at, done).unwrap();
        }
        assert_eq!(by_mask.read_floats(format), by_noise.read_floats(format));
        // SAFETY: nothing is started.
        assert!(unsafe { activate(queue(), x.at(), Address::NONE, left.at(), done) }.is_err());
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn no_activation_hides_a_nan() {
    for activation in ACTIVATIONS {
        let case = Case { rows: 1, d_ff: 8, format: Format::F32, activation, gated: false, packed: false };
        let (x, out) = (Buffer::floats(&[f64::NAN; 8], Format::F32), Buffer::floats(&[0.0; 8], Format::F32));
        // SAFETY: both buffers have 8 values.
        unsafe { activate(queue(), x.at(), Address::NONE, out.at(), case.hidden(None, None)) }.unwrap();
        assert!(out.read_floats(Format::F32).iter().all(|value| value.is_nan()), "{activation:?}");
    }
}
