//! What a key of an experiment file is: its name, type, default and meaning, declared once.
//!
//! Owns the macro that turns one declaration into the serde struct and into the rows of the
//! reference. Does not own the keys themselves (`schema.rs`).

use std::cell::Cell;
use std::fmt;
use std::path::PathBuf;

use serde::de::{DeserializeOwned, Deserializer, Error as _, Visitor};
use serde::{Serialize, forward_to_deserialize_any};

/// What holds when a key is written nowhere.
#[derive(Debug, Clone, Copy)]
pub(crate) enum DefaultValue {
    /// This value, as TOML text; the layer of built-in defaults is parsed from these.
    Value(&'static str),
    /// A value that follows from other keys, in words.
    Derived(&'static str),
    /// Nothing: the key must be written.
    Required,
}

/// One key of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    pub(crate) name: &'static str,
    pub(crate) meaning: &'static str,
    pub(crate) default: DefaultValue,
    /// The type in words, such as `whole number`.
    pub(crate) describe: fn() -> String,
    /// Every accepted word, for keys that take one of a few.
    pub(crate) choices: fn() -> &'static [&'static str],
    /// The table of each element, for lists of tables.
    pub(crate) items: Option<&'static Table>,
}

/// One table of an experiment file; the top level is the table without a name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) keys: &'static [Key],
    pub(crate) subtables: &'static [&'static Table],
}

impl Table {
    pub(crate) fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }

    pub(crate) fn subtable(&self, name: &str) -> Option<&'static Table> {
        self.subtables.iter().copied().find(|table| table.name == name)
    }
}

/// `prefix.name`, or `name` at the top level.
pub(crate) fn dotted(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}.{name}") }
}

/// A type that a key may have.
pub(crate) trait KeyType {
    /// The table of each element, for lists of tables.
    const ITEMS: Option<&'static Table> = None;

    /// The type in words.
    fn describe() -> String;

    /// Every accepted word, where there are few.
    fn choices() -> &'static [&'static str] {
        &[]
    }

    /// The value as TOML text on one line, exact enough to read back the same value.
    fn to_toml(&self) -> String;
}

macro_rules! whole_number {
    ($($type:ty),+) => {
        $(impl KeyType for $type {
            fn describe() -> String {
                "whole number".to_owned()
            }

            fn to_toml(&self) -> String {
                self.to_string()
            }
        })+
    };
}

whole_number!(u32, u64, usize);

impl KeyType for f64 {
    fn describe() -> String {
        "number".to_owned()
    }

    fn to_toml(&self) -> String {
        if self.is_nan() { "nan".to_owned() } else { format!("{self:?}") }
    }
}

impl KeyType for bool {
    fn describe() -> String {
        "`true` or `false`".to_owned()
    }

    fn to_toml(&self) -> String {
        self.to_string()
    }
}

impl KeyType for String {
    fn describe() -> String {
        "string".to_owned()
    }

    fn to_toml(&self) -> String {
        quoted(self)
    }
}

impl KeyType for PathBuf {
    fn describe() -> String {
        "path".to_owned()
    }

    fn to_toml(&self) -> String {
        quoted(&self.to_string_lossy())
    }
}

impl KeyType for Vec<String> {
    fn describe() -> String {
        "list of strings".to_owned()
    }

    fn to_toml(&self) -> String {
        list(self.iter().map(|path| quoted(path)))
    }
}

/// A TOML array on one line.
pub(crate) fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// A TOML basic string on one line.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for character in text.chars() {
        match character {
            '"' | '\\' => out.extend(['\\', character]),
            _ if character.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(character))),
            _ => out.push(character),
        }
    }
    out.push('"');
    out
}

/// Makes enums whose variants are single words usable as the type of a key.
macro_rules! choice_keys {
    ($($type:ty),+ $(,)?) => {
        $(impl $crate::keys::KeyType for $type {
            fn describe() -> String {
                $crate::keys::alternatives(<$type as $crate::keys::KeyType>::choices())
            }

            fn choices() -> &'static [&'static str] {
                $crate::keys::variants::<$type>()
            }

            fn to_toml(&self) -> String {
                $crate::keys::quoted(&$crate::keys::Word(self).to_string())
            }
        })+
    };
}
pub(crate) use choice_keys;

