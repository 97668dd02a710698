//! Hugging Face directories: T5, mT5 and Switch Transformers as transformers 4 and 5 store them.
//!
//! `config.rs` translates the architecture, `names.rs` the tensors; `import.rs` reads a directory,
//! `export.rs` writes one.

mod card;
mod config;
mod export;
mod fields;
mod import;
mod names;
mod transpose;

#[cfg(test)]
mod tests;

pub use crate::dtype::StoredDtype;
pub use export::{ExportOptions, ExportSummary, export, representable};
pub(crate) use import::HuggingFaceModel;

/// Version of transformers whose layout is written.
const TRANSFORMERS_VERSION: &str = "4.57.6";

const CONFIG: &str = "config.json";
const SINGLE_FILE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// The model classes of transformers that are known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    T5,
    Mt5,
    Switch,
}

impl Family {
    const ALL: [Self; 3] = [Self::T5, Self::Mt5, Self::Switch];

    /// `model_type` in `config.json`.
    fn model_type(self) -> &'static str {
        match self {
            Self::T5 => "t5",
            Self::Mt5 => "mt5",
            Self::Switch => "switch_transformers",
        }
    }

    /// Class that loads it.
    fn architecture(self) -> &'static str {
        match self {
            Self::T5 => "T5ForConditionalGeneration",
            Self::Mt5 => "MT5ForConditionalGeneration",
            Self::Switch => "SwitchTransformersForConditionalGeneration",
        }
    }
}
