//! Greedy decoding with cached keys and values.

use burn::tensor::{Int, Tensor};
use switchyard_kernels::{int_tensor, with_values};

use crate::context::ForwardContext;
use crate::model::SwitchTransformer;
use crate::t5::DecoderCache;

/// One decoding step, all rows.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// New id of every row; padding for rows that have ended.
    pub ids: &'a [i32],
    /// What the ids were chosen from, `[rows, vocab_size]`.
    pub logits: &'a [f32],
}

/// Decodes every row until it has written EOS or `max_new_tokens` tokens.
///
/// `on_step` sees each step as it happens and may stop early by returning `false`. The lowest id
/// wins ties.
///
/// # Collective
/// Ranks that share experts or matrices must call this with one `max_new_tokens` and end together: one
/// that is done, or told to stop, runs the remaining steps of the others without a word of its own.
///
/// # Shapes
/// `input_ids`: `[rows * inputs_length]`; `input_mask`: `[rows, inputs_length]`. Returns one list a
/// row, without the start token, ending with EOS where the row ended by itself.
pub fn greedy(
    model: &SwitchTransformer,
    input_ids: Tensor<1, Int>,
    input_mask: Tensor<2, Int>,
    max_new_tokens: usize,
    context: &ForwardContext<'_>,
    mut on_step: impl FnMut(Step<'_>) -> bool,
) -> Vec<Vec<i32>> {
    let device = input_ids.device();
    let [rows, _] = input_mask.dims();
    let (pad, eos) = (context.model.pad_token_id as i32, context.model.eos_token_id as i32);
    let encoder = model.encode(input_ids, input_mask, context);
    let mut cache = DecoderCache::new(context.model.num_decoder_layers);
    let mut last = vec![pad; rows];
    let mut written = vec![Vec::new(); rows];
    let mut ended = vec![false; rows];
    let mut going = true;
    for position in 0..max_new_tokens {
        let ids = int_tensor(last.clone(), [rows], &device);
        let logits = model.decode_step(ids, position, &encoder, &mut cache, context);
        let vocabulary = logits.dims()[1];
        if going {
            let wanted = with_values(logits, |logits| {
                for (row, logits) in logits.chunks_exact(vocabulary).enumerate() {
                    last[row] = if ended[row] { pad } else { argmax(logits) };
                    if !ended[row] {
                        written[row].push(last[row]);
                        ended[row] = last[row] == eos;
                    }
                }
                on_step(Step { ids: &last, logits })
            });
            going = wanted && !ended.iter().all(|&ended| ended);
        }
        if !context.dispatcher.any(going) {
            break;
        }
    }
    written
}

/// Index of the largest value, the lowest on ties.
pub fn argmax(values: &[f32]) -> i32 {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] {
            best = i;
        }
    }
    best as i32
}
