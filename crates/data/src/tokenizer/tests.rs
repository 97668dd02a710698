use std::path::PathBuf;

use serde_json::Value;

use super::*;
use crate::test_vectors::{fixture, u64_list};

const LAYOUTS: [&str; 2] = ["parity/tokenizer_t5", "parity/tokenizer_t5_hubstyle"];

fn expected(layout: &str) -> Value {
    let text = std::fs::read_to_string(fixture(layout).join("expected.json")).expect("the fixture is there");
    serde_json::from_str(&text).expect("the fixture is JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    u64_list(value).into_iter().map(|id| id as u32).collect()
}

#[test]
fn every_layout_encodes_and_decodes_as_transformers_does() {
    for layout in LAYOUTS {
        let tokenizer = Tokenizer::load(&fixture(layout)).expect("a T5 tokenizer");
        let expected = expected(layout);
        assert_eq!((tokenizer.size(), tokenizer.num_sentinels()), (500, 100));
        assert_eq!(u64::from(tokenizer.sentinel(0)), expected["extra_id_0"]);
        assert_eq!(u64::from(tokenizer.sentinel(99)), expected["extra_id_99"]);
        for row in expected["rows"].as_array().expect("a list") {
            let text = row["text"].as_str().expect("text");
            let found = tokenizer.encode_with_eos(text).expect("it encodes");
            assert_eq!(found, ids(&row["ids"]), "{text:?}");
            assert_eq!(
                tokenizer.decode(&found, false).expect("it decodes"),
                row["decode_noclean"],
                "{text:?}"
            );
            assert_eq!(tokenizer.decode(&found, true).expect("it decodes"), row["decode_skip"], "{text:?}");
        }
    }
}

#[test]
fn corpus_text_never_gives_control_ids() {
    let tokenizer = Tokenizer::load(&fixture(LAYOUTS[0])).expect("a T5 tokenizer");
    let texts = ["foo</s>bar <extra_id_0> <pad>", "full width ＜/s＞ and ＜extra_id_5＞", "plain"];
    let (documents, counts) = tokenizer.encode_documents(&texts.map(str::to_owned)).expect("it encodes");
    for id in documents.iter().flatten() {
        assert!(*id >= UNK_ID && !tokenizer.is_sentinel(*id), "{documents:?}");
    }
    assert_eq!(counts.control_text, 3);
    assert_eq!(counts.control_ids, 2);
    assert_eq!(counts.tokens, documents.iter().flatten().count() as u64);
    assert_eq!(documents[2], tokenizer.encode("plain").expect("it encodes"));
}

#[test]
fn long_documents_are_cut_between_words_only() {
    let text = "some words\nof a text that goes on and on ".repeat(20);
    let cut: Vec<&str> = parts(&text, 64).collect();
    assert!(cut.len() > 5);
    assert_eq!(cut.concat(), text);
    let tokenizer = Tokenizer::load(&fixture(LAYOUTS[0])).expect("a T5 tokenizer");
    let whole = tokenizer.encode(&text).expect("it encodes");
    let pieces: Vec<u32> = cut.iter().flat_map(|part| tokenizer.encode(part).expect("it encodes")).collect();
    assert_eq!(pieces, whole);
}

#[test]
fn wrong_files_are_refused_by_name() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("tokenizer.json");
    let error = Tokenizer::load(&missing).expect_err("it is missing").to_string();
    assert!(error.contains("tokenizer.json") && error.contains("train_tokenizer_vocab_size"), "{error}");

    std::fs::write(&missing, "{\"version\": \"1.0\"").expect("writable");
    assert!(matches!(Tokenizer::load(&missing), Err(TokenizerError::Malformed { .. })));

    let text = std::fs::read_to_string(fixture(LAYOUTS[0]).join("tokenizer.json")).expect("readable");
    std::fs::write(&missing, text.replace("<pad>", "<nil>")).expect("writable");
    let error = Tokenizer::load(&missing).expect_err("pad is missing").to_string();
    assert!(error.contains("id 0 must be `<pad>` and is `<nil>`"), "{error}");

    std::fs::write(&missing, text.replace("<extra_id_3>", "<other>")).expect("writable");
    let few = Tokenizer::load(&missing).expect("it loads");
    assert_eq!(few.num_sentinels(), 3);
    few.require_sentinels(3).expect("three are there");
    let error = few.require_sentinels(4).expect_err("only three").to_string();
    assert!(error.contains("ends in 3 sentinels") && error.contains("data.inputs_length"), "{error}");
}

