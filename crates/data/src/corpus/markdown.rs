//! Paragraphs of running text from Markdown.
//!
//! Not a Markdown renderer: whatever is not prose (code, tables, headings, HTML, badges) is
//! dropped, and what is left loses its markup.

/// Paragraphs of a document, list items among them, each on one line and without markup.
pub(super) fn paragraphs<'a>(lines: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut blocks = Blocks::default();
    for line in lines {
        blocks.push(line);
    }
    blocks.end_paragraph();
    blocks.paragraphs.iter().map(|text| plain_text(text)).filter(|text| !text.is_empty()).collect()
}

/// Splits lines into paragraphs.
#[derive(Default)]
struct Blocks {
    paragraphs: Vec<String>,
    open: String,
    /// Fence that ends the code block being skipped.
    fence: Option<String>,
    in_comment: bool,
}

impl Blocks {
    fn push(&mut self, line: &str) {
        if self.skips(line) {
            return;
        }
        let (is_indented, mut text) = (line.starts_with("    ") || line.starts_with('\t'), line.trim());
        while let Some(quoted) = text.strip_prefix('>') {
            text = quoted.trim_start();
        }
        if text.is_empty() {
            return self.end_paragraph();
        }
        if is_setext_underline(text) {
            // The lines above were a heading.
            return self.open.clear();
        }
        if is_not_prose(text) || (is_indented && self.open.is_empty()) {
            return self.end_paragraph();
        }
        if let Some(item) = list_item(text) {
            self.end_paragraph();
            text = item;
        }
        if !self.open.is_empty() {
            self.open.push(' ');
        }
        self.open.push_str(text);
    }

    /// Handles code fences and HTML comments; true if the line is inside one.
    fn skips(&mut self, line: &str) -> bool {
        let text = line.trim_start_matches(['>', ' ', '\t']);
        if let Some(fence) = &self.fence {
            if text.starts_with(fence.as_str()) {
                self.fence = None;
            }
            return true;
        }
        if self.in_comment || text.starts_with("<!--") {
            self.in_comment = !text.contains("-->");
            return true;
        }
        let fence_char = if text.starts_with("```") { '`' } else { '~' };
        if text.starts_with("```") || text.starts_with("~~~") {
            self.end_paragraph();
            self.fence = Some(text.chars().take_while(|&c| c == fence_char).collect());
            return true;
        }
        false
    }

    fn end_paragraph(&mut self) {
        if !self.open.is_empty() {
            self.paragraphs.push(std::mem::take(&mut self.open));
        }
    }
}

/// `===` or `---` under a heading; also a thematic break, which ends a paragraph all the same.
fn is_setext_underline(text: &str) -> bool {
    text.len() >= 2 && (text.bytes().all(|b| b == b'=') || text.bytes().all(|b| b == b'-'))
}

/// Headings, tables, thematic breaks, link definitions and lines of HTML.
fn is_not_prose(text: &str) -> bool {
    let is_heading = text.trim_start_matches('#').starts_with([' ', '\t']) && text.starts_with('#');
    let is_table = text.starts_with('|') || text.matches(" | ").count() > 1;
    let is_break = text.bytes().all(|b| matches!(b, b'*' | b'_' | b'-' | b' ' | b'|' | b':'));
    let is_definition =
        text.starts_with('[') && text.contains("]:") && !text.starts_with("[^") && !text.contains(". ");
    is_heading
        || is_table
        || is_break
        || is_definition
        || (text.starts_with("[!") && !text.starts_with("[!["))
        || is_html_line(text)
}

/// A line that starts with a tag, as HTML blocks do; `<https://...>` is a link, not a tag.
fn is_html_line(text: &str) -> bool {
    tag_length(text).is_some_and(|length| !text[..length].contains("://"))
}

