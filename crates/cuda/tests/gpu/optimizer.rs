//! Updates against float64 forms of crates/kernels/src/optimizer, over several steps.

use half::bf16;
use switchyard_cuda::{
    Address, Format, UpdateControl, UpdateMemory, UpdatePlan, UpdateRules, UpdatedTensor, gradient_squares,
    parameter_squares, prepare_update, update,
};

use crate::support::{Buffer, assert_close, normal, queue};

const ADAFACTOR: UpdateRules = UpdateRules::Adafactor {
    decay_exponent: 0.8,
    eps: 1e-30,
    update_clip: 1.0,
    weight_decay: 0.01,
    parameter_scale: Some(1e-3),
};

const ADAMW: UpdateRules =
    UpdateRules::Adamw { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, parameter_scale: None };

/// A tensor in float64 and on the device.
struct Tensor {
    shape: Vec<usize>,
    format: Format,
    p: Vec<f64>,
    moments: [Vec<f64>; 2],
    values: Buffer,
    rest: Option<Buffer>,
    gradient: Buffer,
    on_device: [Buffer; 2],
}

/// A value that a bfloat16 and a rest can keep, next to `value`.
fn kept(value: f32) -> f32 {
    let halfway = value.to_bits() & 0x1_ffff == 0x8000;
    f32::from_bits(value.to_bits() - u32::from(halfway))
}

/// A float32 in a bfloat16 and a rest.
fn split(value: f32) -> (u16, i16) {
    let upper = bf16::from_f32(value).to_bits();
    let rest = value.to_bits().wrapping_sub(u32::from(upper) << 16).cast_signed();
    (upper, rest.try_into().expect("no value lies halfway above an even one"))
}

impl Tensor {
    /// With gradients of `format`, and values in bfloat16 and a rest if `narrow`.
    fn new(seed: usize, shape: &[usize], format: Format, narrow: bool, rules: &UpdateRules) -> Self {
        let len: usize = shape.iter().product();
        let spread = [0.05, 1.0, 1e-4][seed % 3];
        let p: Vec<f64> = normal(seed as u64, len, Format::F32)
            .iter()
            .map(|p| f64::from(kept((p * spread) as f32)))
            .collect();
        let moments = match (rules, shape) {
            (UpdateRules::Adafactor { .. }, [.., rows, cols]) => {
                [vec![0.0; len / cols.max(&1)], vec![0.0; len / rows.max(&1)]]
            }
            (UpdateRules::Adafactor { .. }, _) => [vec![0.0; len], vec![]],
            (UpdateRules::Adamw { .. }, _) => [vec![0.0; len], vec![0.0; len]],
        };
        let (values, rest) = if narrow {
            let (upper, rest): (Vec<u16>, Vec<i16>) = p.iter().map(|&p| split(p as f32)).unzip();
            (Buffer::of(&upper), Some(Buffer::of(&rest)))
        } else {
            (Buffer::floats(&p, Format::F32), None)
        };
        let on_device = [&moments[0], &moments[1]].map(|moment| Buffer::floats(moment, Format::F32));
        Self {
            shape: shape.to_vec(),
            format,
            values,
            rest,
            gradient: Buffer::floats(&vec![0.0; len], format),
            p,
            moments,
            on_device,
        }
    }

    /// Neighbours are updated in different parts.
    fn all_updated(tensors: &[Self]) -> Vec<UpdatedTensor> {
        tensors.iter().enumerate().map(|(number, tensor)| tensor.updated(number % 3)).collect()
    }

    fn updated(&self, part: usize) -> UpdatedTensor {
        UpdatedTensor {
            shape: self.shape.clone(),
            values: self.values.at(),
            rest: self.rest.as_ref().map_or(Address::NONE, Buffer::at),
            gradient: self.gradient.at(),
            gradient_format: self.format,
            moments: [self.on_device[0].at(), self.on_device[1].at()],
            part,
        }
    }

