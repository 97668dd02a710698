//! Writes a Hugging Face directory, a band of one tensor in memory at a time.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use switchyard_config::ModelConfig;
use switchyard_config::partition::Part;
use switchyard_config::plan::{RoutingConfig, RoutingSemantics};

use super::names::{Translation, table};
use super::transpose::transpose;
use super::{CONFIG, Family, INDEX, SINGLE_FILE, StoredDtype, card, config};
use crate::error::CheckpointError;
use crate::files::{PendingDirectory, copy_synced, write_json, write_synced};
use crate::shard::{ShardWriter, Spec};
use crate::tensors::{TensorSource, check_parameters};

/// Values that are read at once; a row or column that is longer is read whole.
const BAND: usize = 1 << 21;

/// How a model is exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportOptions {
    /// Number format of every tensor.
    pub dtype: StoredDtype,
    /// Most bytes of tensors in one file, a larger tensor apart; one file for all when `None`.
    pub max_shard_bytes: Option<u64>,
    /// Tokens of a row for which the fixed `expert_capacity` of transformers is computed.
    ///
    /// transformers gives every expert the same number of slots in each row, whatever the row's
    /// length. With the paper's semantics that integer is the capacity of one row of this many
    /// tokens under the evaluation capacity factor; a model with semantics `hf` keeps its own.
    pub row_tokens: usize,
    /// Tokenizer files to copy in.
    pub tokenizer_files: Vec<PathBuf>,
}

/// What was exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSummary {
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// Tensors on disk; each expert's matrices count.
    pub num_tensors: usize,
    /// Values in all tensors.
    pub num_parameters: u64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Files of tensors, in order.
    pub shards: Vec<String>,
    /// Slots of an expert in each row; `None` for a dense model.
    pub expert_capacity: Option<usize>,
}

/// Whether transformers can compute what `model` computes.
///
/// # Errors
/// [`CheckpointError::NotRepresentable`] names the first part that it cannot, and the mend.
pub fn representable(model: &ModelConfig, routing: &RoutingConfig) -> Result<(), CheckpointError> {
    config::representable(model, routing).map(|_| ())
}

/// Writes the parameters of `source` as a Hugging Face directory at `out`, whole or not at all.
///
/// # Errors
/// [`CheckpointError::NotRepresentable`] names what transformers cannot do, [`CheckpointError::Exists`]
/// is returned for an `out` that is not empty, [`CheckpointError::WrongParameters`] lists all tensors
/// of `source` that are missing, have another shape or would be left over, and
/// [`CheckpointError::Refused`] names a tensor that `dtype` cannot hold.
pub fn export(
    source: &dyn TensorSource,
    model: &ModelConfig,
    routing: &RoutingConfig,
    options: &ExportOptions,
    out: &Path,
) -> Result<ExportSummary, CheckpointError> {
    let family = config::representable(model, routing)?;
    let expert_capacity = expert_capacity(family, model, routing, options.row_tokens)?;
    refuse_existing(out)?;
    check_parameters(source, model)?;
    let pending = PendingDirectory::new(out)?;
    let directory = pending.path();
    for file in &options.tokenizer_files {
        let name = file.file_name().ok_or_else(|| CheckpointError::bad(file, "is not a file"))?;
        copy_synced(file, &directory.join(name))?;
    }
    let table = table(family, model);
    let shards = Shards::plan(&table, options);
    let summary = shards.summary(family, expert_capacity, options.dtype);
    if let Some(index) = shards.index(&summary) {
        write_json(&directory.join(INDEX), &index)?;
    }
    shards.write(source, &table, options.dtype, directory)?;
    let fields = config::write(family, model, routing, expert_capacity, options.dtype);
    write_json(&directory.join(CONFIG), &fields)?;
    write_json(&directory.join("generation_config.json"), &config::generation(model))?;
    let card = card::write(model, routing, options, &summary);
    write_synced(&directory.join("README.md"), card.as_bytes())?;
    pending.commit()?;
    Ok(summary)
}

/// The fixed capacity of a sparse model; see [`ExportOptions::row_tokens`].
fn expert_capacity(
    family: Family,
    model: &ModelConfig,
    routing: &RoutingConfig,
    row_tokens: usize,
) -> Result<Option<usize>, CheckpointError> {
    match (family, routing.semantics) {
        (Family::T5 | Family::Mt5, _) => Ok(None),
        (Family::Switch, RoutingSemantics::Hf) => Ok(Some(routing.expert_capacity)),
        (Family::Switch, RoutingSemantics::Paper) if row_tokens == 0 => Err(CheckpointError::NoRowTokens),
        (Family::Switch, RoutingSemantics::Paper) => {
            Ok(Some(routing.capacity(row_tokens, model.num_experts, false)))
        }
    }
}

