//! Text to token ids and back, with the ids T5 fixes.
//!
//! Owns loading, training and saving of Hugging Face tokenizers, the arithmetic of sentinels and
//! the filling of texts that hold them.
//! Does not read corpora and does not know the objective.

mod error;
mod files;
mod fill;
mod hygiene;
mod train;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

pub use error::TokenizerError;
pub use hygiene::sanitize;
pub use train::{TrainOptions, WordCounts, train};

/// Id of `<pad>`, also the first decoder input.
pub const PAD_ID: u32 = 0;
/// Id of `</s>`.
pub const EOS_ID: u32 = 1;
/// Id of `<unk>`.
pub const UNK_ID: u32 = 2;
/// First id that is neither of the three.
pub const FIRST_PIECE_ID: u32 = 3;

/// Texts longer than this are encoded in pieces, in bytes.
const MAX_ENCODED_BYTES: usize = 256 << 10;

/// A tokenizer of the T5 family.
///
/// The last ids are the sentinels: `<extra_id_k>` is `size - 1 - k`.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    path: PathBuf,
    json: Vec<u8>,
    sha256: String,
    size: usize,
    num_sentinels: usize,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("size", &self.size)
            .field("num_sentinels", &self.num_sentinels)
            .finish_non_exhaustive()
    }
}

/// Counts over encoded corpus text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncodeCounts {
    /// Tokens.
    pub tokens: u64,
    /// Tokens that are `<unk>`.
    pub unknown: u64,
    /// Control tokens spelled out in the text and split by [`sanitize`].
    pub control_text: u64,
    /// Control ids that normalisation made of other spellings; replaced by `<unk>`.
    pub control_ids: u64,
}

impl EncodeCounts {
    /// Sums two counts.
    pub fn plus(self, other: Self) -> Self {
        Self {
            tokens: self.tokens + other.tokens,
            unknown: self.unknown + other.unknown,
            control_text: self.control_text + other.control_text,
            control_ids: self.control_ids + other.control_ids,
        }
    }
}

