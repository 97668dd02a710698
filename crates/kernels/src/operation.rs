//! The seam between tensors and kernels: an operation with a forward and a backward of its own.
//!
//! Owns the bookkeeping of automatic differentiation, written once for all operations and all kinds of
//! devices. Does not know what any of them computes.

use std::fmt::{self, Debug};
use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

#[cfg(feature = "libtorch")]
use burn::backend::LibTorch;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::NoCheckpointing;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Backend, Flex};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;

/// A kind of devices, and what operations rely on there.
pub(crate) trait Substrate: Backend {
    /// The tensor with its values row by row, copied only when they are strided.
    fn contiguous(tensor: FloatTensor<Self>) -> FloatTensor<Self>;
}

impl Substrate for Flex {
    fn contiguous(tensor: FlexTensor) -> FlexTensor {
        tensor.to_contiguous()
    }
}

/// `N` tensors in, `M` tensors out, differentiable in every input and output; its form for devices of `B`.
pub(crate) trait Operation<B: Backend, const N: usize, const M: usize>:
    Debug + Send + Sync + 'static
{
    /// What the backward pass needs of the forward pass.
    type Saved: Debug + Send + Sync + 'static;

    /// Whether the backward pass runs once, with the gradients of all outputs. The loss must then depend
    /// on every output: one that gets no gradient holds back those of all inputs. Otherwise it runs for
    /// each output that the loss depends on.
    const TOGETHER: bool = false;

    /// Whether the backward pass takes gradients as they come, transposed, repeated or parts of others. Otherwise
    /// their values lie row by row, which may be a copy.
    const ANY_STRIDES: bool = false;

    /// Computes the outputs; `tracked` says whether a backward pass may follow.
    fn forward(&self, inputs: &[FloatTensor<B>; N], tracked: bool) -> ([FloatTensor<B>; M], Self::Saved);

    /// Gradients of the wanted inputs, given those of all outputs or of one.
    fn backward(
        &self,
        saved: &Self::Saved,
        gradients: [Option<FloatTensor<B>>; M],
        wanted: [bool; N],
    ) -> [Option<FloatTensor<B>>; N];
}

/// An operation with a form for every device that a run can choose.
#[cfg(not(feature = "libtorch"))]
pub(crate) trait EveryDevice<const N: usize, const M: usize>: Operation<Flex, N, M> {}
#[cfg(not(feature = "libtorch"))]
impl<O: Operation<Flex, N, M>, const N: usize, const M: usize> EveryDevice<N, M> for O {}

/// An operation with a form for every device that a run can choose.
#[cfg(feature = "libtorch")]
pub(crate) trait EveryDevice<const N: usize, const M: usize>:
    Operation<Flex, N, M> + Operation<LibTorch, N, M>
{
}
#[cfg(feature = "libtorch")]
impl<O, const N: usize, const M: usize> EveryDevice<N, M> for O where
    O: Operation<Flex, N, M> + Operation<LibTorch, N, M>
{
}

/// The gradient of the only output, or of each one of an operation that takes them together.
pub(crate) fn given<T, const M: usize>(gradients: [Option<T>; M]) -> [T; M] {
    gradients.map(|gradient| gradient.expect("operations that need all gradients get them"))
}

/// A tensor that automatic differentiation may follow.
type TrackedTensor<B> = FloatTensor<Autodiff<B>>;

/// A tensor on a device of `B`, with its history or without.
#[derive(Debug)]
pub(crate) enum Followed<B: Backend> {
    Plain(FloatTensor<B>),
    Tracked(TrackedTensor<B>),
}

impl<B: Backend> Followed<B> {
    fn into_plain(self) -> FloatTensor<B> {
        match self {
            Self::Plain(tensor) => tensor,
            Self::Tracked(tensor) => tensor.into_primitive(),
        }
    }

    fn into_tracked(self) -> TrackedTensor<B> {
        match self {
            Self::Plain(tensor) => Autodiff::<B>::from_inner(tensor),
            Self::Tracked(tensor) => tensor,
        }
    }
}

/// A tensor of any rank on its way into or out of an operation.
#[derive(Debug)]
pub(crate) enum Operand {
    Flex(Followed<Flex>),
    #[cfg(feature = "libtorch")]
    Torch(Followed<LibTorch>),
}

macro_rules! followed {
    ($tensor:expr, $B:ty) => {
        if $tensor.is_autodiff() {
            Followed::Tracked($tensor.try_into_primitive::<Autodiff<$B>>().expect(ONE_DEVICE))
        } else {
            Followed::Plain($tensor.try_into_primitive::<$B>().expect(ONE_DEVICE))
        }
    };
}

const ONE_DEVICE: &str = "every device that a run can choose has a form of this operation";

impl<const D: usize> From<Tensor<D>> for Operand {
    fn from(tensor: Tensor<D>) -> Self {
        #[cfg(feature = "libtorch")]
        if crate::torch::is_here(&tensor.device()) {
            return Self::Torch(followed!(tensor, LibTorch));
        }
        Self::Flex(followed!(tensor, Flex))
    }
}