/// Content of a list item or footnote without its marker.
fn list_item(text: &str) -> Option<&str> {
    let item = text.strip_prefix(['-', '*', '+', '•']).or_else(|| {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let numbered = (1..=3).contains(&digits);
        numbered.then(|| text[digits..].strip_prefix(['.', ')'])).flatten()
    });
    if let Some(item) = item.filter(|item| item.starts_with([' ', '\t'])) {
        let item = item.trim_start();
        return Some(item.strip_prefix("[x] ").or_else(|| item.strip_prefix("[ ] ")).unwrap_or(item));
    }
    text.strip_prefix("[^").and_then(|note| note.split_once("]: ")).map(|(_, note)| note)
}

/// Bytes of the HTML tag or automatic link at the start of `text`.
fn tag_length(text: &str) -> Option<usize> {
    let inner = text.strip_prefix('<')?;
    let is_tag = inner.starts_with(|c: char| c.is_ascii_alphabetic() || matches!(c, '/' | '!'));
    is_tag.then(|| inner.find('>')).flatten().map(|end| end + 2)
}

/// Removes inline markup: images, link targets, code marks, emphasis, tags, entities, escapes.
fn plain_text(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find(['`', '[', '!', '<', '\\', '*', '_', '&', ']']) {
        text.push_str(&rest[..start]);
        rest = &rest[start..];
        let used = inline(rest, &mut text);
        rest = &rest[used..];
    }
    text.push_str(rest);
    let mut joined = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        // Removed links leave a full stop or comma alone behind a space.
        if !joined.is_empty() && !matches!(word, "." | "," | ".)") {
            joined.push(' ');
        }
        joined.push_str(word);
    }
    joined
}

/// Writes the text of the markup at the start of `rest` and returns the bytes it takes.
fn inline(rest: &str, text: &mut String) -> usize {
    let first = rest.as_bytes()[0];
    match first {
        b'`' => code_span(rest, text),
        b'!' if rest.starts_with("![") => link(&rest[1..]).map_or(2, |(_, used)| used + 1),
        b'[' => match link(rest) {
            Some((label, used)) => {
                text.push_str(&plain_text(label));
                used
            }
            None => keep(rest, text),
        },
        b'<' => match tag_length(rest) {
            Some(length) => length,
            None => keep(rest, text),
        },
        b'\\' => match rest[1..].chars().next() {
            Some(escaped) if escaped.is_ascii_punctuation() => {
                text.push(escaped);
                2
            }
            _ => 1,
        },
        b'*' => emphasis(rest, text),
        b'_' if is_boundary(text, rest) => emphasis(rest, text),
        b'&' => entity(rest, text),
        _ => keep(rest, text),
    }
}

fn keep(rest: &str, text: &mut String) -> usize {
    text.push_str(&rest[..1]);
    1
}

/// A run of backticks up to the same run; its content stays as it is.
fn code_span(rest: &str, text: &mut String) -> usize {
    let marks = rest.bytes().take_while(|&b| b == b'`').count();
    let (mark, inner) = rest.split_at(marks);
    match inner.find(mark) {
        Some(end) => {
            text.push_str(inner[..end].trim());
            end + 2 * marks
        }
        None => marks,
    }
}

/// Label of the link at the start of `rest`, and the bytes of the link with its target.
fn link(rest: &str) -> Option<(&str, usize)> {
    let label_end = closing(rest, b'[', b']')?;
    let label = &rest[1..label_end];
    let behind = &rest[label_end + 1..];
    let target = match behind.as_bytes().first() {
        Some(b'(') => closing(behind, b'(', b')').map_or(0, |end| end + 1),
        Some(b'[') => closing(behind, b'[', b']').map_or(0, |end| end + 1),
        _ => 0,
    };
    if target == 0 && label.starts_with(|c: char| c.is_ascii_digit()) {
        // An interval or an index, not the name of a link.
        return None;
    }
    let label = if label.starts_with('^') { "" } else { label };
    Some((label, label_end + 1 + target))
}

