//! What the long steps before training report while they run.

/// One report; sent a few times a second at most by tokenising, before and after by the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Another process builds what this one needs; nothing is reported until it is done.
    Waiting {
        /// What it builds.
        what: &'a str,
    },
    /// Text read to train a tokenizer.
    CountingWords {
        /// Bytes of text so far.
        bytes: u64,
    },
    /// A tokenizer is trained from the words counted.
    TrainingTokenizer {
        /// Pieces asked for.
        vocab_size: usize,
    },
    /// A source is tokenised into the cache.
    Tokenizing {
        /// Name of the source.
        source: &'a str,
        /// Documents so far.
        documents: u64,
        /// Tokens so far.
        tokens: u64,
        /// Bytes of the source's files so far.
        bytes: u64,
        /// Bytes of the source's files.
        total_bytes: u64,
    },
}

/// Where reports go.
pub type ProgressFn<'a> = &'a dyn Fn(Progress<'_>);
