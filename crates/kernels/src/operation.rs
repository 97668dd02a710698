//! The seam between tensors and kernels: an operation with a forward and a backward of its own.
//!
//! Owns the bookkeeping of automatic differentiation, written once for all operations. Does not
//! know what any of them computes.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Flex};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

/// `N` tensors in, `M` tensors out, differentiable in every input and output.
pub(crate) trait Operation<const N: usize, const M: usize>: Debug + Send + Sync + 'static {
    /// What the backward pass needs of the forward pass.
    type Saved: Debug + Send + Sync + 'static;

    /// Whether the backward pass runs once, with the gradients of all outputs. The loss must then depend
    /// on every output: one that gets no gradient holds back those of all inputs. Otherwise it runs for
    /// each output that the loss depends on.
    const TOGETHER: bool = false;

    /// Computes the outputs; `tracked` says whether a backward pass may follow.
    fn forward(&self, inputs: &[FlexTensor; N], tracked: bool) -> ([FlexTensor; M], Self::Saved);

    /// Gradients of the wanted inputs, given those of all outputs or of one.
    fn backward(
        &self,
        saved: &Self::Saved,
        gradients: [Option<FlexTensor>; M],
        wanted: [bool; N],
    ) -> [Option<FlexTensor>; N];
}

/// The gradient of the only output, or of each one of an operation that takes them together.
pub(crate) fn given<const M: usize>(gradients: [Option<FlexTensor>; M]) -> [FlexTensor; M] {
    gradients.map(|gradient| gradient.expect("operations that need all gradients get them"))
}

/// A tensor that automatic differentiation may follow.
type TrackedTensor = FloatTensor<Autodiff<Flex>>;

/// A tensor of any rank on its way into or out of an operation.
#[derive(Debug)]
pub(crate) enum Operand {
    Plain(FlexTensor),
    Tracked(TrackedTensor),
}

impl<const D: usize> From<Tensor<D>> for Operand {
    fn from(tensor: Tensor<D>) -> Self {
        const ONE_DEVICE: &str = "every device that a run can choose has a form of this operation";
        if tensor.is_autodiff() {
            Self::Tracked(tensor.try_into_primitive::<Autodiff<Flex>>().expect(ONE_DEVICE))
        } else {
            Self::Plain(tensor.try_into_primitive::<Flex>().expect(ONE_DEVICE))
        }
    }
}

impl Operand {
    pub(crate) fn into_tensor<const D: usize>(self) -> Tensor<D> {
        match self {
            Self::Plain(tensor) => Tensor::from_primitive::<Flex>(tensor),
            Self::Tracked(tensor) => Tensor::from_primitive::<Autodiff<Flex>>(tensor),
        }
    }

    /// The tensor itself, without its history.
    pub(crate) fn into_plain(self) -> FlexTensor {
        match self {
            Self::Plain(tensor) => tensor,
            Self::Tracked(tensor) => tensor.into_primitive(),
        }
    }

    fn into_tracked(self) -> TrackedTensor {
        match self {
            Self::Plain(tensor) => Autodiff::<Flex>::from_inner(tensor),
            Self::Tracked(tensor) => tensor,
        }
    }
}

/// Runs `operation`, recording its backward when an input is tracked.
pub(crate) fn apply<O, const N: usize, const M: usize>(operation: O, inputs: [Operand; N]) -> [Operand; M]
where
    O: Operation<N, M>,
{
    if inputs.iter().all(|input| matches!(input, Operand::Plain(_))) {
        return operation.forward(&inputs.map(Operand::into_plain), false).0.map(Operand::Plain);
    }
    let inputs = inputs.map(Operand::into_tracked);
    let prepared: [_; M] = std::array::from_fn(|output| {
        let step = Step::<O, N, M> { output, operation: std::marker::PhantomData };
        step.prepare::<NoCheckpointing>(inputs.each_ref().map(TrackedTensor::node)).compute_bound().stateful()
    });
    let tracked = prepared.iter().any(|kind| matches!(kind, OpsKind::Tracked(_)));
    let (outputs, saved) = operation.forward(&inputs.map(TrackedTensor::into_primitive), tracked);
    let arrived = Mutex::new([const { None }; M]);
    let state = Arc::new(State { operation, saved, arrived });
    let mut outputs = outputs.into_iter();
    prepared.map(|kind| {
        let output = outputs.next().expect("forward returned M outputs");
        Operand::Tracked(match kind {
            OpsKind::Tracked(prepared) => prepared.finish(state.clone(), output),
            OpsKind::UnTracked(prepared) => prepared.finish(output),
        })
    })
}

/// What the backward steps of all outputs share.
#[derive(Debug)]
struct State<O, S, const M: usize> {
    operation: O,
    saved: S,
    /// Gradients of outputs that wait for those of the others.
    arrived: Mutex<[Option<FlexTensor>; M]>,
}

/// The backward step of one output; the gradients of several outputs add up in the inputs.
struct Step<O, const N: usize, const M: usize> {
    output: usize,
    operation: std::marker::PhantomData<fn() -> O>,
}

impl<O, const N: usize, const M: usize> Debug for Step<O, N, M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}[{}]", std::any::type_name::<O>(), self.output)
    }
}

impl<O, const N: usize, const M: usize> Backward<Flex, N> for Step<O, N, M>
where
    O: Operation<N, M>,
{
    type State = Arc<State<O, O::Saved, M>>;

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node).to_contiguous();
        let State { operation, saved, arrived } = &*ops.state;
        let mut outputs = [const { None }; M];
        if O::TOGETHER {
            let mut arrived = arrived.lock().unwrap_or_else(PoisonError::into_inner);
            arrived[self.output] = Some(gradient);
            // Consumers of all outputs are deeper in the graph, so nothing reads the inputs' gradients yet.
            if arrived.iter().any(Option::is_none) {
                return;
            }
            std::mem::swap(&mut *arrived, &mut outputs);
        } else {
            outputs[self.output] = Some(gradient);
        }
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let computed = operation.backward(saved, outputs, wanted);
        for (parent, gradient) in ops.parents.into_iter().zip(computed) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}