/// Byte of the bracket that closes the one at the start, code spans not counted.
fn closing(text: &str, open: u8, close: u8) -> Option<usize> {
    let (mut depth, mut in_code) = (0_usize, false);
    for (index, byte) in text.bytes().enumerate() {
        match byte {
            b'`' => in_code = !in_code,
            _ if in_code => {}
            byte if byte == open => depth += 1,
            byte if byte == close => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(index);
        }
    }
    None
}

/// Drops a run of `*` or `_`, unless it stands alone between spaces (a multiplication).
fn emphasis(rest: &str, text: &mut String) -> usize {
    let mark = rest.as_bytes()[0];
    let length = rest.bytes().take_while(|&b| b == mark).count();
    let stands_alone = text.ends_with(' ') && rest[length..].starts_with(' ');
    if stands_alone {
        text.push_str(&rest[..length]);
    }
    length
}

/// Whether an underscore is at the edge of a word; inside one it is part of an identifier.
fn is_boundary(text: &str, rest: &str) -> bool {
    let behind = rest.trim_start_matches('_').chars().next();
    let is_word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    !(is_word(text.chars().next_back()) && is_word(behind))
}

fn entity(rest: &str, text: &mut String) -> usize {
    const ENTITIES: [(&str, &str); 8] = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&amp;", "&"),
        ("&quot;", "\""),
        ("&#39;", "'"),
        ("&apos;", "'"),
        ("&nbsp;", " "),
        ("&mdash;", "—"),
    ];
    match ENTITIES.iter().find(|(name, _)| rest.starts_with(name)) {
        Some((name, character)) => {
            text.push_str(character);
            name.len()
        }
        None => keep(rest, text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(markdown: &str) -> Vec<String> {
        paragraphs(markdown.lines())
    }

    #[test]
    fn wrapped_lines_are_joined_and_list_items_are_paragraphs() {
        let text = "One line\nand its end.\n\n- first item\n  goes on\n- second\n3. third\n> quoted\n> text";
        assert_eq!(of(text), ["One line and its end.", "first item goes on", "second", "third quoted text"]);
    }

    #[test]
    fn code_tables_headings_and_html_are_dropped() {
        let text = "# Title\nprose\n```rust\nlet x = 1;\n```\nmore\n\n    indented code\n\nName\n====\n\
                    | a | b |\n|---|---|\n<p align=\"center\">\n<!-- a\ncomment -->\n[ref]: https://example.org\n\
                    ---\n~~~~\n```\n~~~~\nend";
        assert_eq!(of(text), ["prose", "more", "end"]);
    }

    #[test]
    fn an_indented_line_continues_an_open_paragraph() {
        assert_eq!(of("* item that\n    goes on"), ["item that goes on"]);
    }

    #[test]
    fn inline_markup_is_removed() {
        let cases = [
            ("See [`Vec`] and [the book](https://a.b/c_(d)).", "See Vec and the book."),
            ("[![build](https://x/y.svg)](https://x) A crate.", "A crate."),
            ("Some **bold** and *thin* and __strong__ words", "Some bold and thin and strong words"),
            (
                "the value 2 * 3 of `snake_case` and snake_case",
                "the value 2 * 3 of snake_case and snake_case",
            ),
            ("a&nbsp;&lt;b&gt; \\*kept\\* AT&T", "a <b> *kept* AT&T"),
            ("line<br/>break <https://example.org> end[^1].", "linebreak end."),
            ("``code with ` tick`` and [text][ref] and [a `]` b]", "code with ` tick and text and a ] b"),
            (
                "from [low, high) in [0, 1] of the .gz and ` tick",
                "from [low, high) in [0, 1] of the .gz and tick",
            ),
            ("It is `Ok(())` here [![x](y)](z) .", "It is Ok(()) here."),
        ];
        for (markdown, plain) in cases {
            assert_eq!(of(markdown), [plain]);
        }
    }
}
