//! The files of a tokenizer directory, as transformers reads them.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{EOS_ID, PAD_ID, Tokenizer, TokenizerError, UNK_ID};
use crate::durable;

pub(super) const TOKENIZER_JSON: &str = "tokenizer.json";
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// Texts longer than this make transformers warn.
const MODEL_MAX_LENGTH: usize = 512;

pub(super) fn sentinel_name(k: usize) -> String {
    format!("<extra_id_{k}>")
}

/// Whether `dir` holds every file that [`save`] writes.
pub(super) fn are_in(dir: &Path) -> bool {
    [TOKENIZER_JSON, TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP].iter().all(|name| dir.join(name).is_file())
}

pub(super) fn save(tokenizer: &Tokenizer, dir: &Path) -> Result<(), TokenizerError> {
    std::fs::create_dir_all(dir).map_err(TokenizerError::io("create", dir))?;
    let write = |name: &str, bytes: &[u8]| {
        let path = dir.join(name);
        durable::write(&path, bytes).map_err(TokenizerError::io("write", path))
    };
    write(TOKENIZER_JSON, &tokenizer.json)?;
    write(TOKENIZER_CONFIG, pretty(&tokenizer_config(tokenizer)).as_bytes())?;
    write(SPECIAL_TOKENS_MAP, pretty(&special_tokens_map(tokenizer)).as_bytes())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Sentinels in the spelling transformers looks for; mT5's are ordinary pieces to it.
fn sentinel_names(tokenizer: &Tokenizer) -> Vec<String> {
    let names = (0..tokenizer.num_sentinels).map(sentinel_name);
    names.filter(|name| tokenizer.inner.token_to_id(name).is_some()).collect()
}

fn added_token(content: &str) -> Value {
    json!({
        "content": content, "lstrip": false, "normalized": false, "rstrip": false,
        "single_word": false, "special": true,
    })
}

/// `add_prefix_space` is absent on purpose: with it transformers 4 asks for a `spiece.model`.
fn tokenizer_config(tokenizer: &Tokenizer) -> Value {
    let sentinels = sentinel_names(tokenizer);
    let mut decoder = Map::new();
    for (id, token) in [(PAD_ID, "<pad>"), (EOS_ID, "</s>"), (UNK_ID, "<unk>")] {
        decoder.insert(id.to_string(), added_token(token));
    }
    for k in (0..sentinels.len()).rev() {
        decoder.insert(tokenizer.sentinel(k).to_string(), added_token(&sentinels[k]));
    }
    json!({
        "added_tokens_decoder": decoder,
        "additional_special_tokens": sentinels,
        "clean_up_tokenization_spaces": false,
        "eos_token": "</s>",
        "extra_ids": sentinels.len(),
        "legacy": true,
        "model_max_length": MODEL_MAX_LENGTH,
        "pad_token": "<pad>",
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    })
}

fn special_tokens_map(tokenizer: &Tokenizer) -> Value {
    json!({
        "additional_special_tokens": sentinel_names(tokenizer),
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    })
}