impl Operand {
    /// A tensor of the CPU device without history.
    pub(crate) fn plain(tensor: FlexTensor) -> Self {
        Self::Flex(Followed::Plain(tensor))
    }

    pub(crate) fn into_tensor<const D: usize>(self) -> Tensor<D> {
        match self {
            Self::Flex(Followed::Plain(tensor)) => Tensor::from_primitive::<Flex>(tensor),
            Self::Flex(Followed::Tracked(tensor)) => Tensor::from_primitive::<Autodiff<Flex>>(tensor),
            #[cfg(feature = "libtorch")]
            Self::Torch(Followed::Plain(tensor)) => Tensor::from_primitive::<LibTorch>(tensor),
            #[cfg(feature = "libtorch")]
            Self::Torch(Followed::Tracked(tensor)) => Tensor::from_primitive::<Autodiff<LibTorch>>(tensor),
        }
    }
}

/// Runs `operation`, recording its backward when an input is tracked.
///
/// # Panics
/// When the inputs lie on devices of different kinds.
pub(crate) fn apply<O, const N: usize, const M: usize>(operation: O, inputs: [Operand; N]) -> [Operand; M]
where
    O: EveryDevice<N, M>,
{
    #[cfg(feature = "libtorch")]
    if matches!(inputs[0], Operand::Torch(_)) {
        return apply_in_torch(operation, inputs);
    }
    let inputs = inputs.map(|input| match input {
        Operand::Flex(tensor) => tensor,
        #[cfg(feature = "libtorch")]
        Operand::Torch(_) => panic!("all inputs of an operation lie on one device"),
    });
    run::<Flex, O, N, M>(operation, inputs).map(Operand::Flex)
}

/// [`apply`] for operations that LibTorch alone has a form of.
#[cfg(feature = "libtorch")]
pub(crate) fn apply_in_torch<O, const N: usize, const M: usize>(
    operation: O,
    inputs: [Operand; N],
) -> [Operand; M]
where
    O: Operation<LibTorch, N, M>,
{
    let inputs = inputs.map(|input| match input {
        Operand::Torch(tensor) => tensor,
        Operand::Flex(_) => panic!("all inputs of an operation lie on one device"),
    });
    run::<LibTorch, O, N, M>(operation, inputs).map(Operand::Torch)
}

fn run<B, O, const N: usize, const M: usize>(operation: O, inputs: [Followed<B>; N]) -> [Followed<B>; M]
where
    B: Substrate,
    O: Operation<B, N, M>,
{
    if inputs.iter().all(|input| matches!(input, Followed::Plain(_))) {
        return operation.forward(&inputs.map(Followed::into_plain), false).0.map(Followed::Plain);
    }
    let inputs = inputs.map(Followed::into_tracked);
    let prepared: [_; M] = std::array::from_fn(|output| {
        let step = Step::<B, O, N, M> { output, operation: PhantomData };
        step.prepare::<NoCheckpointing>(inputs.each_ref().map(TrackedTensor::<B>::node))
            .compute_bound()
            .stateful()
    });
    let tracked = prepared.iter().any(|kind| matches!(kind, OpsKind::Tracked(_)));
    let (outputs, saved) = operation.forward(&inputs.map(TrackedTensor::<B>::into_primitive), tracked);
    let arrived = Mutex::new([const { None }; M]);
    let state = Arc::new(State { operation, saved, arrived });
    let mut outputs = outputs.into_iter();
    prepared.map(|kind| {
        let output = outputs.next().expect("forward returned M outputs");
        Followed::Tracked(match kind {
            OpsKind::Tracked(prepared) => prepared.finish(state.clone(), output),
            OpsKind::UnTracked(prepared) => prepared.finish(output),
        })
    })
}

/// What the backward steps of all outputs share.
#[derive(Debug)]
struct State<T, O, S, const M: usize> {
    operation: O,
    saved: S,
    /// Gradients of outputs that wait for those of the others.
    arrived: Mutex<[Option<T>; M]>,
}

/// The backward step of one output; the gradients of several outputs add up in the inputs.
struct Step<B, O, const N: usize, const M: usize> {
    output: usize,
    operation: PhantomData<fn() -> (B, O)>,
}

impl<B, O, const N: usize, const M: usize> Debug for Step<B, O, N, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[{}]", std::any::type_name::<O>(), self.output)
    }
}

impl<B, O, const N: usize, const M: usize> Backward<B, N> for Step<B, O, N, M>
where
    B: Substrate,
    O: Operation<B, N, M>,
{
    type State = Arc<State<FloatTensor<B>, O, O::Saved, M>>;

    fn backward(self, ops: Ops<Self::State, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<B>(&ops.node);
        let gradient = if O::ANY_STRIDES { gradient } else { B::contiguous(gradient) };
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
                gradients.register::<B>(parent.id, gradient);
            }
        }
    }
}
