//! Training of a Unigram vocabulary that comes out the same every time.
//!
//! The trainer of the `tokenizers` crate keeps every character it sees, orders ties by its hash
//! maps and sums in an order that follows the number of threads. Here rare characters are left
//! out beforehand, sums always associate alike, and the result is put into a canonical order.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use rayon::prelude::*;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::models::unigram::{Unigram, UnigramTrainer};
use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{NFKC, Nmt, Replace, Sequence, Strip};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, NormalizedString, Normalizer};

use super::files::sentinel_name;
use super::{EOS_ID, FIRST_PIECE_ID, Tokenizer, TokenizerError, UNK_ID, sanitize};

/// Special tokens in the order of their ids.
const SPECIAL_TOKENS: [&str; FIRST_PIECE_ID as usize] = ["<pad>", "</s>", "<unk>"];

/// Marks the beginning of a word.
const WORD_START: char = '▁';

/// Words longer than this are left out of training, in bytes: the lattice of a word grows with it.
const MAX_WORD_BYTES: usize = 512;

/// Distance between the scores of characters too rare to be scored, as in SentencePiece.
const RARE_SCORE_STEP: f64 = 1e-4;

/// Sums of two parts associate in one way only, so training always runs on two threads.
const THREADS: usize = 2;

/// Size of a vocabulary and which characters it covers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainOptions {
    /// Pieces, `<pad>`, `</s>` and `<unk>` included; a small text may give fewer.
    pub vocab_size: usize,
    /// Sentinels behind the pieces.
    pub num_sentinels: usize,
    /// Share of character occurrences that must be covered; rarer characters become `<unk>`.
    pub character_coverage: f64,
}

impl TrainOptions {
    /// T5's settings for a vocabulary of `vocab_size` pieces.
    pub fn new(vocab_size: usize) -> Self {
        Self { vocab_size, num_sentinels: 100, character_coverage: 0.9995 }
    }
}

/// How often each word occurs in a text.
#[derive(Debug, Clone, Default)]
pub struct WordCounts {
    words: HashMap<String, u64>,
    bytes: u64,
}

impl WordCounts {
    /// Counts the words of a document.
    pub fn add(&mut self, text: &str) {
        let (clean, _) = sanitize(text);
        self.bytes += text.len() as u64;
        for word in clean.split_whitespace() {
            match self.words.get_mut(word) {
                Some(count) => *count += 1,
                None => {
                    self.words.insert(word.to_owned(), 1);
                }
            }
        }
    }

    /// Bytes of text counted so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Words as the normalizer leaves them, each with [`WORD_START`], sorted.
    fn normalized(&self, normalizer: &Sequence) -> Result<Vec<(String, u64)>, TokenizerError> {
        let parts: Vec<Vec<(String, u64)>> = self
            .words
            .par_iter()
            .map(|(word, &count)| {
                let plain = word.bytes().all(|byte| byte.is_ascii_graphic());
                let text = if plain { word.clone() } else { normalize(normalizer, word)? };
                Ok(text.split_whitespace().map(|word| (format!("{WORD_START}{word}"), count)).collect())
            })
            .collect::<Result<_, TokenizerError>>()?;

        let mut words: Vec<(String, u64)> = parts.into_iter().flatten().collect();
        words.sort_unstable();
        words.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            kept.1 += if same { next.1 } else { 0 };
            same
        });
        words.retain(|(word, _)| word.len() <= MAX_WORD_BYTES);
        Ok(words)
    }
}

/// Trains a Unigram tokenizer; the same words and options give the same file on every machine.
///
/// # Errors
/// No words, or a vocabulary with no room for the characters of the text.
///
/// # Source
/// Kudo, "Subword Regularization", 2018 (arXiv:1804.10959); settings as SentencePiece for T5.
pub fn train(words: &WordCounts, options: &TrainOptions) -> Result<Tokenizer, TokenizerError> {
    let normalizer = normalizer()?;
    let mut words = words.normalized(&normalizer)?;
    let characters = covered_characters(&words, options.character_coverage);
    words.retain(|(word, _)| word.chars().all(|c| characters.contains(&c)));
    if words.is_empty() {
        return Err(TokenizerError::NoText);
    }
    let required: HashSet<char> = words.iter().flat_map(|(word, _)| word.chars()).collect();
    if required.len() + SPECIAL_TOKENS.len() >= options.vocab_size {
        return Err(TokenizerError::VocabularyTooSmall {
            vocab_size: options.vocab_size,
            characters: required.len(),
            least: required.len() + SPECIAL_TOKENS.len() + 1,
        });
    }

    let pieces = canonical(train_pieces(words, options.vocab_size)?);
    let json = assemble(pieces, normalizer, options.num_sentinels)?;
    Tokenizer::from_json(json.into_bytes(), PathBuf::from("trained tokenizer"))
}

/// Most frequent characters that together make up `coverage` of all occurrences.
fn covered_characters(words: &[(String, u64)], coverage: f64) -> HashSet<char> {
    let mut counts: HashMap<char, u64> = HashMap::new();
    for (word, count) in words {
        for character in word.chars() {
            *counts.entry(character).or_default() += count;
        }
    }
    let total: u64 = counts.values().sum();
    let mut by_count: Vec<(char, u64)> = counts.into_iter().collect();
    by_count.sort_unstable_by_key(|&(character, count)| (Reverse(count), character));

    let mut covered = 0;
    let enough = |covered: u64| covered as f64 >= coverage * total as f64;
    let kept = by_count.into_iter().take_while(|(_, count)| {
        let needed = !enough(covered);
        covered += count;
        needed
    });
    kept.map(|(character, _)| character).collect()
}

