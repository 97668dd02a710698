//! The arrays of a fixture, and every check of those that a computation starts from.
//!
//! The model's operations take fitting shapes and ids within the vocabulary for granted, so all
//! inputs are checked here before the first of them runs. Compares and computes nothing.

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor};
use switchyard_config::ModelConfig;
use switchyard_kernels::int_tensor;
use switchyard_model::Seq2SeqBatch;

/// Arrays that are read and have no counterpart to be compared with.
pub(super) const INPUTS: [&str; 5] =
    ["input_ids", "attention_mask", "labels", "alt_attention_mask", "decoder_attention_mask"];

/// The label of a position without loss.
const IGNORED: i32 = -100;

/// Numbers of any shape, row-major; integers exact.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f64>,
    /// Ids, choices and masks: must be equal.
    pub discrete: bool,
}

impl Array {
    /// Whether there are as many values as the shape says.
    pub(super) fn is_complete(&self) -> bool {
        let size = self.shape.iter().try_fold(1_usize, |size, &dim| size.checked_mul(dim));
        size == Some(self.values.len())
    }
}

/// Arrays by name.
pub type Arrays = BTreeMap<String, Array>;

/// A fixture without the arrays that every comparison starts from.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FixtureError {
    /// An input is missing.
    #[error("the fixture has no array `{name}`; it needs input_ids, attention_mask and labels")]
    MissingInput {
        /// Its name.
        name: &'static str,
    },
    /// Inputs do not fit each other or the model.
    #[error("fixture array `{name}` {problem}")]
    BadInput {
        /// Its name.
        name: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// Everything of a fixture that decides what is computed.
pub(super) struct Inputs {
    /// `input_ids`, `attention_mask` and `labels`.
    pub(super) batch: Seq2SeqBatch,
    /// `alt_attention_mask`, another mask of `input_ids`.
    pub(super) alt_input_mask: Option<Tensor<2, Int>>,
    /// `decoder_attention_mask`, a mask of the decoder's inputs.
    pub(super) decoder_mask: Option<Tensor<2, Int>>,
    /// Tokens of each row of `greedy_ids`, without the start token.
    pub(super) greedy_steps: Option<usize>,
    /// The same of `greedy_nocache_ids`.
    pub(super) uncached_greedy_steps: Option<usize>,
}

impl Inputs {
    pub(super) fn new(fixture: &Arrays, config: &ModelConfig, device: &Device) -> Result<Self, FixtureError> {
        let batch = fixture_batch(fixture, config, device)?;
        let inputs = ("input_ids", batch.input_mask.dims());
        let targets = ("labels", [batch.rows, batch.weights.dims()[0] / batch.rows]);
        let mask = |name, (of, shape)| {
            let table = Table::find(fixture, name)?;
            table.map(|table| table.mask(of, shape, device)).transpose()
        };
        let steps = |name| {
            let table = Table::find(fixture, name)?;
            table.map(|table| table.greedy_steps(batch.rows, config)).transpose()
        };
        Ok(Self {
            alt_input_mask: mask("alt_attention_mask", inputs)?,
            decoder_mask: mask("decoder_attention_mask", targets)?,
            greedy_steps: steps("greedy_ids")?,
            uncached_greedy_steps: steps("greedy_nocache_ids")?,
            batch,
        })
    }
}

/// The inputs of a fixture as a batch; labels of -100 carry no loss.
///
/// # Errors
/// [`FixtureError`] for inputs that are missing, of shapes that do not fit each other, or with values
/// other than ids of the vocabulary and masks of 0 and 1.
pub fn fixture_batch(
    fixture: &Arrays,
    config: &ModelConfig,
    device: &Device,
) -> Result<Seq2SeqBatch, FixtureError> {
    let inputs = Table::required(fixture, "input_ids")?;
    let mask = Table::required(fixture, "attention_mask")?;
    let targets = Table::required(fixture, "labels")?;
    let [rows, _] = inputs.shape;
    if targets.shape[0] != rows {
        return Err(targets.wrong(format!("has {} rows and input_ids has {rows}", targets.shape[0])));
    }
    let input_ids = inputs.ids(config)?;
    let input_mask = mask.mask("input_ids", inputs.shape, device)?;
    let labels = targets.labels(config)?;

    let pad = config.pad_token_id as i32;
    let target_ids: Vec<i32> = labels.iter().map(|&id| if id == IGNORED { pad } else { id }).collect();
    let length = targets.shape[1];
    let mut decoder_ids = vec![pad; target_ids.len()];
    for (to, from) in decoder_ids.chunks_mut(length).zip(target_ids.chunks(length)) {
        to[1..].copy_from_slice(&from[..length - 1]);
    }
    let mut batch = Seq2SeqBatch::from_ids(rows, input_ids, decoder_ids, target_ids, pad, device);
    batch.input_mask = input_mask;
    let weights: Vec<f32> = labels.iter().map(|&id| if id == IGNORED { 0.0 } else { 1.0 }).collect();
    batch.weights = Tensor::from_data(weights.as_slice(), device);
    Ok(batch)
}

/// An array of two dims, neither of them 0, with as many values as its shape says.
struct Table<'a> {
    name: &'static str,
    shape: [usize; 2],
    values: &'a [f64],
}

