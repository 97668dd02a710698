//! Cross-entropy beside the same mathematics composed of tensor operations, whole and split.

use std::ops::Range;
use std::sync::{Arc, Barrier};

use burn::tensor::{Distribution, TensorData, activation};
use switchyard_random::{Philox, normal_pair};

use super::*;
use crate::vocabulary::{DeviceVocabularyGroup, VocabularyGroup};
use crate::{DeviceValues, Place, Values, place_of, test_device};

struct Sizes {
    tokens: usize,
    d_model: usize,
    vocabulary: usize,
}

/// Another factor than the one that the loss is then multiplied by.
fn loss_scale() -> Tensor<1> {
    Tensor::full([1], 0.25, &test_device())
}

fn check(sizes: Sizes, rules: CrossEntropy) {
    let Sizes { tokens, d_model, vocabulary } = sizes;
    let CrossEntropy { layout, scale, z_coefficient } = rules;
    let device = test_device().autodiff();
    let random = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device).require_grad();
    let by_model = layout == HeadLayout::ModelByVocabulary;
    let hidden = random([tokens, d_model]);
    let head = random(if by_model { [d_model, vocabulary] } else { [vocabulary, d_model] });
    let targets: Vec<i32> = (0..tokens).map(|i| (i * 5 % vocabulary) as i32).collect();
    let weights: Vec<f32> = (0..tokens).map(|i| [1.0, 0.5, 2.0, 0.0][i % 4]).collect();
    let weights = Tensor::<1>::from_data(weights.as_slice(), &device);
    let ids = host::int_tensor(targets, [tokens], &device);
    let fused =
        cross_entropy(hidden.clone(), head.clone(), ids.clone(), weights.clone(), loss_scale(), rules, None);

    let matrix = if by_model { head.clone() } else { head.clone().transpose() };
    let logits = (hidden.clone() * scale).matmul(matrix);
    let log_p = activation::log_softmax(logits.clone(), 1);
    let losses = log_p.gather(1, ids.clone().unsqueeze_dim(1)).neg().squeeze_dim::<1>(1);
    let z = logits.clone().exp().sum_dim(1).log().square().squeeze_dim::<1>(1);
    let plain = ((losses.clone() + z.clone() * z_coefficient) * weights).sum();

    let value = |t: Tensor<1>| t.into_scalar::<f32>();
    let total = value(plain.clone());
    assert!((value(fused.loss_sum.clone()) - total).abs() < 2e-6 * total.abs().max(1.0));
    let largest = |a: Tensor<1>, b: Tensor<1>| (a - b.inner()).abs().max().into_scalar::<f32>();
    assert!(largest(fused.token_loss, losses) < 1e-5);
    let correct = logits.argmax(1).squeeze_dim::<1>(1).equal(ids).int();
    let correct: Vec<f32> = correct.into_data().iter::<f32>().collect();
    assert_eq!(host::with_values(fused.token_correct, <[f32]>::to_vec), correct);
    let a = (fused.loss_sum * 0.5).backward();
    let b = (plain * 0.5).backward();
    for leaf in [&hidden, &head] {
        let difference = leaf.grad(&a).expect("leaf") - leaf.grad(&b).expect("leaf");
        assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);
    }
}

const LAYOUTS: [HeadLayout; 2] = [HeadLayout::ModelByVocabulary, HeadLayout::VocabularyByModel];

#[test]
fn equals_the_composed_reference() {
    for layout in LAYOUTS {
        for (scale, z_coefficient) in [(1.0, 0.0), (0.5, 1e-2)] {
            let sizes = Sizes { tokens: 11, d_model: 6, vocabulary: 37 };
            check(sizes, CrossEntropy { layout, scale, z_coefficient });
        }
    }
}

#[test]
fn several_chunks_add_up() {
    let vocabulary = 50_000;
    let tokens = 2 * (CHUNK_LOGITS / vocabulary) + 3;
    for layout in LAYOUTS {
        let sizes = Sizes { tokens, d_model: 3, vocabulary };
        check(sizes, CrossEntropy { layout, scale: 0.5, z_coefficient: 1e-4 });
    }
}

#[test]
fn positions_without_weight_touch_nothing() {
    let device = test_device().autodiff();
    let hidden = Tensor::<2>::ones([2, 3], &device).require_grad();
    let head = Tensor::<2>::ones([3, 5], &device).require_grad();
    let ids = host::int_tensor(vec![1, 2], [2], &device);
    let rules = CrossEntropy { layout: HeadLayout::ModelByVocabulary, scale: 1.0, z_coefficient: 1e-2 };
    let weights = Tensor::zeros([2], &device.inner());
    let out = cross_entropy(hidden.clone(), head, ids, weights, loss_scale(), rules, None);
    assert_eq!(out.loss_sum.clone().into_scalar::<f32>(), 0.0);
    let gradients = out.loss_sum.backward();
    assert_eq!(hidden.grad(&gradients).expect("leaf").abs().max().into_scalar::<f32>(), 0.0);
}

