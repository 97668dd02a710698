//! The first failure of a step: operations inside automatic differentiation cannot return one.

use std::sync::{Arc, OnceLock};

use switchyard_comm::CommError;

/// Keeps the first error of the operations of a mesh until the step looks at it.
///
/// After an error communicators refuse everything, so what is computed from then on is meaningless
/// but ends soon.
#[derive(Debug, Clone, Default)]
pub struct Failure(Arc<OnceLock<CommError>>);

impl Failure {
    /// The value of `outcome`, or `otherwise` with the error kept.
    pub fn keep<T>(&self, outcome: Result<T, CommError>, otherwise: impl FnOnce() -> T) -> T {
        outcome.unwrap_or_else(|error| {
            // Only the first tells the cause.
            let _ = self.0.set(error);
            otherwise()
        })
    }

    /// Whether everything went well so far.
    ///
    /// # Errors
    /// The first error that was kept.
    pub fn check(&self) -> Result<(), CommError> {
        self.0.get().map_or(Ok(()), |error| Err(error.clone()))
    }
}
