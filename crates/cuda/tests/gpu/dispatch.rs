//! Dispatch and combine against plain loops in float64.

use switchyard_cuda::{
    Address, CombineGradients, Format, Slots, combine, combine_backward, dispatch, dispatch_backward,
};

use crate::support::{Buffer, assert_close, normal, queue};

const FORMATS: [Format; 2] = [Format::F32, Format::Bf16];

/// Tokens, slots, choices and width: rows of one access, of several rounds, and with lanes that have none.
const SIZES: [(usize, usize, usize, usize); 9] = [
    (1, 1, 1, 8),
    (1, 3, 2, 16),
    (100, 120, 1, 768),
    (77, 200, 2, 768),
    (33, 20, 1, 264),
    (50, 90, 2, 1024),
    (40, 64, 1, 2056),
    (9, 30, 2, 4096),
    (1001, 1250, 1, 64),
];

fn tolerance(format: Format) -> f64 {
    if format == Format::F32 { 1e-6 } else { 1e-4 }
}

/// Every third token without a slot, the others in slots that do not follow their order.
struct Case {
    token_of_slot: Vec<i32>,
    slot_of_token: Vec<i32>,
    on_device: [Buffer; 2],
    slots: Slots,
}

impl Case {
    fn new((tokens, slots, choices, d_model): (usize, usize, usize, usize), format: Format) -> Self {
        let mut token_of_slot = vec![-1; slots];
        let mut slot_of_token = vec![-1; tokens * choices];
        let step =
            (1..).map(|i| slots * 2 / 3 + i).find(|&step| gcd(step, slots) == 1).expect("there is one");
        for (i, held) in slot_of_token.iter_mut().enumerate().take(slots) {
            let slot = i * step % slots;
            if (i + i / 3) % 3 != 2 {
                (*held, token_of_slot[slot]) = (slot as i32, (i / choices) as i32);
            }
        }
        let on_device = [Buffer::of(&token_of_slot), Buffer::of(&slot_of_token)];
        let [of_slot, of_token] = [on_device[0].at(), on_device[1].at()];
        let slots = Slots {
            tokens,
            choices,
            slots,
            d_model,
            format,
            token_of_slot: of_slot,
            slot_of_token: of_token,
        };
        Self { token_of_slot, slot_of_token, on_device, slots }
    }