impl Tokenizer {
    /// Loads a `tokenizer.json`, or the one inside a directory.
    ///
    /// # Errors
    /// The file is missing or malformed, or ids 0, 1, 2 are not `<pad>`, `</s>`, `<unk>`.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let file = if path.is_dir() { path.join(files::TOKENIZER_JSON) } else { path.to_path_buf() };
        if !file.exists() {
            return Err(TokenizerError::Missing { path: file });
        }
        let json = std::fs::read(&file).map_err(TokenizerError::io("read", &file))?;
        Self::from_json(json, file)
    }

    /// Reads the content of a `tokenizer.json`; `path` names it in errors.
    fn from_json(json: Vec<u8>, path: PathBuf) -> Result<Self, TokenizerError> {
        let malformed = |error: tokenizers::Error| TokenizerError::Malformed {
            path: path.clone(),
            message: error.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(malformed)?;
        inner.with_truncation(None).map_err(malformed)?;
        inner.with_padding(None);

        for (id, expected) in [(PAD_ID, "<pad>"), (EOS_ID, "</s>"), (UNK_ID, "<unk>")] {
            let found = inner.id_to_token(id).unwrap_or_else(|| "missing".to_owned());
            if found != expected {
                return Err(TokenizerError::SpecialToken { path, id, expected, found });
            }
        }
        let size = inner.get_vocab_size(true);
        let num_sentinels = (0..size).take_while(|&k| is_sentinel(&inner, size, k)).count();
        let sha256 = crate::durable::sha256_hex(&json);
        Ok(Self { inner, path, json, sha256, size, num_sentinels })
    }

    /// File it was loaded from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of its `tokenizer.json`, in hexadecimal.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// Number of ids, sentinels included.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Sentinels at the end of the ids.
    pub fn num_sentinels(&self) -> usize {
        self.num_sentinels
    }

    /// Id of sentinel `k` (from 0): `size - 1 - k`.
    pub fn sentinel(&self, k: usize) -> u32 {
        (self.size - 1 - k) as u32
    }

    /// Lowest sentinel id; every id from here to `size` is a sentinel.
    pub fn first_sentinel_id(&self) -> u32 {
        (self.size - self.num_sentinels) as u32
    }

    /// Whether `id` is a sentinel.
    pub fn is_sentinel(&self, id: u32) -> bool {
        id >= self.first_sentinel_id() && (id as usize) < self.size
    }

    /// Checks that there are `needed` sentinels.
    ///
    /// # Errors
    /// [`TokenizerError::TooFewSentinels`].
    pub fn require_sentinels(&self, needed: usize) -> Result<(), TokenizerError> {
        if needed <= self.num_sentinels {
            return Ok(());
        }
        let (path, found, last) = (self.path.clone(), self.num_sentinels, self.size - 1);
        Err(TokenizerError::TooFewSentinels { path, found, needed, last })
    }

    /// The piece of an id.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Ids of a text, without EOS. `<extra_id_k>` and the control tokens become their ids.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding = self.inner.encode_fast(text, false).map_err(|error| self.failed(&error))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of a prompt, EOS at the end, as transformers encodes it.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn encode_with_eos(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode(text)?;
        ids.push(EOS_ID);
        Ok(ids)
    }

    /// Ids of corpus documents, in parallel, without EOS and without control ids.
    ///
    /// Text is sanitised first, so the only special id that occurs is `<unk>`.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn encode_documents(
        &self,
        texts: &[String],
    ) -> Result<(Vec<Vec<u32>>, EncodeCounts), TokenizerError> {
        let encoded: Vec<(Vec<u32>, EncodeCounts)> =
            texts.par_iter().map(|text| self.encode_document(text)).collect::<Result<_, _>>()?;
        let counts = encoded.iter().fold(EncodeCounts::default(), |sum, (_, counts)| sum.plus(*counts));
        Ok((encoded.into_iter().map(|(ids, _)| ids).collect(), counts))
    }

    fn encode_document(&self, text: &str) -> Result<(Vec<u32>, EncodeCounts), TokenizerError> {
        let (text, control_text) = sanitize(text);
        let mut counts = EncodeCounts { control_text, ..EncodeCounts::default() };
        let mut ids = Vec::new();
        for part in parts(&text, MAX_ENCODED_BYTES) {
            ids.extend(self.encode(part)?);
        }
        for id in &mut ids {
            if *id < UNK_ID || self.is_sentinel(*id) {
                *id = UNK_ID;
                counts.control_ids += 1;
            }
            counts.unknown += u64::from(*id == UNK_ID);
        }
        counts.tokens = ids.len() as u64;
        Ok((ids, counts))
    }

    /// Text of ids; `skip_special` leaves out padding, EOS, `<unk>` and sentinels.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner.decode(ids, skip_special).map_err(|error| self.failed(&error))
    }

    /// Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into `dir`.
    ///
    /// transformers loads the directory as a `T5Tokenizer`.
    ///
    /// # Errors
    /// [`TokenizerError::Io`].
    pub fn save(&self, dir: &Path) -> Result<(), TokenizerError> {
        files::save(self, dir)
    }

    /// Whether `dir` holds every file that [`Self::save`] writes.
    pub(crate) fn is_saved_in(dir: &Path) -> bool {
        files::are_in(dir)
    }

    fn failed(&self, error: &tokenizers::Error) -> TokenizerError {
        TokenizerError::Failed { path: self.path.clone(), message: error.to_string() }
    }
}

/// Whether the `k`-th id from the end is sentinel `k`; mT5 spells its sentinels as word beginnings.
fn is_sentinel(inner: &tokenizers::Tokenizer, size: usize, k: usize) -> bool {
    let token = inner.id_to_token((size - 1 - k) as u32);
    token.is_some_and(|token| token.trim_start_matches('▁') == files::sentinel_name(k))
}

/// Cuts `text` at whitespace into parts of about `limit` bytes; words stay whole.
fn parts(text: &str, limit: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let space = (limit..rest.len()).find(|&at| rest.as_bytes()[at].is_ascii_whitespace());
        let (part, tail) = rest.split_at(space.unwrap_or(rest.len()));
        rest = tail;
        Some(part)
    })
}
