//! An operation composed of LibTorch's own, with LibTorch's automatic differentiation as its backward.

use burn_tch::TchTensor;
use tch::{Kind, Tensor, no_grad};

/// What LibTorch recorded of a forward pass.
#[derive(Debug, Default)]
pub(crate) struct Graph {
    leaves: Vec<TchTensor>,
    outputs: Vec<TchTensor>,
}

/// `f` of the inputs, and its graph if a backward pass may follow.
pub(crate) fn composed<const N: usize, const M: usize>(
    inputs: &[TchTensor; N],
    tracked: bool,
    f: impl FnOnce([&Tensor; N]) -> [Tensor; M],
) -> ([TchTensor; M], Graph) {
    if !tracked {
        let outputs = no_grad(|| f(inputs.each_ref().map(|input| &input.tensor)));
        return (outputs.map(|output| sharing(output, inputs)), Graph::default());
    }
    let leaves = inputs.each_ref().map(|input| TchTensor {
        tensor: input.tensor.detach().set_requires_grad(true),
        storage: input.storage.clone(),
    });
    let outputs = f(leaves.each_ref().map(|leaf| &leaf.tensor)).map(|output| sharing(output, inputs));
    let plain = outputs
        .each_ref()
        .map(|output| TchTensor { tensor: output.tensor.detach(), storage: output.storage.clone() });
    (plain, Graph { leaves: leaves.into(), outputs: outputs.into() })
}

/// A result with the storage that it shares with an input, so that burn does not write into either.
fn sharing(output: Tensor, inputs: &[TchTensor]) -> TchTensor {
    match inputs.iter().find(|input| input.tensor.data_ptr() == output.data_ptr()) {
        Some(input) => TchTensor::from_existing(output, input.storage.clone()),
        None => TchTensor::new(output),
    }
}

impl Graph {
    /// Gradients of the wanted inputs, given those of some outputs.
    pub(crate) fn gradients<const N: usize, const M: usize>(
        &self,
        gradients: [Option<TchTensor>; M],
        wanted: [bool; N],
    ) -> [Option<TchTensor>; N] {
        let terms = self.outputs.iter().zip(&gradients).filter_map(|(output, gradient)| {
            let gradient = gradient.as_ref()?;
            // LibTorch's bindings begin a backward pass at scalars only.
            Some(
                (&output.tensor.to_kind(Kind::Float) * gradient.tensor.to_kind(Kind::Float)).sum(Kind::Float),
            )
        });
        let total = terms.reduce(|a, b| a + b).expect("a backward pass begins with a gradient");
        let leaves: Vec<&Tensor> = self
            .leaves
            .iter()
            .zip(wanted)
            .filter(|&(_, wanted)| wanted)
            .map(|(leaf, _)| &leaf.tensor)
            .collect();
        let mut computed: Vec<TchTensor> = Vec::with_capacity(leaves.len());
        for gradient in Tensor::run_backward(&[total], &leaves, true, false) {
            // A sum hands the same memory to both of its summands.
            let gradient = sharing(gradient, &computed);
            computed.push(gradient);
        }
        let mut computed = computed.into_iter();
        wanted.map(|wanted| wanted.then(|| computed.next()).flatten())
    }
}

/// The form of an operation for LibTorch whose backward is its graph's: `$inputs` tensors in, `$outputs` out.
macro_rules! composed_operation {
    ($operation:ty, $inputs:literal, $outputs:literal, $together:literal, $f:expr) => {
        impl crate::operation::Operation<burn::backend::LibTorch, $inputs, $outputs> for $operation {
            type Saved = crate::torch::composed::Graph;

            const TOGETHER: bool = $together;

            fn forward(
                &self,
                inputs: &[burn_tch::TchTensor; $inputs],
                tracked: bool,
            ) -> ([burn_tch::TchTensor; $outputs], Self::Saved) {
                let f: fn(&$operation, [&tch::Tensor; $inputs]) -> [tch::Tensor; $outputs] = $f;
                crate::torch::composed::composed(inputs, tracked, |inputs| f(self, inputs))
            }

            fn backward(
                &self,
                saved: &Self::Saved,
                gradients: [Option<burn_tch::TchTensor>; $outputs],
                wanted: [bool; $inputs],
            ) -> [Option<burn_tch::TchTensor>; $inputs] {
                saved.gradients(gradients, wanted)
            }
        }
    };
}
pub(crate) use composed_operation;