/// Generated prose: words of syllables with a skewed distribution, some rare characters.
fn corpus() -> WordCounts {
    let syllables = ["ka", "to", "ri", "men", "lo", "sta", "per", "in", "de", "qui"];
    let mut words = WordCounts::default();
    let mut state = 1_u32;
    let mut draw = |n: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % n
    };
    for _ in 0..400 {
        let mut line = String::new();
        for _ in 0..40 {
            for _ in 0..=draw(3) {
                let a = draw(10);
                line.push_str(syllables[draw(a + 1) as usize]);
            }
            line.push(' ');
        }
        words.add(&line);
    }
    words.add("xyz Zwß q\u{301} ﬁne ½ \u{2581}odd A\u{a0}B");
    words
}

fn options(vocab_size: usize) -> TrainOptions {
    TrainOptions { character_coverage: 1.0, ..TrainOptions::new(vocab_size) }
}

#[test]
fn training_gives_the_same_file_whatever_the_threads() {
    let words = corpus();
    let train_on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool");
        pool.install(|| train(&words, &options(120))).expect("it trains")
    };
    let first = train_on(1);
    for threads in [1, 2, 3, 5] {
        assert_eq!(train_on(threads).json, first.json);
    }
}

#[test]
fn trained_tokenizers_have_the_ids_of_t5() {
    let tokenizer = train(&corpus(), &options(120)).expect("it trains");
    assert_eq!((tokenizer.size(), tokenizer.num_sentinels()), (220, 100));
    assert_eq!(tokenizer.id_to_token(219).as_deref(), Some("<extra_id_0>"));
    let ids = tokenizer.encode_with_eos("kato  <extra_id_1> rimen \n").expect("it encodes");
    assert_eq!(ids.iter().filter(|&&id| id == tokenizer.sentinel(1)).count(), 1);
    assert_eq!(ids.last(), Some(&EOS_ID));
    assert_eq!(tokenizer.decode(&ids, true).expect("it decodes"), "kato rimen");
    let spaces = tokenizer.encode("kato  rimen ").expect("it encodes");
    assert_eq!(spaces, tokenizer.encode("kato rimen").expect("it encodes"));
}

#[test]
fn rare_characters_become_unknown() {
    let covering = TrainOptions { character_coverage: 0.999, ..TrainOptions::new(120) };
    let tokenizer = train(&corpus(), &covering).expect("it trains");
    assert_eq!(tokenizer.encode("ß").expect("it encodes").last(), Some(&UNK_ID));
    assert!(!tokenizer.encode("kato").expect("it encodes").contains(&UNK_ID));
}

#[test]
fn texts_that_cannot_be_trained_on_are_refused() {
    assert!(matches!(train(&WordCounts::default(), &options(100)), Err(TokenizerError::NoText)));
    let error = train(&corpus(), &options(12)).expect_err("too small").to_string();
    assert!(error.contains("data.train_tokenizer_vocab_size to at least"), "{error}");
}

#[test]
fn saved_tokenizers_load_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let tokenizer = train(&corpus(), &options(120)).expect("it trains");
    let dir: PathBuf = directory.path().join("tokenizer");
    tokenizer.save(&dir).expect("it saves");
    let loaded = Tokenizer::load(&dir).expect("it loads");
    assert_eq!(loaded.sha256(), tokenizer.sha256());
    let config: Value =
        serde_json::from_slice(&std::fs::read(dir.join("tokenizer_config.json")).expect("readable"))
            .expect("JSON");
    assert_eq!(config["extra_ids"], 100);
    assert_eq!(config["additional_special_tokens"][0], "<extra_id_0>");
    assert_eq!(config["added_tokens_decoder"]["219"]["content"], "<extra_id_0>");
    assert!(config.get("add_prefix_space").is_none());
}

#[test]
fn outputs_fill_the_sentinels_of_their_prompt() {
    let tokenizer = Tokenizer::load(&fixture(LAYOUTS[0])).expect("a T5 tokenizer");
    let fill = |prompt: &str, output: &str| {
        let ids = tokenizer.encode(output).expect("it encodes");
        tokenizer.fill(prompt, &ids).expect("it fills")
    };
    let prompt = "The <extra_id_0> of the <extra_id_1> is <extra_id_2>.";
    assert_eq!(
        fill(prompt, "<extra_id_0> name <extra_id_1> new file <extra_id_2> one</s> more"),
        "The name of the new file is one."
    );
    assert_eq!(
        fill(prompt, "<extra_id_1> a <extra_id_1> b <extra_id_2>"),
        "The <extra_id_0> of the a is <extra_id_2>."
    );
    assert_eq!(fill("nothing missing", "<extra_id_0> name"), "nothing missing");
}
