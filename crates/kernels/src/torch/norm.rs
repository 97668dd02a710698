//! [`crate::rms_norm`].

use tch::Tensor;

use crate::norm::RmsNorm;
use crate::torch::composed::composed_operation;
use crate::torch::wide;

impl RmsNorm {
    fn composed(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let values = wide(x);
        let inverse_rms =
            (values.square().mean_dim([-1_i64].as_slice(), true, None) + f64::from(self.epsilon)).rsqrt();
        (values * inverse_rms * wide(weight)).to_kind(x.kind())
    }
}

composed_operation!(RmsNorm, 2, 1, false, |norm, [x, weight]| [norm.composed(x, weight)]);
composed_operation!(RmsNorm, 2, 2, true, |norm, [x, weight]| [x.shallow_clone(), norm.composed(x, weight)]);
