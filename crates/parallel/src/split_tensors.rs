//! Matrices split over the ranks of a tensor-parallel group.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use switchyard_comm::{Communicator, DeviceCommunicator, ReduceOp};
use switchyard_kernels::{
    Columns, DeviceMap, DeviceValues, DeviceVocabularyGroup, LinearMap, VocabularyGroup, VocabularyShard,
    linear_map,
};
use switchyard_model::TensorParallel;

use crate::failure::Failure;
use crate::on_devices::{slice, stream};

/// The borders of split matrices, as sums over a group.
///
/// # Source
/// Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3.
#[derive(Debug)]
pub struct SplitTensors {
    group: Group,
}

/// The group, as the operations see it.
#[derive(Debug, Clone)]
struct Group {
    communicator: Arc<dyn Communicator>,
    failure: Failure,
}

impl SplitTensors {
    /// Split over `communicator`; errors go to `failure`.
    pub fn new(communicator: Arc<dyn Communicator>, failure: Failure) -> Self {
        Self { group: Group { communicator, failure } }
    }

    fn rank(&self) -> usize {
        self.group.communicator.rank()
    }

    fn size(&self) -> usize {
        self.group.communicator.size()
    }
}

impl Group {
    fn reduce(&self, values: &mut [f32], op: ReduceOp) {
        self.failure.keep(self.communicator.all_reduce(values.into(), op), || ());
    }

    fn summed(&self, values: &[f32]) -> Vec<f32> {
        let mut sum = values.to_vec();
        self.reduce(&mut sum, ReduceOp::Sum);
        sum
    }

    fn devices(&self) -> &dyn DeviceCommunicator {
        self.communicator.on_devices().expect("asked of groups with devices alone")
    }

    fn reduced_on_devices(&self, values: &DeviceValues, op: ReduceOp) -> DeviceValues {
        let reduced = values.copied();
        let outcome = self.devices().all_reduce(slice(&reduced), op, stream(&reduced));
        self.failure.keep(outcome, || ());
        reduced
    }

    /// `map`, if the ranks have devices.
    fn if_on_devices<'a>(&self, map: &'a dyn DeviceMap) -> Option<&'a dyn DeviceMap> {
        self.communicator.on_devices().map(|_| map)
    }
}

/// Identity forward, sum backward.
#[derive(Debug)]
struct CopyIn(Group);

impl LinearMap for CopyIn {
    fn forward(&self, _: &[f32]) -> Option<Vec<f32>> {
        None
    }

    fn backward(&self, gradient: &[f32]) -> Option<Vec<f32>> {
        Some(self.0.summed(gradient))
    }

    fn on_devices(&self) -> Option<&dyn DeviceMap> {
        self.0.if_on_devices(self)
    }
}

impl DeviceMap for CopyIn {
    fn forward(&self, _: &DeviceValues) -> Option<DeviceValues> {
        None
    }

    fn backward(&self, gradient: &DeviceValues) -> Option<DeviceValues> {
        Some(self.0.reduced_on_devices(gradient, ReduceOp::Sum))
    }
}

/// Sum forward, identity backward.
#[derive(Debug)]
struct ReduceOut(Group);

impl LinearMap for ReduceOut {
    fn forward(&self, x: &[f32]) -> Option<Vec<f32>> {
        Some(self.0.summed(x))
    }

    fn backward(&self, _: &[f32]) -> Option<Vec<f32>> {
        None
    }

    fn on_devices(&self) -> Option<&dyn DeviceMap> {
        self.0.if_on_devices(self)
    }
}

impl DeviceMap for ReduceOut {
    fn forward(&self, x: &DeviceValues) -> Option<DeviceValues> {
        Some(self.0.reduced_on_devices(x, ReduceOp::Sum))
    }

    fn backward(&self, _: &DeviceValues) -> Option<DeviceValues> {
        None
    }
}

impl VocabularyGroup for Group {
    fn max(&self, values: &mut [f32]) {
        self.reduce(values, ReduceOp::Max);
    }

    fn sum(&self, values: &mut [f32]) {
        self.reduce(values, ReduceOp::Sum);
    }

    fn on_devices(&self) -> Option<&dyn DeviceVocabularyGroup> {
        self.communicator.on_devices().map(|_| -> &dyn DeviceVocabularyGroup { self })
    }
}