/// Ranks that are threads.
#[derive(Debug)]
struct Ranks {
    barrier: Barrier,
    values: Mutex<Vec<Vec<f32>>>,
}

#[derive(Debug)]
struct Rank {
    number: usize,
    ranks: Arc<Ranks>,
    /// Whether they agree where LibTorch has the values.
    on_devices: bool,
}

impl Rank {
    fn reduce(&self, values: &mut [f32], join: fn(f32, f32) -> f32) {
        let all = || self.ranks.values.lock().unwrap();
        all()[self.number] = values.to_vec();
        self.ranks.barrier.wait();
        for (i, value) in values.iter_mut().enumerate() {
            *value = all().iter().map(|of_rank| of_rank[i]).reduce(join).unwrap();
        }
        self.ranks.barrier.wait();
    }
}

impl VocabularyGroup for Rank {
    fn max(&self, values: &mut [f32]) {
        self.reduce(values, f32::max);
    }

    fn sum(&self, values: &mut [f32]) {
        self.reduce(values, |a, b| a + b);
    }

    fn on_devices(&self) -> Option<&dyn DeviceVocabularyGroup> {
        self.on_devices.then_some(self)
    }
}

impl DeviceVocabularyGroup for Rank {
    fn max(&self, values: &DeviceValues) -> DeviceValues {
        reduced(values, |values| VocabularyGroup::max(self, values))
    }

    fn sum(&self, values: &DeviceValues) -> DeviceValues {
        reduced(values, |values| VocabularyGroup::sum(self, values))
    }
}

/// What `reduce` makes of the values, in their place.
#[cfg(feature = "libtorch")]
fn reduced(values: &DeviceValues, reduce: impl FnOnce(&mut [f32])) -> DeviceValues {
    let mut reduced = values.to_host().into_f32();
    reduce(&mut reduced);
    let place = values.clone().into_tensor().tensor;
    let reduced = tch::Tensor::from_slice(&reduced).to(place.device()).view_as(&place);
    DeviceValues::there(&burn_tch::TchTensor::new(reduced))
}

/// Nothing: this build has no such values.
#[cfg(not(feature = "libtorch"))]
fn reduced(values: &DeviceValues, _: impl FnOnce(&mut [f32])) -> DeviceValues {
    values.copied()
}

#[cfg(feature = "libtorch")]
use crate::torch::recording::watched;

/// Does `work`, with no device to wait for.
#[cfg(not(feature = "libtorch"))]
fn watched<R>(work: impl FnOnce() -> R) -> (R, Option<&'static str>) {
    (work(), None)
}

/// What one call gives, and the gradients of half its loss.
#[derive(Debug, PartialEq)]
struct Results {
    loss: f32,
    token_loss: Vec<f32>,
    correct: Vec<f32>,
    hidden: Vec<f32>,
    head: Vec<f32>,
}

/// The operation on some rows of a head `[vocabulary, d_model]`, in the format of both, and where in it the host
/// waited for a device.
fn run(
    [hidden, head]: [&Tensor<2>; 2],
    rows: Range<usize>,
    rules: CrossEntropy,
    shard: Option<VocabularyShard>,
) -> (Results, Option<&'static str>) {
    let device = test_device().autodiff();
    let ([tokens, d], [vocabulary, _]) = (hidden.dims(), head.dims());
    let format = head.dtype();
    let leaf = |tensor: Tensor<2>| Tensor::from_data(tensor.into_data(), (&device, format)).require_grad();
    let part = head.clone().slice([rows, 0..d]);
    let by_model = rules.layout == HeadLayout::ModelByVocabulary;
    let (hidden, head) = (leaf(hidden.clone()), leaf(if by_model { part.transpose() } else { part }));
    let targets: Vec<i32> = (0..tokens).map(|i| (i * 7 % vocabulary) as i32).collect();
    let weights: Vec<f32> = (0..tokens).map(|i| [1.0, 0.5, 2.0, 0.0][i % 4]).collect();
    let weights = Tensor::<1>::from_data(weights.as_slice(), &device.clone().inner());
    let targets = host::int_tensor(targets, [tokens], &device.clone().inner());
    let loss_scale = loss_scale();
    let (out, waited) =
        watched(|| cross_entropy(hidden.clone(), head.clone(), targets, weights, loss_scale, rules, shard));
    let values = |tensor: Tensor<1>| host::with_values(tensor, <[f32]>::to_vec);
    let gradients = (out.loss_sum.clone() * 0.5).backward();
    let gradient = |leaf: &Tensor<2>| leaf.grad(&gradients).expect("leaf");
    let head = gradient(&head);
    let results = Results {
        loss: values(out.loss_sum)[0],
        token_loss: values(out.token_loss),
        correct: values(out.token_correct),
        hidden: Values::of(gradient(&hidden)).into_f32(),
        head: Values::of(if by_model { head.transpose() } else { head }).into_f32(),
    };
    (results, waited)
}

