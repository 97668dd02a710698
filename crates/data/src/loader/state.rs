//! Where in the data a run stands, as checkpoints keep it.

use serde::{Deserialize, Serialize};
use switchyard_config::plan::DataPlan;

use super::error::StateMismatch;

const FORMAT: u32 = 2;

/// Identity of one source within a [`DataState`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceState {
    /// Name of the source.
    pub name: String,
    /// Share in the mixture.
    pub weight: f64,
    /// Fingerprint of its token cache.
    pub fingerprint: String,
}

/// Everything that decides the batches of a run, and how many samples it has consumed.
///
/// Epoch and position follow from the number of samples; they are not stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataState {
    /// Version of this record.
    pub format: u32,
    /// Seed of the order and of the masks.
    pub seed: u64,
    /// SHA-256 of the tokenizer.
    pub tokenizer: String,
    /// Training sources in their order.
    pub sources: Vec<SourceState>,
    /// `data.mixture_temperature`.
    pub mixture_temperature: f64,
    /// `data.inputs_length`.
    pub inputs_length: usize,
    /// `data.targets_length`.
    pub targets_length: usize,
    /// `data.noise_density`.
    pub noise_density: f64,
    /// `data.mean_noise_span_length`.
    pub mean_noise_span_length: f64,
    /// Samples (rows) consumed since the beginning of the run.
    pub samples_consumed: u64,
}

impl DataState {
    /// The state of a run that has consumed nothing.
    pub(super) fn new(plan: &DataPlan, seed: u64, tokenizer: String, sources: Vec<SourceState>) -> Self {
        Self {
            format: FORMAT,
            seed,
            tokenizer,
            sources,
            mixture_temperature: plan.mixture_temperature,
            inputs_length: plan.inputs_length,
            targets_length: plan.targets_length,
            noise_density: plan.noise_density,
            mean_noise_span_length: plan.mean_noise_span_length,
            samples_consumed: 0,
        }
    }

    /// Checks that `saved`, from a checkpoint, was made with the same data as this state.
    ///
    /// Another `data.batch_rows` is fine: samples are numbered through the whole run, and it goes
    /// on behind the ones it has consumed. So are other paths to the same files, and of a single
    /// source another name, since only the random streams of a mixture are keyed by names.
    ///
    /// # Errors
    /// [`StateMismatch`] names the first thing that differs.
    pub fn check(&self, saved: &Self) -> Result<(), StateMismatch> {
        let (found, saved) = (self.facts(), saved.facts());
        // Values alone: the words may hold a name that makes no difference.
        match found.into_iter().zip(saved).find(|(found, saved)| found.1 != saved.1) {
            Some(((what, found), (_, saved))) => Err(StateMismatch { what, saved, found }),
            None => Ok(()),
        }
    }

    /// What decides the data, in words; equally many facts whenever all facts before are equal.
    fn facts(&self) -> Vec<(String, String)> {
        let plan = [
            ("the format of the data state", self.format.to_string()),
            ("seed", self.seed.to_string()),
            ("data.inputs_length", self.inputs_length.to_string()),
            ("data.targets_length", self.targets_length.to_string()),
            ("data.noise_density", self.noise_density.to_string()),
            ("data.mean_noise_span_length", self.mean_noise_span_length.to_string()),
            ("the SHA-256 of data.tokenizer", self.tokenizer.clone()),
            ("the number of data.sources", self.sources.len().to_string()),
        ];
        let mut facts: Vec<(String, String)> =
            plan.into_iter().map(|(what, value)| (what.to_owned(), value)).collect();
        let is_mixture = self.sources.len() > 1;
        if is_mixture {
            facts.push(("data.mixture_temperature".to_owned(), self.mixture_temperature.to_string()));
        }
        for (i, source) in self.sources.iter().enumerate() {
            if is_mixture {
                facts.push((format!("data.sources[{i}].name"), source.name.clone()));
                facts.push((format!("data.sources[{i}].weight"), source.weight.to_string()));
            }
            let what = format!("the fingerprint of the text of `{}`", source.name);
            facts.push((what, source.fingerprint.clone()));
        }
        facts
    }
}