fn refuse_existing(out: &Path) -> Result<(), CheckpointError> {
    let taken = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => match error.kind() {
            std::io::ErrorKind::NotFound => false,
            std::io::ErrorKind::NotADirectory => true,
            _ => return Err(CheckpointError::io("list", out)(error)),
        },
    };
    if taken { Err(CheckpointError::Exists { path: out.to_owned() }) } else { Ok(()) }
}

/// Which tensors go into which file.
struct Shards {
    files: Vec<(String, Vec<Spec>)>,
}

impl Shards {
    /// Fills files in the order of the table.
    fn plan(table: &[Translation], options: &ExportOptions) -> Self {
        let most = options.max_shard_bytes.unwrap_or(u64::MAX);
        let (mut groups, mut group, mut filled) = (Vec::new(), Vec::new(), 0);
        for entry in table {
            let bytes = (entry.piece_len() * options.dtype.size()) as u64;
            for name in &entry.names {
                if filled > 0 && filled + bytes > most {
                    groups.push(std::mem::take(&mut group));
                    filled = 0;
                }
                filled += bytes;
                group.push((name.clone(), entry.foreign_shape()));
            }
        }
        groups.push(group);
        let count = groups.len();
        let name = |i: usize| match count {
            1 => SINGLE_FILE.to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        Self { files: groups.into_iter().enumerate().map(|(i, group)| (name(i), group)).collect() }
    }

    fn summary(&self, family: Family, expert_capacity: Option<usize>, dtype: StoredDtype) -> ExportSummary {
        let tensors = || self.files.iter().flat_map(|(_, tensors)| tensors);
        let num_parameters: u64 = tensors().map(|(_, shape)| shape.iter().product::<usize>() as u64).sum();
        ExportSummary {
            model_type: family.model_type(),
            num_tensors: tensors().count(),
            num_parameters,
            tensor_bytes: num_parameters * dtype.size() as u64,
            shards: self.files.iter().map(|(file, _)| file.clone()).collect(),
            expert_capacity,
        }
    }

    /// `model.safetensors.index.json`; none for a single file.
    fn index(&self, summary: &ExportSummary) -> Option<Value> {
        if self.files.len() == 1 {
            return None;
        }
        let place = |file: &str, name: &str| (name.to_owned(), Value::from(file));
        let places = self.files.iter().flat_map(|(f, tensors)| tensors.iter().map(move |(n, _)| place(f, n)));
        let mut weight_map: Map<String, Value> = places.collect();
        weight_map.sort_keys();
        Some(json!({
            "metadata": {"total_parameters": summary.num_parameters, "total_size": summary.tensor_bytes},
            "weight_map": weight_map,
        }))
    }

    /// Writes every tensor of `table`, turned and unstacked.
    fn write(
        self,
        source: &dyn TensorSource,
        table: &[Translation],
        dtype: StoredDtype,
        directory: &Path,
    ) -> Result<(), CheckpointError> {
        let mut out = Files { directory, dtype, remaining: self.files.into(), current: None };
        let mut turned = Vec::new();
        for entry in table {
            for (index, name) in entry.names.iter().enumerate() {
                for band in bands(entry, index) {
                    let values = source.read_part(&entry.logical.name, &band)?;
                    if !entry.transposed {
                        out.write(name, &values)?;
                        continue;
                    }
                    let columns = band.shape[band.shape.len() - 1];
                    turned.resize(values.len(), 0.0);
                    transpose(&values, values.len() / columns, columns, &mut turned);
                    out.write(name, &turned)?;
                }
            }
        }
        out.finish()
    }
}

/// The piece called `names[index]` cut into parts that follow each other in the file: of a matrix
/// that is turned, columns.
fn bands(entry: &Translation, index: usize) -> impl Iterator<Item = Part> {
    let piece = entry.piece(index);
    let last = piece.shape.len() - 1;
    let axis = if entry.transposed { last } else { 0 };
    let length = piece.shape[axis];
    let step = (BAND * length / entry.piece_len().max(1)).clamp(1, length.max(1));
    (0..length).step_by(step).map(move |start| {
        let mut band = piece.clone();
        band.start[axis] = start;
        band.shape[axis] = step.min(length - start);
        band
    })
}

/// Writes tensors to one file after the other.
struct Files<'a> {
    directory: &'a Path,
    dtype: StoredDtype,
    remaining: VecDeque<(String, Vec<Spec>)>,
    current: Option<ShardWriter>,
}

impl Files<'_> {
    fn write(&mut self, name: &str, values: &[f32]) -> Result<(), CheckpointError> {
        let mut writer = match self.current.take() {
            Some(writer) if !writer.is_complete() => writer,
            complete => {
                complete.map(ShardWriter::finish).transpose()?;
                let (file, tensors) = self.remaining.pop_front().unwrap_or_default();
                ShardWriter::create(&self.directory.join(file), &tensors, self.dtype)?
            }
        };
        writer.write(name, values)?;
        self.current = Some(writer);
        Ok(())
    }

    fn finish(self) -> Result<(), CheckpointError> {
        self.current.map(ShardWriter::finish).transpose().map(drop)
    }
}