impl DeviceVocabularyGroup for Group {
    fn max(&self, values: &DeviceValues) -> DeviceValues {
        self.reduced_on_devices(values, ReduceOp::Max)
    }

    fn sum(&self, values: &DeviceValues) -> DeviceValues {
        self.reduced_on_devices(values, ReduceOp::Sum)
    }
}

impl TensorParallel for SplitTensors {
    fn splits(&self) -> bool {
        true
    }

    fn copy_in(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let shape = x_nd.dims();
        linear_map(x_nd, Arc::new(CopyIn(self.group.clone())), shape)
    }

    fn copy_in_gates(&self, gates: Tensor<1>) -> Tensor<1> {
        let shape = gates.dims();
        linear_map(gates, Arc::new(CopyIn(self.group.clone())), shape)
    }

    fn reduce_out(&self, x_nd: Tensor<2>) -> Tensor<2> {
        let shape = x_nd.dims();
        linear_map(x_nd, Arc::new(ReduceOut(self.group.clone())), shape)
    }

    fn vocabulary(&self, vocab_size: usize) -> Range<usize> {
        let part = vocab_size / self.size();
        self.rank() * part..(self.rank() + 1) * part
    }

    fn vocabulary_shard(&self, vocab_size: usize) -> Option<VocabularyShard> {
        let first = self.vocabulary(vocab_size).start;
        Some(VocabularyShard { first, group: Arc::new(self.group.clone()) })
    }

    fn gather_vocabulary(&self, logits_nv: Tensor<2>) -> Tensor<2> {
        let ([rows, local], size) = (logits_nv.dims(), self.size());
        linear_map(
            logits_nv,
            Arc::new(GatherColumns { group: self.group.clone(), local }),
            [rows, local * size],
        )
    }

    fn columns(&self, local: usize) -> Columns {
        Columns { first: self.rank() * local, total: self.size() * local }
    }
}

/// Joins the columns of all ranks; each takes its own gradient back.
#[derive(Debug)]
struct GatherColumns {
    group: Group,
    local: usize,
}

impl LinearMap for GatherColumns {
    fn forward(&self, x: &[f32]) -> Option<Vec<f32>> {
        let size = self.group.communicator.size();
        let mut gathered = vec![0.0; x.len() * size];
        let outcome = self.group.communicator.all_gather(x.into(), gathered.as_mut_slice().into());
        self.group.failure.keep(outcome, || ());
        let mut joined = vec![0.0; gathered.len()];
        for (rank, part) in gathered.chunks_exact(x.len().max(1)).enumerate() {
            let rows = joined.chunks_exact_mut(self.local * size).zip(part.chunks_exact(self.local));
            rows.for_each(|(to, from)| to[rank * self.local..][..self.local].copy_from_slice(from));
        }
        Some(joined)
    }

    fn backward(&self, gradient: &[f32]) -> Option<Vec<f32>> {
        let communicator = &self.group.communicator;
        let rows = gradient.chunks_exact(self.local * communicator.size());
        let first = communicator.rank() * self.local;
        Some(rows.flat_map(|row| row[first..][..self.local].iter().copied()).collect())
    }

    fn on_devices(&self) -> Option<&dyn DeviceMap> {
        self.group.if_on_devices(self)
    }
}

impl DeviceMap for GatherColumns {
    fn forward(&self, x: &DeviceValues) -> Option<DeviceValues> {
        let size = self.group.communicator.size();
        let gathered = x.room(x.len() * size);
        let outcome = self.group.devices().all_gather(slice(x), slice(&gathered), stream(x));
        let gathered = self.group.failure.keep(outcome.map(|()| gathered), || x.zeros(x.len() * size));
        Some(gathered.swapped([size, x.len() / self.local, self.local]))
    }

