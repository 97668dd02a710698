//! Putting what a model wrote for each sentinel back into the text that it read.

use std::collections::HashMap;

use super::files::sentinel_name;
use super::{EOS_ID, Tokenizer, TokenizerError};

impl Tokenizer {
    /// `prompt` with every `<extra_id_k>` replaced by what `output` holds behind sentinel `k`.
    ///
    /// `output` is a decoder's: sentinel, words, sentinel, words, up to EOS. A sentinel that it
    /// does not name, or names without words, stays as it is.
    ///
    /// # Errors
    /// [`TokenizerError::Failed`].
    pub fn fill(&self, prompt: &str, output: &[u32]) -> Result<String, TokenizerError> {
        let mut filled = prompt.to_owned();
        for (sentinel, ids) in self.spans(output) {
            let words = self.decode(&ids, true)?;
            let words = words.trim();
            if !words.is_empty() {
                filled = filled.replace(&sentinel_name(sentinel), words);
            }
        }
        Ok(filled)
    }

    /// Ids behind the first occurrence of each sentinel.
    fn spans(&self, output: &[u32]) -> HashMap<usize, Vec<u32>> {
        let mut spans = HashMap::new();
        let mut current = None;
        for &id in output.iter().take_while(|&&id| id != EOS_ID) {
            if self.is_sentinel(id) {
                let sentinel = self.size - 1 - id as usize;
                current = (!spans.contains_key(&sentinel)).then_some(sentinel);
                spans.entry(sentinel).or_insert_with(Vec::new);
            } else if let Some(ids) = current.and_then(|sentinel| spans.get_mut(&sentinel)) {
                ids.push(id);
            }
        }
        spans
    }
}
