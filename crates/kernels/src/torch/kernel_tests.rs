//! Operations at sizes that have kernels, on the test device beside the CPU, in both formats.

use std::sync::atomic::Ordering;

use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};

use crate::host::int_tensor;
use crate::torch::gpu::CALLS;
use crate::*;

mod moe;

/// Numbers between -1 and 1 that bfloat16 holds exactly, without a pattern.
fn numbers(count: usize, salt: u32) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9) | 1;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        bf16::round((state >> 8) as f32 / 8_388_608.0 - 1.0).widen()
    };
    (0..count).map(|_| next()).collect()
}

/// Finds the gradient of one leaf.
type GradientOf = Box<dyn Fn(&Gradients) -> Vec<f32>>;

/// Makes the inputs of one run.
struct Inputs {
    device: Device,
    format: DType,
    leaves: Vec<GradientOf>,
}

impl Inputs {
    fn tensor<const D: usize>(&self, shape: [usize; D], salt: u32, format: DType) -> Tensor<D> {
        let values = numbers(shape.iter().product(), salt);
        let data = match format {
            DType::BF16 => TensorData::new(values.iter().map(|&v| bf16::round(v)).collect::<Vec<_>>(), shape),
            _ => TensorData::new(values, shape),
        };
        Tensor::from_data(data, (&self.device.clone().autodiff(), format))
    }

    /// A leaf in the format of the run.
    fn leaf<const D: usize>(&mut self, shape: [usize; D], salt: u32) -> Tensor<D> {
        self.leaf_in(shape, salt, self.format)
    }

    /// A leaf that is float32 in every run.
    fn wide<const D: usize>(&mut self, shape: [usize; D], salt: u32) -> Tensor<D> {
        self.leaf_in(shape, salt, DType::F32)
    }

    fn leaf_in<const D: usize>(&mut self, shape: [usize; D], salt: u32, format: DType) -> Tensor<D> {
        let tensor = self.tensor(shape, salt, format).require_grad();
        let kept = tensor.clone();
        self.leaves.push(Box::new(move |gradients| {
            Values::of(kept.grad(gradients).expect("the loss depends on every leaf")).into_f32()
        }));
        tensor
    }

    fn integers<const D: usize>(&self, shape: [usize; D], of: impl Fn(usize) -> i32) -> Tensor<D, Int> {
        int_tensor((0..shape.iter().product()).map(of).collect(), shape, &self.device)
    }

    /// Gradients of all leaves.
    fn gradients(&self, loss: Tensor<1>) -> Vec<Vec<f32>> {
        let gradients = loss.backward();
        self.leaves.iter().map(|gradient| gradient(&gradients)).collect()
    }
}

/// Compares results of the test device with those of the CPU.
///
/// `roundings` bounds how many, each off by 2^-8 at most, lie between inputs and a result in bfloat16.
fn compare(name: &str, roundings: f32, run: impl Fn(&mut Inputs) -> Vec<Vec<f32>>) {
    for (format, bound) in [(DType::F32, 2e-5), (DType::BF16, roundings.sqrt() / 256.0)] {
        let results = |device| run(&mut Inputs { device, format, leaves: Vec::new() });
        let calls = CALLS.load(Ordering::Relaxed);
        let (expected, found) = (results(Device::flex()), results(test_device()));
        let on_gpu = std::env::var("SWITCHYARD_TEST_DEVICE").is_ok_and(|name| name.starts_with("cuda"));
        assert!(!on_gpu || CALLS.load(Ordering::Relaxed) > calls, "{name}: no kernel ran");
        assert_eq!(expected.len(), found.len(), "{name}");
        for (i, (expected, found)) in expected.iter().zip(&found).enumerate() {
            let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
            let size = norm(&mut expected.iter().copied());
            let error = norm(&mut expected.iter().zip(found).map(|(e, f)| e - f));
            assert!(size > 0.0 && expected.len() == found.len(), "{name}: result {i} is empty");
            assert!(
                error <= bound * size,
                "{name} in {format:?}: result {i} is off by {error} of {size}, part {}, bound {bound}",
                error / size
            );
        }
    }
}

/// Compares outputs, and gradients of `sum(output * upstream)`.
fn check(name: &str, roundings: f32, run: impl Fn(&mut Inputs) -> Vec<Tensor<2>>) {
    compare(name, roundings, |inputs| {
        let outputs = run(inputs);
        let mut found: Vec<Vec<f32>> =
            outputs.iter().map(|out| with_values(out.clone(), <[f32]>::to_vec)).collect();
        let terms = outputs.into_iter().zip(90..).map(|(out, salt)| {
            let upstream = inputs.tensor(out.dims(), salt, DType::F32);
            (out.cast(burn::tensor::FloatDType::F32) * upstream).sum()
        });
        let loss = terms.reduce(|a, b| a + b).expect("one output at least");
        found.extend(inputs.gradients(loss));
        found
    });
}

const KEY: NoiseKey = NoiseKey { seed: 5, step: 1, site: 2 };

const RULES: Attention = Attention {
    batch: 2,
    num_heads: 3,
    queries: 150,
    keys: 150,
    key_room: 150,
    causal: false,
    query_offset: 0,
    dropout: 0.0,
    noise: KEY,
    first_row: 4,
    first_head: 1,
};

/// What the inputs of one attention are besides queries, keys and values.
#[derive(Debug, Clone, Copy, Default)]
struct Beside {
    bias: bool,
    narrow_bias: bool,
    key_mask: bool,
    segments: bool,
}

