//! A vocabulary split over ranks: which part is here, and how the ranks agree on sums.

use std::fmt::Debug;
use std::sync::Arc;

use crate::DeviceValues;

/// Ranks that hold equal parts of one vocabulary.
///
/// # Collective
/// Every rank of the group must make the same calls in the same order; all get the same bits.
pub trait VocabularyGroup: Debug + Send + Sync {
    /// Replaces every value by the largest over the ranks.
    fn max(&self, values: &mut [f32]);

    /// Replaces every value by the sum over the ranks.
    fn sum(&self, values: &mut [f32]);

    /// The same ranks where LibTorch has the values, if they agree there.
    fn on_devices(&self) -> Option<&dyn DeviceVocabularyGroup> {
        None
    }
}

/// A [`VocabularyGroup`] of values that stay where LibTorch has them, float32.
///
/// # Collective
/// As a [`VocabularyGroup`].
pub trait DeviceVocabularyGroup {
    /// Every value as the largest over the ranks.
    fn max(&self, values: &DeviceValues) -> DeviceValues;

    /// Every value as the sum over the ranks.
    fn sum(&self, values: &DeviceValues) -> DeviceValues;
}

/// The part of a vocabulary that a head holds.
#[derive(Debug, Clone)]
pub struct VocabularyShard {
    /// Number of the first id.
    pub first: usize,
    /// The ranks that hold the others.
    pub group: Arc<dyn VocabularyGroup>,
}

impl VocabularyShard {
    /// Where `id` stands among the `len` ids of this part; `None` elsewhere.
    pub(crate) fn local(&self, id: usize, len: usize) -> Option<usize> {
        id.checked_sub(self.first).filter(|&local| local < len)
    }
}