    /// The float32 values.
    fn read(&self) -> Vec<f32> {
        let Some(rest) = &self.rest else { return self.values.read() };
        let join = |(upper, rest): (u16, i16)| {
            f32::from_bits((u32::from(upper) << 16).wrapping_add_signed(i32::from(rest)))
        };
        self.values.read().into_iter().zip(rest.read()).map(join).collect()
    }

    /// Values of a matrix that is updated alone, one at least.
    fn matrix_len(&self) -> usize {
        self.shape[self.shape.len().saturating_sub(2)..].iter().product::<usize>().max(1)
    }

    fn step(&mut self, gradient: &[f64], rules: &UpdateRules, rate: f64, scale: f64, number: u64) {
        let len = self.matrix_len();
        for (i, (p, g)) in self.p.chunks_mut(len).zip(gradient.chunks(len)).enumerate() {
            let g: Vec<f64> = g.iter().map(|g| g * scale).collect();
            let [first, second] = &mut self.moments;
            match *rules {
                UpdateRules::Adafactor { decay_exponent, eps, .. } => {
                    let decay = 1.0 - (number as f64).powf(-decay_exponent);
                    let moved = if let [.., rows, cols] = self.shape[..] {
                        factored(
                            &g,
                            &mut first[i * rows..][..rows],
                            &mut second[i * cols..][..cols],
                            decay,
                            eps,
                        )
                    } else {
                        whole(&g, first, decay, eps)
                    };
                    adafactor(p, &moved, rules, rate);
                }
                UpdateRules::Adamw { .. } => {
                    adamw(
                        p,
                        &g,
                        &mut first[i * len..][..len],
                        &mut second[i * len..][..len],
                        rules,
                        rate,
                        number,
                    );
                }
            }
        }
    }
}

fn root_mean(x: &[f64]) -> f64 {
    (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64).sqrt()
}

fn factored(g: &[f64], row: &mut [f64], col: &mut [f64], decay: f64, eps: f64) -> Vec<f64> {
    let (rows, cols) = (row.len(), col.len());
    let square = |i: usize, j: usize| g[i * cols + j] * g[i * cols + j] + eps;
    for (i, row) in row.iter_mut().enumerate() {
        *row = decay * *row + (1.0 - decay) * (0..cols).map(|j| square(i, j)).sum::<f64>() / cols as f64;
    }
    for (j, col) in col.iter_mut().enumerate() {
        *col = decay * *col + (1.0 - decay) * (0..rows).map(|i| square(i, j)).sum::<f64>() / rows as f64;
    }
    let mean = row.iter().sum::<f64>() / rows as f64;
    (0..g.len()).map(|at| g[at] / (row[at / cols] / mean).sqrt() / col[at % cols].sqrt()).collect()
}

fn whole(g: &[f64], v: &mut [f64], decay: f64, eps: f64) -> Vec<f64> {
    v.iter_mut().zip(g).for_each(|(v, g)| *v = decay * *v + (1.0 - decay) * (g * g + eps));
    g.iter().zip(v).map(|(g, v)| g / v.sqrt()).collect()
}

fn adafactor(p: &mut [f64], moved: &[f64], rules: &UpdateRules, rate: f64) {
    let &UpdateRules::Adafactor { update_clip, weight_decay, parameter_scale, .. } = rules else { return };
    let rate = rate * parameter_scale.map_or(1.0, |floor| root_mean(p).max(floor));
    let clip = (root_mean(moved) / update_clip).max(1.0);
    p.iter_mut().zip(moved).for_each(|(p, u)| *p = *p * (1.0 - rate * weight_decay) - rate / clip * u);
}