    fn backward(&self, gradient: &DeviceValues) -> Option<DeviceValues> {
        let communicator = &self.group.communicator;
        let rows = gradient.len() / (communicator.size() * self.local);
        Some(gradient.block([rows, communicator.size(), self.local], communicator.rank()))
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use switchyard_comm::threads;
    use switchyard_kernels::{CrossEntropy, HeadLayout, cross_entropy, int_tensor, test_device, with_values};

    use super::*;
    use crate::world_on;

    #[test]
    fn columns_of_all_ranks_are_joined_and_each_takes_its_gradient_back() {
        let ranks = threads(2, Duration::from_secs(60)).into_iter().map(|world| {
            thread::spawn(move || {
                let device = test_device().autodiff();
                let first = 10.0 * world.rank() as f32;
                let split = SplitTensors::new(world_on(world, &device).unwrap(), Failure::default());
                let own = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]].map(|row| row.map(|value| first + value));
                let own = Tensor::<2>::from_data(own, &device).require_grad();
                let joined = split.gather_vocabulary(own.clone());
                let weights = [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0], [8.0, 9.0, 10.0, 11.0]];
                let weights = Tensor::<2>::from_data(weights, &device);
                let gradients = (joined.clone() * weights).sum().backward();
                let of_own = own.grad(&gradients).expect("the loss depends on it");
                (with_values(joined, <[f32]>::to_vec), with_values(of_own, <[f32]>::to_vec))
            })
        });
        let ranks: Vec<_> = ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect();
        for (joined, _) in &ranks {
            assert_eq!(*joined, [1.0, 2.0, 11.0, 12.0, 3.0, 4.0, 13.0, 14.0, 5.0, 6.0, 15.0, 16.0]);
        }
        assert_eq!(ranks[0].1, [0.0, 1.0, 4.0, 5.0, 8.0, 9.0]);
        assert_eq!(ranks[1].1, [2.0, 3.0, 6.0, 7.0, 10.0, 11.0]);
    }

    /// Numbers without a pattern, between -2 and 2.
    fn numbers(shape: [usize; 2], salt: usize) -> Tensor<2> {
        let count = shape[0] * shape[1];
        let number = |i: usize| ((i * 7919 + salt) % 401) as f32 / 100.0 - 2.0;
        let values: Vec<f32> = (0..count).map(number).collect();
        Tensor::<1>::from_data(values.as_slice(), &test_device()).reshape(shape)
    }

    /// The loss of some tokens and its gradients of the hidden states and of the head, `[vocabulary, d_model]`.
    fn loss(hidden: Tensor<2>, head: Tensor<2>, shard: Option<VocabularyShard>) -> [Vec<f32>; 3] {
        let [hidden, head] = [hidden, head].map(|leaf| leaf.autodiff().require_grad());
        let (device, [tokens, _]) = (test_device(), hidden.dims());
        let rules = CrossEntropy { layout: HeadLayout::VocabularyByModel, scale: 0.5, z_coefficient: 1e-2 };
        let targets = int_tensor((0..tokens as i32).map(|i| i * 5 % 12).collect(), [tokens], &device);
        let (weights, scale) = (Tensor::ones([tokens], &device), Tensor::ones([1], &device));
        let out = cross_entropy(hidden.clone(), head.clone(), targets, weights, scale, rules, shard);
        let gradients = out.loss_sum.clone().backward();
        let [hidden, head] = [hidden, head].map(|leaf| leaf.grad(&gradients).expect("a leaf"));
        let values = |tensor: Tensor<2>| with_values(tensor, <[f32]>::to_vec);
        [with_values(out.loss_sum, <[f32]>::to_vec), values(hidden), values(head)]
    }

    #[test]
    fn ranks_share_a_loss_alike_on_their_devices_and_off_them() {
        let (hidden, head) = (numbers([7, 4], 3), numbers([12, 4], 5));
        let of_ranks = |on_devices: bool| {
            let ranks = threads(3, Duration::from_secs(60)).into_iter().map(|world| {
                let (hidden, head) = (hidden.clone(), head.clone());
                thread::spawn(move || {
                    let world = if on_devices { world_on(world, &test_device()).unwrap() } else { world };
                    let split = SplitTensors::new(world, Failure::default());
                    let head = head.slice([split.vocabulary(12), 0..4]);
                    loss(hidden, head, split.vocabulary_shard(12))
                })
            });
            ranks.collect::<Vec<_>>().into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>()
        };
        let ranks = of_ranks(false);
        assert_eq!(of_ranks(true), ranks);

        let [whole, of_hidden, of_head] = loss(hidden.clone(), head.clone(), None);
        let near =
            |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
        assert!(ranks.iter().all(|[loss, ..]| *loss == ranks[0][0] && near(loss, &whole)));
        let sum = |i: usize| ranks.iter().map(|[_, hidden, _]| hidden[i]).sum();
        assert!(near(&(0..7 * 4).map(sum).collect::<Vec<f32>>(), &of_hidden));
        assert!(near(&ranks.iter().flat_map(|[_, _, head]| head.clone()).collect::<Vec<_>>(), &of_head));
    }
}
