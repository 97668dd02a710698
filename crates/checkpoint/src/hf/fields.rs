//! Fields of a `config.json`: typed, with defaults, and errors that name the field.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::CheckpointError;

/// The fields of one file; `null` counts as missing.
pub(super) struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(path: &'a Path, map: &'a Map<String, Value>) -> Self {
        Self { path, map }
    }

    /// Whether the field is written, even as `null`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// An error about a field.
    pub(super) fn wrong(&self, key: &str, expected: impl std::fmt::Display) -> CheckpointError {
        let found = self.map.get(key).map_or("missing".to_owned(), Value::to_string);
        CheckpointError::bad(self.path, format!("`{key}` is {found}; expected {expected}"))
    }

    fn get<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, CheckpointError> {
        match self.map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.wrong(key, expected)),
        }
    }

    /// A whole number from 0 to `most`.
    pub(super) fn count(&self, key: &str, most: u64) -> Result<Option<usize>, CheckpointError> {
        let expected = format!("a whole number from 0 to {most}");
        let read = |value: &Value| value.as_u64().filter(|&n| n <= most).and_then(|n| n.try_into().ok());
        self.get(key, &expected, read)
    }

    /// A finite number that is not negative.
    pub(super) fn number(&self, key: &str, default: f64) -> Result<f64, CheckpointError> {
        let read = |value: &Value| value.as_f64().filter(|n| n.is_finite() && *n >= 0.0);
        Ok(self.get(key, "a finite number that is not negative", read)?.unwrap_or(default))
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, CheckpointError> {
        self.get(key, "true or false", Value::as_bool)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, CheckpointError> {
        self.get(key, "a text", Value::as_str)
    }
}