impl<'a> Table<'a> {
    fn find(fixture: &'a Arrays, name: &'static str) -> Result<Option<Self>, FixtureError> {
        let Some(array) = fixture.get(name) else { return Ok(None) };
        let bad = |problem| FixtureError::BadInput { name, problem };
        let &[rows, length] = &array.shape[..] else {
            return Err(bad(format!("has shape {:?}; expected [rows, length]", array.shape)));
        };
        if rows == 0 || length == 0 {
            return Err(bad(format!("has shape {:?}; expected at least one value", array.shape)));
        }
        if !array.is_complete() {
            return Err(bad(format!("has shape {:?} and {} values", array.shape, array.values.len())));
        }
        Ok(Some(Self { name, shape: [rows, length], values: &array.values }))
    }

    fn required(fixture: &'a Arrays, name: &'static str) -> Result<Self, FixtureError> {
        Self::find(fixture, name)?.ok_or(FixtureError::MissingInput { name })
    }

    fn wrong(&self, problem: String) -> FixtureError {
        FixtureError::BadInput { name: self.name, problem }
    }

    /// All values, whole and `allowed`; `expected` says what is.
    fn integers(&self, expected: &str, allowed: impl Fn(f64) -> bool) -> Result<Vec<i32>, FixtureError> {
        let [_, length] = self.shape;
        // The fraction of NaN and of infinities is NaN.
        match self.values.iter().position(|&value| value.fract() != 0.0 || !allowed(value)) {
            Some(at) => Err(self.wrong(format!(
                "holds {} in row {}, column {}; expected {expected}",
                self.values[at],
                at / length,
                at % length
            ))),
            None => Ok(self.values.iter().map(|&value| value as i32).collect()),
        }
    }

    fn ids(&self, config: &ModelConfig) -> Result<Vec<i32>, FixtureError> {
        let vocabulary = 0.0..config.vocab_size as f64;
        let expected = format!("ids of the model's vocabulary, 0 to {}", config.vocab_size - 1);
        self.integers(&expected, |id| vocabulary.contains(&id))
    }

    /// Ids, or [`IGNORED`] but not everywhere: the loss is a mean.
    fn labels(&self, config: &ModelConfig) -> Result<Vec<i32>, FixtureError> {
        let vocabulary = 0.0..config.vocab_size as f64;
        let expected = format!("{IGNORED} or ids of the model's vocabulary, 0 to {}", config.vocab_size - 1);
        let labels = self.integers(&expected, |id| id == f64::from(IGNORED) || vocabulary.contains(&id))?;
        if labels.iter().all(|&id| id == IGNORED) {
            return Err(self.wrong(format!("holds nothing but {IGNORED}; expected a target")));
        }
        Ok(labels)
    }

    /// Zeros and ones, of the same shape as the array `of`.
    fn mask(&self, of: &str, shape: [usize; 2], device: &Device) -> Result<Tensor<2, Int>, FixtureError> {
        if self.shape != shape {
            return Err(self.wrong(format!("has shape {:?}; expected {shape:?}, as {of} has", self.shape)));
        }
        let mask = self.integers("0 or 1", |value| value == 0.0 || value == 1.0)?;
        Ok(int_tensor(mask, shape, device))
    }

    /// How many tokens follow the start token.
    fn greedy_steps(&self, rows: usize, config: &ModelConfig) -> Result<usize, FixtureError> {
        let [found, length] = self.shape;
        if found != rows {
            return Err(self.wrong(format!("has {found} rows and input_ids has {rows}")));
        }
        if length < 2 {
            return Err(self.wrong(format!(
                "has shape {:?}; expected the start token of each row and at least one more",
                self.shape
            )));
        }
        self.ids(config)?;
        Ok(length - 1)
    }
}
