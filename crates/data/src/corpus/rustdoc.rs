//! Documentation comments of Rust sources.

/// Documentation comments of a source, each as Markdown lines.
///
/// Finds `///`, `//!`, `/** */` and `/*! */` at the start of a line, without parsing Rust; text
/// that looks like such a comment inside a string literal is taken as well.
pub(super) fn doc_comments(source: &str) -> Vec<Vec<&str>> {
    let mut comments = Vec::new();
    let mut open: Vec<&str> = Vec::new();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let line = line.trim_start();
        if let Some(text) = line_comment(line) {
            open.push(text);
            continue;
        }
        if !open.is_empty() {
            comments.push(std::mem::take(&mut open));
        }
        if let Some(first) = block_comment(line) {
            comments.push(block_lines(first, &mut lines));
        }
    }
    comments.push(open);
    comments.retain(|comment| !comment.is_empty());
    comments
}

/// Text of `///` or `//!`; four slashes are an ordinary comment.
fn line_comment(line: &str) -> Option<&str> {
    let text = line
        .strip_prefix("//!")
        .or_else(|| line.strip_prefix("///").filter(|text| !text.starts_with('/')))?;
    Some(text.strip_prefix(' ').unwrap_or(text))
}

/// Text behind `/**` or `/*!`; `/***` and `/**/` are ordinary comments.
fn block_comment(line: &str) -> Option<&str> {
    line.strip_prefix("/*!").or_else(|| line.strip_prefix("/**").filter(|text| !text.starts_with(['*', '/'])))
}

/// Lines up to `*/`, without the star that many authors put in front of each.
fn block_lines<'a>(first: &'a str, lines: &mut std::str::Lines<'a>) -> Vec<&'a str> {
    let mut comment = Vec::new();
    let mut next = Some(first);
    while let Some(line) = next {
        let (text, is_last) = match line.find("*/") {
            Some(end) => (&line[..end], true),
            None => (line, false),
        };
        let trimmed = text.trim_start();
        let starred = trimmed.strip_prefix("* ").or_else(|| trimmed.strip_prefix('*'));
        comment.push(starred.unwrap_or(text));
        if is_last {
            break;
        }
        next = lines.next();
    }
    comment
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_found_and_told_apart() {
        let source = "//! Crate.\n//!\n//! More.\n\n// plain\n//// ruler\nstruct A {\n    /// Field.\n    a: u8,\n}\n\
                      /** Starred\n * lines\n */\nfn f() {}\n/*! Inner */\n/*** no */\n/**/\n/// Last.";
        let comments = doc_comments(source);
        let expected: [&[&str]; 5] =
            [&["Crate.", "", "More."], &["Field."], &[" Starred", "lines", " "], &[" Inner "], &["Last."]];
        assert_eq!(comments, expected);
    }
}