fn attention_inputs(inputs: &mut Inputs, rules: Attention, d_kv: usize, beside: Beside) -> AttentionInputs {
    let Attention { batch, num_heads, queries, keys, key_room, .. } = rules;
    let width = num_heads * d_kv;
    let bias = [num_heads, queries + keys - 1];
    let segments = beside.segments.then(|| Segments {
        queries: inputs.integers([batch, queries], |i| i32::from(i % queries > queries / 3)),
        keys: inputs.integers([batch, keys], |i| i32::from(i % keys > keys / 3)),
    });
    // Queries of about this size give scores of about 1.
    let q = inputs.leaf([batch * queries, width], 1) * (3.0 / (d_kv as f32).sqrt());
    AttentionInputs {
        q,
        k: inputs.leaf([batch * key_room, width], 2),
        v: inputs.leaf([batch * key_room, width], 3),
        relative_bias: beside.bias.then(|| match beside.narrow_bias {
            true => inputs.leaf(bias, 4),
            false => inputs.wide(bias, 4),
        }),
        key_mask: beside.key_mask.then(|| inputs.integers([batch, keys], |i| i32::from(i % 7 != 3))),
        segments,
    }
}

#[test]
fn attention_of_every_kind() {
    let bias = Beside { bias: true, ..Beside::default() };
    let cases = [
        (RULES, bias),
        (RULES, Beside { narrow_bias: true, key_mask: true, ..bias }),
        (Attention { causal: true, ..RULES }, bias),
        (Attention { causal: true, dropout: 0.2, ..RULES }, Beside { segments: true, ..bias }),
        (Attention { queries: 33, ..RULES }, Beside { key_mask: true, ..Beside::default() }),
        (Attention { queries: 33, dropout: 0.1, ..RULES }, Beside { segments: true, ..Beside::default() }),
    ];
    for d_kv in [64, 128] {
        for (rules, beside) in cases {
            check(&format!("attention {d_kv} {beside:?}"), 24.0, |inputs| {
                vec![attention(attention_inputs(inputs, rules, d_kv, beside), rules)]
            });
        }
    }
}

#[test]
fn attention_to_cached_keys() {
    let rules = Attention { queries: 1, keys: 37, key_room: 50, causal: true, query_offset: 36, ..RULES };
    let beside = Beside { bias: true, key_mask: true, ..Beside::default() };
    compare("cached keys", 24.0, |inputs| {
        let AttentionInputs { q, k, v, relative_bias, key_mask, segments } =
            attention_inputs(inputs, rules, 64, beside);
        let [q, k, v] = [q, k, v].map(Tensor::inner);
        let relative_bias = relative_bias.map(Tensor::inner);
        let given = AttentionInputs { q, k, v, relative_bias, key_mask, segments };
        vec![with_values(attention(given, rules), <[f32]>::to_vec)]
    });
}

#[test]
fn cross_entropy_in_one_chunk_and_several() {
    use HeadLayout::{ModelByVocabulary, VocabularyByModel};
    for (layout, tokens, vocabulary, scale) in [
        (VocabularyByModel, 37, 1000, 0.125),
        (ModelByVocabulary, 37, 1001, 1.0),
        (VocabularyByModel, 1500, 50_000, 0.25),
        (ModelByVocabulary, 1500, 50_000, 1.0),
    ] {
        let rules = CrossEntropy { layout, scale, z_coefficient: 1e-3 };
        // Half of what the gradients are formed with, or all.
        for scale_of_loss in [0.125, 0.25] {
            compare(&format!("cross-entropy {tokens} {layout:?}"), 6.0, |inputs| {
                let by_vocabulary = layout == VocabularyByModel;
                let head = if by_vocabulary { [vocabulary, 16] } else { [16, vocabulary] };
                let (hidden, head) = (inputs.leaf([tokens, 16], 1), inputs.leaf(head, 2));
                let targets = inputs.integers([tokens], |i| (i * 7919 % vocabulary) as i32);
                let weights: Vec<f32> = (0..tokens).map(|i| [1.0, 0.0, 0.5][i % 3]).collect();
                let weights = Tensor::<1>::from_data(weights.as_slice(), &inputs.device);
                let loss_scale = Tensor::full([1], 0.25, &inputs.device);
                let out = cross_entropy(hidden, head, targets, weights, loss_scale, rules, None);
                let mut found = vec![with_values(out.token_loss, <[f32]>::to_vec)];
                found.push(with_values(out.loss_sum.clone(), <[f32]>::to_vec));
                found.extend(inputs.gradients(out.loss_sum * scale_of_loss));
                found
            });
        }
    }
}

#[test]
fn rows_of_a_table() {
    let ids = |inputs: &Inputs, count: usize| inputs.integers([count], |i| (i * i % 90) as i32);
    for width in [8, 72] {
        check("embedding", 1.0, |inputs| {
            let ids = ids(inputs, 300);
            vec![embedding(inputs.leaf([130, width], 1), ids)]
        });
        for shard in [None, Some(40)] {
            check("two lists", 1.0, |inputs| {
                let ids = [ids(inputs, 300), ids(inputs, 70)];
                embedding_two(inputs.leaf([130, width], 1), ids, shard).into()
            });
            check("two lists and the table", 2.0, |inputs| {
                let ids = [ids(inputs, 300), ids(inputs, 70)];
                embedding_and_table(inputs.leaf([130, width], 1), ids, shard).into()
            });
        }
    }
}

#[test]
fn noise_on_whole_and_split_tensors() {
    for columns in [None, Some(Columns { first: 8, total: 70 })] {
        let noise = TokenNoise { key: KEY, first_row: 3, row_tokens: 7, columns };
        check("dropout", 1.0, |inputs| vec![dropout(inputs.leaf([45, 56], 1), 0.3, noise)]);
        check("jitter", 1.0, |inputs| vec![jitter(inputs.leaf([45, 56], 1), 0.1, noise)]);
    }
}