    fn gathered(&self, rows: &[f64], gates: Option<&[f64]>, onto: Option<&[f64]>) -> Vec<f64> {
        let Slots { tokens, choices, d_model, .. } = self.slots;
        let mut out = onto.map_or_else(|| vec![0.0; tokens * d_model], <[f64]>::to_vec);
        for (i, &slot) in self.slot_of_token.iter().enumerate() {
            let Ok(slot) = usize::try_from(slot) else { continue };
            for j in 0..d_model {
                out[i / choices * d_model + j] += gates.map_or(1.0, |g| g[slot]) * rows[slot * d_model + j];
            }
        }
        out
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn cases() -> impl Iterator<Item = Case> {
    FORMATS.into_iter().flat_map(|format| SIZES.into_iter().map(move |size| Case::new(size, format)))
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tokens_are_copied_into_their_slots() {
    for case in cases() {
        let Slots { tokens, slots, d_model, format, .. } = case.slots;
        let x = normal(1, tokens * d_model, format);
        let (at, out) = (Buffer::floats(&x, format), Buffer::poisoned(slots * d_model, format));
        // SAFETY: all buffers have the values of `slots`.
        unsafe { dispatch(queue(), at.at(), out.at(), case.slots) }.unwrap();
        let row = |&token: &i32| match usize::try_from(token) {
            Ok(token) => x[token * d_model..][..d_model].to_vec(),
            Err(_) => vec![0.0; d_model],
        };
        let expected: Vec<f64> = case.token_of_slot.iter().flat_map(row).collect();
        assert_eq!(out.read_floats(format), expected, "{:?}", case.slots);
        drop(case.on_device);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_come_back_to_their_tokens() {
    for case in cases() {
        let Slots { tokens, slots, d_model, format, .. } = case.slots;
        let what = format!("{:?}", case.slots);
        let (rows, onto) = (normal(2, slots * d_model, format), normal(3, tokens * d_model, format));
        let gates = normal(4, slots, Format::F32);
        let (at, beside) = (Buffer::floats(&rows, format), Buffer::floats(&onto, format));
        let weights = Buffer::floats(&gates, Format::F32);
        let close = |out: &Buffer, expected: Vec<f64>| {
            assert_close(&what, &out.read_floats(format), &expected, tolerance(format), format);
        };
        let out = || Buffer::poisoned(tokens * d_model, format);
        let (alone, combined, without) = (out(), out(), out());
        // SAFETY: all buffers have the values of `slots`.
        unsafe {
            dispatch_backward(queue(), at.at(), alone.at(), case.slots).unwrap();
            combine(queue(), at.at(), weights.at(), beside.at(), combined.at(), case.slots).unwrap();
            combine(queue(), at.at(), weights.at(), Address::NONE, without.at(), case.slots).unwrap();
        }
        close(&alone, case.gathered(&rows, None, None));
        close(&combined, case.gathered(&rows, Some(&gates), Some(&onto)));
        close(&without, case.gathered(&rows, Some(&gates), None));
        // SAFETY: as above; what is added to may be written.
        unsafe { combine(queue(), at.at(), weights.at(), beside.at(), beside.at(), case.slots) }.unwrap();
        assert_eq!(beside.read_floats(format), combined.read_floats(format), "in place, {what}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gradients_of_outputs_and_gates() {
    for case in cases() {
        let Slots { tokens, slots, d_model, format, .. } = case.slots;
        let what = format!("{:?}", case.slots);
        let (g, outputs) = (normal(5, tokens * d_model, format), normal(6, slots * d_model, format));
        let gates = normal(7, slots, Format::F32);
        let (at, held) = (Buffer::floats(&g, format), Buffer::floats(&outputs, format));
        let weights = Buffer::floats(&gates, Format::F32);
        let of_outputs = Buffer::poisoned(slots * d_model, format);
        let of_gates = Buffer::poisoned(slots, Format::F32);
        let mut places = CombineGradients {
            gradient: at.at(),
            expert_outputs: held.at(),
            gates: weights.at(),
            expert_outputs_gradient: of_outputs.at(),
            gates_gradient: of_gates.at(),
        };
        // SAFETY: all buffers have the values of `slots`.
        unsafe { combine_backward(queue(), places, case.slots) }.unwrap();
        let mut expected = vec![0.0; slots * d_model];
        let mut products = vec![0.0; slots];
        for (slot, &token) in case.token_of_slot.iter().enumerate() {
            let Ok(token) = usize::try_from(token) else { continue };
            for j in 0..d_model {
                expected[slot * d_model + j] = gates[slot] * g[token * d_model + j];
                products[slot] += g[token * d_model + j] * outputs[slot * d_model + j];
            }
        }
        assert_close(&what, &of_outputs.read_floats(format), &expected, tolerance(format), format);
        assert_close(&what, &of_gates.read_floats(Format::F32), &products, 1e-5, Format::F32);
        places.expert_outputs_gradient = held.at();
        // SAFETY: as above; the outputs may be written.
        unsafe { combine_backward(queue(), places, case.slots) }.unwrap();
        assert_eq!(held.read_floats(format), of_outputs.read_floats(format), "in place, {what}");
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn no_tokens_and_no_slots_are_none() {
    let none = Case::new((3, 5, 1, 8), Format::F32);
    let (rows, out) = (Buffer::poisoned(40, Format::F32), Buffer::poisoned(40, Format::F32));
    let empty = Slots { tokens: 0, slots: 0, ..none.slots };
    // SAFETY: nothing is read or written.
    unsafe {
        dispatch(queue(), rows.at(), out.at(), empty).unwrap();
        dispatch_backward(queue(), rows.at(), out.at(), empty).unwrap();
    }
    assert!(out.read_floats(Format::F32).iter().all(|value| value.is_nan()));
    let odd = Slots { d_model: 6, ..none.slots };
    // SAFETY: nothing is launched.
    assert!(unsafe { dispatch(queue(), rows.at(), out.at(), odd) }.is_err());
}
