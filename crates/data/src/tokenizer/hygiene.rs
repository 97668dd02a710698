//! Text made safe for a vocabulary that lists its control tokens as ordinary pieces.

use std::borrow::Cow;

/// Spellings that a Unigram vocabulary turns into control ids, wherever they stand.
const CONTROL_TOKENS: [&str; 4] = ["<pad>", "</s>", "<unk>", "<extra_id_"];

/// Replaces CRLF and CR by LF, drops U+0000, and puts a space behind the `<` of control tokens.
///
/// Returns the text and how many control tokens were split.
pub fn sanitize(text: &str) -> (Cow<'_, str>, u64) {
    let control_at = |&(at, _): &(usize, &str)| CONTROL_TOKENS.iter().any(|t| text[at..].starts_with(t));
    let control = text.match_indices('<').filter(control_at).count() as u64;
    if control == 0 && !text.bytes().any(|byte| matches!(byte, b'\r' | b'\0')) {
        return (Cow::Borrowed(text), 0);
    }

    let mut clean = String::with_capacity(text.len() + control as usize);
    let mut characters = text.char_indices().peekable();
    while let Some((at, character)) = characters.next() {
        match character {
            '\0' => {}
            '\r' => {
                clean.push('\n');
                characters.next_if(|&(_, next)| next == '\n');
            }
            '<' if control_at(&(at, "<")) => clean.push_str("< "),
            other => clean.push(other),
        }
    }
    (Cow::Owned(clean), control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_text_is_not_copied() {
        assert!(matches!(sanitize("a < b, <i>c</i>\nd"), (Cow::Borrowed(_), 0)));
    }

    #[test]
    fn control_tokens_are_split_and_counted() {
        let (clean, control) = sanitize("foo</s>bar <extra_id_7><pad> <unk");
        assert_eq!((clean.as_ref(), control), ("foo< /s>bar < extra_id_7>< pad> <unk", 3));
    }

    #[test]
    fn line_ends_become_newlines_and_nul_goes() {
        assert_eq!(sanitize("a\r\nb\rc\0d\r").0, "a\nb\ncd\n");
    }
}