fn adamw(
    p: &mut [f64],
    g: &[f64],
    m: &mut [f64],
    v: &mut [f64],
    rules: &UpdateRules,
    rate: f64,
    number: u64,
) {
    let &UpdateRules::Adamw { beta1, beta2, eps, weight_decay, parameter_scale } = rules else { return };
    let scale = parameter_scale.map_or(1.0, |floor| root_mean(p).max(floor));
    let corrections = [beta1, beta2].map(|beta| 1.0 - beta.powf(number as f64));
    // Moments decay by what float32 holds of the factors.
    let [beta1, beta2] = [beta1, beta2].map(|beta| f64::from(beta as f32));
    for i in 0..p.len() {
        m[i] = beta1 * m[i] + (1.0 - beta1) * g[i];
        v[i] = beta2 * v[i] + (1.0 - beta2) * g[i] * g[i];
        let moved = m[i] / corrections[0] / ((v[i] / corrections[1]).sqrt() + eps);
        p[i] = p[i] * (1.0 - rate * weight_decay) - rate * scale * moved;
    }
}

/// Stacks with rows of whole tiles and parts, widths that are no 16 bytes, vectors, scalars, and nothing.
const SHAPES: [&[usize]; 15] = [
    &[3, 256, 512],
    &[768],
    &[300, 264],
    &[32, 12],
    &[2, 33, 31],
    &[],
    &[0, 4],
    &[1, 1],
    &[520, 8],
    &[5, 64, 256],
    &[1000, 300],
    &[10001],
    &[7, 3, 5],
    &[1, 2000],
    &[2000, 1],
];

struct Run {
    rules: UpdateRules,
    tensors: Vec<Tensor>,
    plan: UpdatePlan,
    table: Buffer,
    workspace: Buffer,
    control: Buffer,
    max_norm: f64,
}

impl Run {
    fn new(rules: UpdateRules, max_norm: f64) -> Self {
        let tensors: Vec<Tensor> = (SHAPES.iter().enumerate())
            .flat_map(|(i, shape)| {
                let kinds = [(Format::F32, false), (Format::Bf16, true), (Format::F32, true)];
                kinds.map(|(format, narrow)| Tensor::new(i, shape, format, narrow, &rules))
            })
            .collect();
        let updated = Tensor::all_updated(&tensors);
        let (plan, table) = UpdatePlan::new(rules, &updated).expect("sizes that there are");
        let run = Self {
            rules,
            workspace: Buffer::of(&vec![0_u8; plan.workspace()]),
            plan,
            tensors,
            table: Buffer::of(&table),
            control: Buffer::of(&UpdateControl::default().to_words()),
            max_norm,
        };
        // SAFETY: the buffers are those of the plan.
        unsafe { parameter_squares(queue(), &run.plan, run.memory()) }.expect("launched");
        run
    }

    fn memory(&self) -> UpdateMemory {
        UpdateMemory { table: self.table.at(), workspace: self.workspace.at(), control: self.control.at() }
    }

    fn control(&self) -> UpdateControl {
        UpdateControl::from_words(self.control.read().try_into().expect("eight words"))
    }

    /// Gradients of one step; the second tensor of a stack has none, as an expert without tokens.
    fn gradients(&self, step: u64) -> Vec<Vec<f64>> {
        let of = |(i, tensor): (usize, &Tensor)| {
            let spread = [1e-3, 1.0, 1e-6][(i + step as usize) % 3];
            let len = tensor.matrix_len();
            let values = normal(100 * step + i as u64, tensor.p.len(), Format::F32);
            let value = |(at, g): (usize, f64)| {
                let idle = tensor.shape.len() == 3 && at / len == 1;
                let g = if idle { 0.0 } else { g * spread * (1.0 + (at % 7) as f64) };
                crate::support::held(g, tensor.format)
            };
            values.into_iter().enumerate().map(value).collect()
        };
        self.tensors.iter().enumerate().map(of).collect()
    }