/// Compares values relative to their largest.
fn assert_close(a: &[f32], b: &[f32], tolerance: f32, what: &str) {
    assert_eq!(a.len(), b.len(), "{what}");
    let largest = b.iter().fold(0.0_f32, |largest, b| largest.max(b.abs()));
    let difference = a.iter().zip(b).fold(0.0_f32, |largest, (a, b)| largest.max((a - b).abs()));
    assert!(difference <= tolerance * largest, "{what}: {difference} of {largest}");
}

/// Normal numbers that are the same in every run.
fn normal([rows, columns]: [usize; 2], seed: u64) -> Tensor<2> {
    let mut stream = Philox::new(seed).stream([0; 3]);
    let values: Vec<f32> =
        (0..rows * columns).map(|_| normal_pair(stream.next_u32(), stream.next_u32()).0 as f32).collect();
    Tensor::from_data(TensorData::new(values, [rows, columns]), &test_device())
}

/// Every rank's part of a vocabulary that is split over `count` ranks, and where its host waited for a device.
fn split(
    [hidden, head]: [&Tensor<2>; 2],
    rules: CrossEntropy,
    count: usize,
    on_devices: bool,
) -> Vec<(Results, Option<&'static str>)> {
    let [vocabulary, _] = head.dims();
    let ranks = Arc::new(Ranks { barrier: Barrier::new(count), values: Mutex::new(vec![vec![]; count]) });
    let local = vocabulary / count;
    std::thread::scope(|scope| {
        let start = |number: usize| {
            let group = Arc::new(Rank { number, ranks: ranks.clone(), on_devices });
            let shard = VocabularyShard { first: number * local, group };
            let rows = shard.first..shard.first + local;
            scope.spawn(move || run([hidden, head], rows, rules, Some(shard)))
        };
        let threads: Vec<_> = (0..count).map(start).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// A vocabulary split over `count` ranks beside the whole one, however the ranks agree.
fn check_split(sizes: Sizes, rules: CrossEntropy, format: DType, count: usize) {
    let Sizes { tokens, d_model, vocabulary } = sizes;
    let (hidden, head) =
        (normal([tokens, d_model], 1).cast(format), normal([vocabulary, d_model], 2).cast(format));
    let (whole, _) = run([&hidden, &head], 0..vocabulary, rules, None);
    let (parts, waited): (Vec<_>, Vec<_>) = split([&hidden, &head], rules, count, false).into_iter().unzip();
    let in_main_memory = place_of(&test_device()) == Place::Host;
    assert!(waited.iter().all(|waited| waited.is_none() == in_main_memory), "{waited:?}");
    let (there, waited): (Vec<_>, Vec<_>) = split([&hidden, &head], rules, count, true).into_iter().unzip();
    assert_eq!(waited, vec![None; count]);
    assert!(there == parts, "the same bits wherever ranks agree");

    // Rounding errors of a sum grow with the root of its length.
    let tolerance = if format == DType::F32 { 2e-7 * (vocabulary as f32).sqrt() } else { 1.0 / 64.0 };
    for rank in &parts {
        assert_close(&[rank.loss], &[whole.loss], tolerance, "loss");
        assert_close(&rank.token_loss, &whole.token_loss, tolerance, "loss of a position");
        assert_eq!(rank.correct, whole.correct);
        assert_eq!(rank.loss.to_bits(), parts[0].loss.to_bits(), "one loss on all ranks");
    }
    let hidden: Vec<f32> =
        (0..tokens * d_model).map(|i| parts.iter().map(|rank| rank.hidden[i]).sum()).collect();
    assert_close(&hidden, &whole.hidden, tolerance, "gradient of the hidden states");
    let head: Vec<f32> = parts.iter().flat_map(|rank| rank.head.iter().copied()).collect();
    assert_close(&head, &whole.head, tolerance, "gradient of the head");
}

#[test]
fn a_split_vocabulary_gives_the_loss_and_the_gradients_of_the_whole() {
    for layout in LAYOUTS {
        for count in [2, 3] {
            for (scale, z_coefficient) in [(1.0, 0.0), (0.5, 1e-2)] {
                let rules = CrossEntropy { layout, scale, z_coefficient };
                for format in [DType::F32, DType::BF16] {
                    check_split(Sizes { tokens: 65, d_model: 6, vocabulary: 30 }, rules, format, count);
                }
            }
        }
    }
}

#[test]
fn a_split_vocabulary_in_several_chunks() {
    // More bytes of a shard's logits than any form holds at once.
    let sizes = || Sizes { tokens: 2051, d_model: 3, vocabulary: 1 << 15 };
    for layout in LAYOUTS {
        let rules = CrossEntropy { layout, scale: 0.5, z_coefficient: 1e-4 };
        check_split(sizes(), rules, DType::F32, 2);
    }
}