/// `"a"`, `"b"` or `"c"`.
pub(crate) fn alternatives(words: &[&str]) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`\"{word}\"`")).collect();
    match quoted.as_slice() {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// Displays a unit variant as serde spells it.
pub(crate) struct Word<'a, T>(pub(crate) &'a T);

impl<T: Serialize> fmt::Display for Word<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.serialize(f)
    }
}

/// The variants of an enum as its `Deserialize` lists them, so that no second list can differ.
pub(crate) fn variants<T: DeserializeOwned>() -> &'static [&'static str] {
    let seen = Cell::new([].as_slice());
    // The probe always fails; what it saw on the way is the answer.
    let _ = T::deserialize(VariantProbe { seen: &seen });
    seen.get()
}

struct VariantProbe<'a> {
    seen: &'a Cell<&'static [&'static str]>,
}

impl<'de> Deserializer<'de> for VariantProbe<'_> {
    type Error = serde::de::value::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Self::Error> {
        Err(Self::Error::custom("not an enum"))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Self::Error> {
        self.seen.set(variants);
        Err(Self::Error::custom("a probe holds no value"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// Declares a table: the struct that serde fills, and its description for messages and reference.
macro_rules! table {
    (
        $(#[doc = $about:literal])+
        pub struct $Table:ident in $section:literal {
            $($(#[doc = $meaning:literal])+ $key:ident: $type:ty = $default:expr,)+
        }
        $(tables { $($subtable:ident: $Subtable:ident,)+ })?
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Default, PartialEq, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $Table {
            $($(#[doc = $meaning])+ pub $key: Option<$type>,)+
            $($(
                #[doc = concat!("Table `[", stringify!($subtable), "]`.")]
                #[serde(default)]
                pub $subtable: $Subtable,
            )+)?
        }

        impl $Table {
            pub(crate) const TABLE: $crate::keys::Table = $crate::keys::Table {
                name: $section,
                about: concat!($($about),+),
                keys: &[$($crate::keys::Key {
                    name: stringify!($key),
                    meaning: concat!($($meaning),+),
                    default: $default,
                    describe: <$type as $crate::keys::KeyType>::describe,
                    choices: <$type as $crate::keys::KeyType>::choices,
                    items: <$type as $crate::keys::KeyType>::ITEMS,
                }),+],
                subtables: &[$($(&$Subtable::TABLE),+)?],
            };

            /// Takes over every key that `later` sets.
            pub(crate) fn overlay(&mut self, later: Self) {
                $(if later.$key.is_some() {
                    self.$key = later.$key;
                })+
                $($(self.$subtable.overlay(later.$subtable);)+)?
            }

            /// Every key that is set, dotted, with its value as TOML text.
            pub(crate) fn entries(&self) -> Vec<(String, String)> {
                let mut entries = Vec::new();
                $(if let Some(value) = &self.$key {
                    entries.push((stringify!($key).to_owned(), $crate::keys::KeyType::to_toml(value)));
                })+
                $($(for (key, value) in self.$subtable.entries() {
                    entries.push((format!("{}.{key}", stringify!($subtable)), value));
                })+)?
                entries
            }
        }
    };
}
pub(crate) use table;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::RouterKind;

    #[test]
    fn choices_come_from_the_enum() {
        assert_eq!(variants::<RouterKind>(), ["top1", "top2", "expert_choice"]);
        assert_eq!(RouterKind::describe(), "`\"top1\"`, `\"top2\"` or `\"expert_choice\"`");
        assert_eq!(RouterKind::ExpertChoice.to_toml(), "\"expert_choice\"");
    }

    #[test]
    fn text_is_quoted_on_one_line() {
        assert_eq!(quoted("a\"b\\c\nd\u{7f}"), r#""a\"b\\c\u000Ad\u007F""#);
    }
}