    fn launch(&mut self, gradients: &[Vec<f64>], rate: f64, loss: f32) {
        for (tensor, gradient) in self.tensors.iter_mut().zip(gradients) {
            tensor.gradient = Buffer::floats(gradient, tensor.format);
        }
        let updated = Tensor::all_updated(&self.tensors);
        let (_, expected) = UpdatePlan::new(self.rules, &updated).expect("sizes that there are");
        let mut table: Vec<u32> = self.table.read();
        let words = self.plan.described_words();
        for (i, tensor) in updated.iter().enumerate() {
            self.plan.point_gradient(&mut table[..words], i, tensor.gradient);
        }
        assert!(table == expected, "a plan follows from shapes and addresses alone");
        self.table = Buffer::of(&table);
        let control = UpdateControl { learning_rate: rate, ..self.control() };
        self.control = Buffer::of(&control.to_words());
        let loss = Buffer::of(&[loss]);
        // SAFETY: the buffers are those of the plan.
        unsafe {
            gradient_squares(queue(), &self.plan, self.memory()).expect("launched");
            prepare_update(queue(), &self.plan, self.memory(), self.max_norm, loss.at()).expect("launched");
            update(queue(), &self.plan, self.memory()).expect("launched");
        }
        let _ = loss.read::<f32>();
    }

    fn step(&mut self, step: u64, rate: f64) {
        let gradients = self.gradients(step);
        let norm = gradients.iter().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let scale = if self.max_norm > 0.0 { (self.max_norm / norm).min(1.0) } else { 1.0 };
        self.launch(&gradients, rate, 1.0);
        let control = self.control();
        assert!((control.norm / norm - 1.0).abs() < 1e-6, "norm {} for {norm}", control.norm);
        assert!((f64::from(control.gradient_scale) / scale - 1.0).abs() < 1e-6, "{control:?}");
        assert_eq!((control.updates, control.applied, control.left_out), (step, 1, 0));
        for (tensor, gradient) in self.tensors.iter_mut().zip(&gradients) {
            tensor.step(gradient, &self.rules, rate, scale, step);
        }
        self.compare(&format!("step {step}"));
    }

    fn compare(&self, when: &str) {
        for tensor in &self.tensors {
            let what = format!("{:?} {:?} {:?} {when}", self.rules, tensor.shape, tensor.format);
            let values: Vec<f64> = tensor.read().into_iter().map(f64::from).collect();
            let len = tensor.matrix_len();
            for (found, expected) in values.chunks(len).zip(tensor.p.chunks(len)) {
                assert_close(&what, found, expected, 1e-5, Format::F32);
            }
            for (moment, (found, expected)) in tensor.on_device.iter().zip(&tensor.moments).enumerate() {
                let found = found.read_floats(Format::F32);
                let part = (expected.len() * len / tensor.p.len().max(1)).max(1);
                for (found, expected) in found.chunks(part).zip(expected.chunks(part)) {
                    assert_close(&format!("{what}: moment {moment}"), found, expected, 1e-5, Format::F32);
                }
            }
            if tensor.rest.is_some() {
                let rounded: Vec<f64> = values.iter().map(|&p| bf16::from_f32(p as f32).to_f64()).collect();
                assert!(tensor.values.read_floats(Format::Bf16) == rounded, "{what}: not the rounded values");
            }
        }
    }

    fn bits(&self) -> Vec<Vec<u32>> {
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect();
        let of = |t: &Tensor| [bits(t.read()), t.on_device[0].read(), t.on_device[1].read()];
        self.tensors.iter().flat_map(of).collect()
    }
}