/// Pieces and scores as the trainer gives them, special tokens left out.
fn train_pieces(words: Vec<(String, u64)>, vocab_size: usize) -> Result<Vec<(String, f64)>, TokenizerError> {
    let training = |message: String| TokenizerError::Training { message };
    let trainer = UnigramTrainer::builder()
        .show_progress(false)
        .vocab_size(u32::try_from(vocab_size).unwrap_or(u32::MAX))
        .special_tokens(SPECIAL_TOKENS.map(|token| AddedToken::from(token, true)).to_vec())
        .unk_token(Some(SPECIAL_TOKENS[UNK_ID as usize].to_owned()))
        .build()
        .map_err(|error| training(error.to_string()))?;
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(THREADS)
        .build()
        .map_err(|error| training(error.to_string()))?;

    let sentences = even(words);
    let mut model = Unigram::default();
    pool.install(|| trainer.do_train(sentences, &mut model)).map_err(|error| training(error.to_string()))?;
    Ok(model.iter().skip(SPECIAL_TOKENS.len()).cloned().collect())
}

/// Makes the number of words even, so that the trainer cuts them in exactly [`THREADS`] parts.
fn even(words: Vec<(String, u64)>) -> Vec<(String, u32)> {
    let mut sentences: Vec<(String, u32)> =
        words.into_iter().map(|(word, count)| (word, u32::try_from(count).unwrap_or(u32::MAX))).collect();
    if !sentences.len().is_multiple_of(THREADS) {
        let most_frequent = sentences.iter_mut().reduce(|a, b| if b.1 > a.1 { b } else { a });
        if let Some((word, count)) = most_frequent {
            let half = (word.clone(), *count / 2);
            *count -= half.1;
            sentences.push(half);
        }
    }
    sentences
}

/// Pieces in an order that does not depend on hash maps, scores rounded to six decimals.
fn canonical(mut pieces: Vec<(String, f64)>) -> Vec<(String, f64)> {
    let lowest = pieces.iter().map(|(_, score)| *score).fold(f64::INFINITY, f64::min);
    let mut rare = rare_characters(&pieces, lowest);
    let mut scores: Vec<f64> = rare.iter().map(|&at| pieces[at].1).collect();
    scores.sort_unstable_by(f64::total_cmp);
    rare.sort_unstable_by(|&a, &b| pieces[a].0.cmp(&pieces[b].0));
    for (&at, score) in rare.iter().zip(scores) {
        pieces[at].1 = score;
    }
    for (_, score) in &mut pieces {
        *score = (*score * 1e6).round() / 1e6;
    }
    pieces.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    pieces
}

/// Characters that the trainer appended in the order of a hash map, recognised by their scores:
/// the lowest score and, in steps, above it.
fn rare_characters(pieces: &[(String, f64)], lowest: f64) -> Vec<usize> {
    let singles: Vec<usize> = (0..pieces.len()).filter(|&at| pieces[at].0.chars().nth(1).is_none()).collect();
    let mut rare = Vec::new();
    let mut penalty = 0.0;
    loop {
        let before = rare.len();
        rare.extend(singles.iter().copied().filter(|&at| pieces[at].1 == lowest + penalty));
        if rare.len() == before {
            return rare;
        }
        penalty += RARE_SCORE_STEP;
    }
}

fn normalizer() -> Result<Sequence, TokenizerError> {
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".to_owned()), " ")
        .map_err(|error| TokenizerError::Training { message: error.to_string() })?;
    Ok(Sequence::new(vec![Nmt.into(), NFKC.into(), spaces.into(), Strip::new(true, true).into()]))
}

fn normalize(normalizer: &Sequence, text: &str) -> Result<String, TokenizerError> {
    let mut normalized = NormalizedString::from(text);
    normalizer
        .normalize(&mut normalized)
        .map_err(|error| TokenizerError::Training { message: error.to_string() })?;
    Ok(normalized.get().to_owned())
}

/// The `tokenizer.json` around trained pieces.
fn assemble(
    pieces: Vec<(String, f64)>,
    normalizer: Sequence,
    num_sentinels: usize,
) -> Result<String, TokenizerError> {
    let training = |error: tokenizers::Error| TokenizerError::Training { message: error.to_string() };
    let sentinels: Vec<String> = (0..num_sentinels).rev().map(sentinel_name).collect();
    let unscored = |name: &str| (name.to_owned(), 0.0);
    let vocabulary = SPECIAL_TOKENS
        .into_iter()
        .map(unscored)
        .chain(pieces)
        .chain(sentinels.iter().map(|name| unscored(name)))
        .collect();
    let model = Unigram::from(vocabulary, Some(UNK_ID as usize), false).map_err(training)?;

    let mut tokenizer = tokenizers::Tokenizer::new(model);
    tokenizer.with_normalizer(Some(normalizer)).map_err(training)?;
    let metaspace = Metaspace::new(WORD_START, PrependScheme::Always, true);
    tokenizer.with_pre_tokenizer(Some(metaspace.clone()));
    tokenizer.with_decoder(Some(DecoderWrapper::Metaspace(metaspace)));
    let post_processor = TemplateProcessing::builder()
        .try_single("$A </s>")
        .and_then(|builder| builder.try_pair("$A </s> $B:0 </s>:0"))
        .map_err(|message| TokenizerError::Training { message })?
        .special_tokens(vec![("</s>", EOS_ID)])
        .build()
        .map_err(|error| TokenizerError::Training { message: error.to_string() })?;
    tokenizer.with_post_processor(Some(post_processor));
    let special = SPECIAL_TOKENS.iter().copied().chain(sentinels.iter().map(String::as_str));
    tokenizer
        .add_special_tokens(special.map(|token| AddedToken::from(token, true)).collect::<Vec<_>>())
        .map_err(training)?;
    tokenizer.to_string(true).map_err(training)
}
