//! Which paragraphs are English prose worth learning from.

/// Least words of a paragraph.
const MIN_WORDS: usize = 8;
/// Least share of letters and spaces among its characters.
const MIN_LETTERS: f64 = 0.80;
/// Least share of function words among its words.
const MIN_FUNCTION_WORDS: f64 = 0.18;

/// The words that hold English sentences together.
const FUNCTION_WORDS: [&str; 96] = [
    "a", "about", "after", "all", "also", "an", "and", "any", "are", "as", "at", "be", "because", "been",
    "before", "being", "between", "both", "but", "by", "can", "cannot", "could", "did", "do", "does", "each",
    "either", "for", "from", "had", "has", "have", "he", "how", "if", "in", "into", "is", "it", "its",
    "like", "may", "might", "more", "most", "must", "no", "not", "of", "on", "only", "or", "other", "our",
    "out", "over", "should", "since", "so", "some", "such", "than", "that", "the", "their", "them", "then",
    "there", "these", "they", "this", "those", "to", "too", "under", "until", "up", "upon", "very", "was",
    "we", "were", "what", "when", "where", "whether", "which", "while", "who", "will", "with", "within",
    "without", "would", "you",
];

/// Marks of legal text; every package repeats it.
const LEGAL: [&str; 8] = [
    "licen",
    "copyright",
    "warrant",
    "merchantab",
    "redistribut",
    "liabilit",
    "all rights reserved",
    "contributor covenant",
];

/// Whether a paragraph without markup is a piece of English prose.
pub(super) fn is_prose(paragraph: &str) -> bool {
    ends_a_sentence(paragraph)
        && !paragraph.contains(['{', '}', '@'])
        && !paragraph.contains("://")
        && !names_an_issue(paragraph)
        && share_of_letters(paragraph) >= MIN_LETTERS
        && reads_as_english(paragraph)
        && !is_legal(paragraph)
}

fn ends_a_sentence(paragraph: &str) -> bool {
    let end = paragraph.trim_end_matches(['"', '\'', ')', ']', '”', '’']);
    end.ends_with(['.', '!', '?']) && !end.ends_with("..")
}

/// `#123`, as change logs have it.
fn names_an_issue(paragraph: &str) -> bool {
    paragraph.as_bytes().windows(2).any(|pair| pair[0] == b'#' && pair[1].is_ascii_digit())
}

fn share_of_letters(paragraph: &str) -> f64 {
    let (mut letters, mut all) = (0_usize, 0_usize);
    for character in paragraph.chars() {
        all += 1;
        letters += usize::from(character.is_ascii_alphabetic() || character == ' ');
    }
    letters as f64 / all.max(1) as f64
}

fn reads_as_english(paragraph: &str) -> bool {
    let (mut function_words, mut words) = (0_usize, 0_usize);
    for word in paragraph.split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '_') {
        if word.is_empty() {
            continue;
        }
        words += 1;
        let lower = word.to_ascii_lowercase();
        function_words += usize::from(FUNCTION_WORDS.binary_search(&lower.as_str()).is_ok());
    }
    words >= MIN_WORDS && function_words as f64 >= MIN_FUNCTION_WORDS * words as f64
}

fn is_legal(paragraph: &str) -> bool {
    let lower = paragraph.to_ascii_lowercase();
    LEGAL.iter().any(|mark| lower.contains(mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_words_are_sorted_for_the_search() {
        assert!(FUNCTION_WORDS.is_sorted());
    }

    #[test]
    fn sentences_are_kept() {
        for text in [
            "Returns the number of elements that the iterator will yield before it ends.",
            "This is useful when the caller wants to keep the buffer (for example in a loop).",
            "Do not call this from a signal handler, because it may allocate memory!",
        ] {
            assert!(is_prose(text), "{text}");
        }
    }

    #[test]
    fn everything_else_is_dropped() {
        for text in [
            "Returns the length.",
            "This paragraph introduces an example that follows it in the code below:",
            "The type { of this } field is the one of the value that it holds.",
            "This is the text of the list of the things to be done and so on...",
            "x86_64 0x1234 = 0b1010 + 17 * 3; the 64 of the 12 is a 99 in 100 of 55.",
            "Vector length register file operand instruction encoding table lookup entry index value.",
            "This software is provided under the terms of the license that you can find in the file.",
            "The reader now keeps what it has read before it fails, as in #123 and others.",
            "Thanks to @somebody and to all of the others for their help with this.",
            "See the page at https://example.org for all of the details of this format.",
        ] {
            assert!(!is_prose(text), "{text}");
        }
    }
}