fn variants() -> Vec<(UpdateRules, f64)> {
    vec![
        (ADAFACTOR, 1.0),
        (
            UpdateRules::Adafactor {
                decay_exponent: 0.8,
                eps: 1e-12,
                update_clip: 0.5,
                weight_decay: 0.0,
                parameter_scale: None,
            },
            0.0,
        ),
        (ADAMW, 1.0),
        (
            UpdateRules::Adamw {
                beta1: 0.5,
                beta2: 0.999,
                eps: 1e-6,
                weight_decay: 0.0,
                parameter_scale: Some(1e-3),
            },
            0.0,
        ),
    ]
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn three_steps_are_those_of_the_cpu() {
    for (rules, max_norm) in variants() {
        let mut run = Run::new(rules, max_norm);
        for (step, rate) in [(1, 1e-2), (2, 5e-3), (3, 2e-2)] {
            run.step(step, rate);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_is_not_finite_changes_nothing() {
    for (rules, max_norm) in variants() {
        let mut run = Run::new(rules, max_norm);
        run.step(1, 1e-2);
        let before = run.bits();
        let gradients = run.gradients(2);
        for (value, loss) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (0.0, f32::NAN), (0.0, f32::INFINITY)] {
            let mut broken = gradients.clone();
            *broken[4].last_mut().unwrap() = value;
            // What follows waits for the host to take note.
            for (left_out, gradients) in [(1, &broken), (2, &gradients)] {
                run.launch(gradients, 1e-2, if left_out == 1 { loss } else { 1.0 });
                let control = run.control();
                let found = (control.applied, control.updates, control.left_out);
                assert_eq!(found, (0, 1, left_out), "{value}, loss {loss}");
                assert!(run.bits() == before, "{value}, loss {loss}");
            }
            let control = UpdateControl { left_out: 0, ..run.control() };
            run.control = Buffer::of(&control.to_words());
        }
        // What was left out is no step.
        run.step(2, 1e-2);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_matrix_larger_than_what_is_sized_ahead_and_many_small_ones() {
    let shapes: [&[usize]; 4] = [&[9000, 512], &[400, 32, 32], &[3000, 768], &[768, 3072]];
    let mut tensors: Vec<Tensor> = (shapes.iter().enumerate())
        .map(|(i, shape)| Tensor::new(i, shape, Format::Bf16, true, &ADAFACTOR))
        .collect();
    let gradients: Vec<Vec<f64>> =
        tensors.iter().enumerate().map(|(i, t)| normal(50 + i as u64, t.p.len(), Format::Bf16)).collect();
    for (tensor, gradient) in tensors.iter_mut().zip(&gradients) {
        tensor.gradient = Buffer::floats(gradient, Format::Bf16);
    }
    let updated = Tensor::all_updated(&tensors);
    let (plan, table) = UpdatePlan::new(ADAFACTOR, &updated).unwrap();
    let control = UpdateControl { learning_rate: 1e-2, ..UpdateControl::default() };
    let mut run = Run {
        rules: ADAFACTOR,
        workspace: Buffer::of(&vec![0_u8; plan.workspace()]),
        plan,
        tensors,
        table: Buffer::of(&table),
        control: Buffer::of(&control.to_words()),
        max_norm: 0.0,
    };
    // SAFETY: the buffers are those of the plan.
    unsafe {
        parameter_squares(queue(), &run.plan, run.memory()).unwrap();
        gradient_squares(queue(), &run.plan, run.memory()).unwrap();
        prepare_update(queue(), &run.plan, run.memory(), 0.0, Address::NONE).unwrap();
        update(queue(), &run.plan, run.memory()).unwrap();
    }
    for (tensor, gradient) in run.tensors.iter_mut().zip(&gradients) {
        tensor.step(gradient, &ADAFACTOR, 1e-2, 1.0, 1);
    }
    run.compare("step 1");
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn nothing_to_update_is_no_error() {
    let (plan, table) = UpdatePlan::new(ADAFACTOR, &[]).unwrap();
    let table = Buffer::of(&table);
    let workspace = Buffer::of(&vec![0_u8; plan.workspace()]);
    let control = Buffer::of(&UpdateControl::default().to_words());
    let memory = UpdateMemory { table: table.at(), workspace: workspace.at(), control: control.at() };
    // SAFETY: the buffers are those of the plan.
    unsafe {
        parameter_squares(queue(), &plan, memory).unwrap();
        gradient_squares(queue(), &plan, memory).unwrap();
        prepare_update(queue(), &plan, memory, 1.0, Address::NONE).unwrap();
        update(queue(), &plan, memory).unwrap();
    }
    let control = UpdateControl::from_words(control.read().try_into().unwrap());
    assert_eq!((control.norm, control.gradient_scale, control.applied), (0.0, 1.0, 1));
}
