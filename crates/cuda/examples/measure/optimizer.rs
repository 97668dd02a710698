//! One update of all parameters of T5-Base and Switch-Base.

use switchyard_cuda::{
    Address, Format, Queue, Slots, UpdateControl, UpdateMemory, UpdatePlan, UpdateRules, UpdatedTensor,
    dispatch, gradient_squares, parameter_squares, prepare_update, update,
};

use crate::clock::{Clock, Room};

const ADAFACTOR: UpdateRules = UpdateRules::Adafactor {
    decay_exponent: 0.8,
    eps: 1e-30,
    update_clip: 1.0,
    weight_decay: 0.0,
    parameter_scale: Some(1e-3),
};

const ADAMW: UpdateRules =
    UpdateRules::Adamw { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, parameter_scale: None };

pub(crate) fn run(clock: &Clock) {
    for experts in [0, 8, 32, 128] {
        of(clock, ADAFACTOR, "adafactor", experts);
    }
    for experts in [0, 8, 32] {
        of(clock, ADAMW, "adamw", experts);
    }
}

/// Shapes of T5-Base, every second layer with `experts` experts if there are any.
fn shapes(experts: usize) -> Vec<Vec<usize>> {
    let (d_model, d_ff) = (768, 3072);
    let mut shapes = vec![vec![32_128, d_model], vec![32, 12], vec![32, 12], vec![d_model], vec![d_model]];
    for layer in 0..24 {
        let attentions = if layer < 12 { 1 } else { 2 };
        shapes.extend(vec![vec![d_model, d_model]; 4 * attentions]);
        shapes.extend(vec![vec![d_model]; 1 + attentions]);
        if layer % 2 == 1 && experts > 0 {
            shapes.push(vec![d_model, experts]);
            shapes.extend([vec![experts, d_model, d_ff], vec![experts, d_ff, d_model]]);
        } else {
            shapes.extend([vec![d_model, d_ff], vec![d_ff, d_model]]);
        }
    }
    shapes
}

/// `bytes` bytes on the device: a pattern of 128 KiB that repeats.
fn repeated(clock: &Clock, pattern: &Room, bytes: usize) -> Room {
    let (row, rows) = (8192, 16);
    let slots = bytes.div_ceil(row);
    let token_of_slot: Vec<i32> = (0..slots).map(|slot| (slot % rows) as i32).collect();
    let (token_of_slot, out) = (clock.of(&token_of_slot), clock.zeros(slots * row));
    let to = Slots {
        tokens: rows,
        choices: 1,
        slots,
        d_model: row / 2,
        format: Format::Bf16,
        token_of_slot: token_of_slot.at(),
        slot_of_token: Address::NONE,
    };
    // SAFETY: the pattern has `rows` rows and the rooms have the values of `to`.
    unsafe { dispatch(clock.queue(), pattern.at(), out.at(), to) }.expect("launched");
    clock.queue().gpu.context().synchronize().expect("copied");
    out
}

fn of(clock: &Clock, rules: UpdateRules, name: &str, experts: usize) {
    if !clock.wants(name) {
        return;
    }
    let shapes = shapes(experts);
    let len = |shape: &[usize]| shape.iter().product::<usize>().next_multiple_of(8);
    let values: usize = shapes.iter().map(|shape| len(shape)).sum();
    let pattern = clock.normal_bf16(1 << 16, 0.01, 1);
    let gradients = repeated(clock, &pattern, 2 * values);
    let parameters = repeated(clock, &clock.normal_bf16(1 << 16, 0.5, 2), 2 * values);
    let rests = repeated(clock, &pattern, 2 * values);
    let is_adamw = matches!(rules, UpdateRules::Adamw { .. });
    let of_moments = |shape: &[usize]| match *shape {
        [ref stack @ .., rows, cols] if !is_adamw => {
            let stack = stack.iter().product::<usize>();
            [stack * rows, stack * cols].map(|values| values.next_multiple_of(8))
        }
        _ => [len(shape), if is_adamw { len(shape) } else { 0 }],
    };
    let moments = clock.zeros(4 * shapes.iter().flat_map(|shape| of_moments(shape)).sum::<usize>());
    let (mut at, mut moments_at) = (0, moments.at());
    let tensors: Vec<UpdatedTensor> = shapes
        .iter()
        .map(|shape| {
            let place = at;
            at += len(shape);
            let moments = of_moments(shape).map(|values| {
                let place = moments_at;
                moments_at = moments_at.plus(4 * values);
                place
            });
            UpdatedTensor {
                shape: shape.clone(),
                values: parameters.at().plus(2 * place),
                rest: rests.at().plus(2 * place),
                gradient: gradients.at().plus(2 * place),
                gradient_format: Format::Bf16,
                moments,
                part: 0,
            }
        })
        .collect();
    let (plan, table) = UpdatePlan::new(rules, &tensors).expect("sizes that there are");
    let (table, workspace) = (clock.of(&table), clock.zeros(plan.workspace()));
    let control = clock.of(&UpdateControl { learning_rate: 1e-4, ..UpdateControl::default() }.to_words());
    let memory = UpdateMemory { table: table.at(), workspace: workspace.at(), control: control.at() };
    let squares = |queue: Queue<'_>| {
        // SAFETY: the rooms are those of the plan.
        unsafe { gradient_squares(queue, &plan, memory) }
    };
    let apply = |queue: Queue<'_>| {
        // SAFETY: as above.
        unsafe {
            prepare_update(queue, &plan, memory, 1.0, Address::NONE)?;
            update(queue, &plan, memory)
        }
    };
    // SAFETY: as above.
    unsafe { parameter_squares(clock.queue(), &plan, memory) }.expect("launched");
    squares(clock.queue()).expect("launched");
    let size = format!("{name} {} M", values / 1_000_000);
    let (values, travelling) = (values as f64, if is_adamw { 26.0 } else { 10.0 });
    clock.time(&format!("{size}: squares"), 0.0, 2.0 * values, squares);
    clock.time(&format!("{size}: update"), 0.0, travelling * values, apply);
    clock.time(&format!("{size}: step"), 0.0, (travelling + 2.0) * values, |queue| {
        squares(queue)?;
        apply(queue)
    });
}
