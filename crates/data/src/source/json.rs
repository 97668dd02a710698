//! Documents of JSON-lines files: one object a line, of which only the text is decoded.

use std::fmt;

use serde::Deserializer as _;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::reader::{After, Document, Record, RecordError};
use super::stream::{Compression, Stream, decode};
use crate::error::{DataError, Position};

const EXCERPT_CHARS: usize = 120;

/// Documents of a JSON-lines file.
pub(super) struct JsonDocuments {
    stream: Stream,
    column: String,
    line: Vec<u8>,
    /// Whether some line had the column: its absence is then the line's fault, not the user's.
    column_seen: bool,
}

impl JsonDocuments {
    pub(super) fn new(stream: Stream, column: String) -> Self {
        Self { stream, column, line: Vec::new(), column_seen: false }
    }

    fn next_record(&mut self) -> Result<Option<Record>, RecordError> {
        loop {
            let start = self.stream.position();
            if !self.stream.next_line(&mut self.line)? {
                return Ok(None);
            }
            if !self.line.trim_ascii().is_empty() {
                return self.parse(start).map(Some);
            }
        }
    }

    fn parse(&mut self, position: Position) -> Result<Record, RecordError> {
        let line = decode(std::mem::take(&mut self.line), &position)
            .map_err(|error| RecordError::new(error, After::Continue))?;
        let value = parse_object(&line, TextOf(&self.column))
            .map_err(|error| RecordError::new(self.bad_json(&line, &position, &error), After::Continue))?;
        let record = match value {
            Value::Text(text) => Record::Text(Document { text, position }),
            Value::Null => Record::Null,
            Value::Missing => {
                let place = position.to_string();
                // The same line parsed a moment ago.
                let existing = parse_object(&line, Keys).unwrap_or_default();
                return Err(self.not_there(DataError::MissingColumn {
                    place,
                    column: self.column.clone(),
                    existing,
                }));
            }
            Value::Other(found) => {
                let (place, found) = (position.to_string(), found.to_owned());
                return Err(self.not_there(DataError::NotText { place, column: self.column.clone(), found }));
            }
        };
        self.column_seen = true;
        self.line = line.into_bytes();
        Ok(record)
    }

    fn not_there(&self, error: DataError) -> RecordError {
        RecordError::new(error, if self.column_seen { After::Continue } else { After::Refuse })
    }

    fn bad_json(&self, line: &str, position: &Position, error: &serde_json::Error) -> DataError {
        let message = error.to_string();
        let message = message.split(" at line ").next().unwrap_or_default().to_owned();
        let hint = match self.stream.compression() {
            Compression::None => "every line must be one JSON object",
            Compression::Gzip => "the archive may be corrupt: test it with `gzip -t`",
            Compression::Zstd => "the archive may be corrupt: test it with `zstd -t`",
        };
        DataError::BadJson {
            position: position.clone(),
            column: error.column(),
            message,
            excerpt: line.chars().take(EXCERPT_CHARS).collect(),
            hint,
        }
    }
}

impl Iterator for JsonDocuments {
    type Item = Result<Record, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_record().transpose()
    }
}

fn parse_object<'de, V: Visitor<'de>>(line: &'de str, visitor: V) -> Result<V::Value, serde_json::Error> {
    let mut parser = serde_json::Deserializer::from_str(line);
    let value = parser.deserialize_map(visitor)?;
    parser.end()?;
    Ok(value)
}

/// The value under the text column.
enum Value {
    Missing,
    Null,
    Text(String),
    Other(&'static str),
}

/// Visits an object and keeps the text under one key.
struct TextOf<'a>(&'a str);

impl<'de> Visitor<'de> for TextOf<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut value = Value::Missing;
        while let Some(is_text) = map.next_key_seed(KeyIs(self.0))? {
            if is_text {
                value = map.next_value_seed(TextValue)?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(value)
    }
}

/// Visits an object and keeps its keys.
struct Keys;

impl<'de> Visitor<'de> for Keys {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Vec<String>, A::Error> {
        let mut keys = Vec::new();
        while let Some((key, IgnoredAny)) = map.next_entry()? {
            keys.push(key);
        }
        Ok(keys)
    }
}

/// Compares a key without keeping it.
struct KeyIs<'a>(&'a str);

impl<'de> DeserializeSeed<'de> for KeyIs<'_> {
    type Value = bool;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyIs<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: Error>(self, key: &str) -> Result<bool, E> {
        Ok(key == self.0)
    }
}

/// Takes a string, and names whatever else stands in its place.
struct TextValue;

impl<'de> DeserializeSeed<'de> for TextValue {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for TextValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }

    fn visit_string<E: Error>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Other("a boolean"))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Other("a number"))
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Other("a number"))
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other("a number"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
        while sequence.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an array"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an object"))
    }
}
