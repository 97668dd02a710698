//! Where tensors come from, one or a part of one at a time, so that no model is held twice.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use switchyard_config::ModelConfig;
use switchyard_config::parameters::parameters;
use switchyard_config::partition::Part;

use crate::error::CheckpointError;
use crate::manifest::TensorEntry;
use crate::shard::Spec;
use crate::slices::is_within;

/// Gives tensors by name.
pub trait TensorSource {
    /// Name and shape of every tensor, in the order in which they are stored.
    fn specs(&self) -> Vec<(String, Vec<usize>)>;

    /// Values of one tensor, row-major.
    ///
    /// # Errors
    /// When there is none of that name.
    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError>;

    /// Values of a part of one tensor, row-major.
    ///
    /// # Errors
    /// When there is no tensor of that name, or it does not have that part.
    fn read_part(&self, name: &str, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        let known = self.specs().into_iter().find(|(known, _)| known == name);
        let (_, shape) = known.ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })?;
        if !is_within(part, &shape) {
            return Err(CheckpointError::outside(name, &shape, part));
        }
        let values = self.read(name)?;
        if values.len() != shape.iter().product::<usize>() {
            let reason = format!("it has {} values; its shape is {shape:?}", values.len());
            return Err(CheckpointError::refused(name, reason));
        }
        Ok(part.cut(&shape, &values))
    }
}

/// Tensors in memory.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TensorMap {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl TensorMap {
    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        self.tensors.insert(name.to_owned(), (shape.to_vec(), values));
    }

    /// Takes a tensor's values out.
    pub fn take(&mut self, name: &str) -> Option<Vec<f32>> {
        self.tensors.remove(name).map(|(_, values)| values)
    }
}

impl TensorSource for TensorMap {
    fn specs(&self) -> Vec<(String, Vec<usize>)> {
        self.tensors.iter().map(|(name, (shape, _))| (name.clone(), shape.clone())).collect()
    }

    fn read(&self, name: &str) -> Result<Cow<'_, [f32]>, CheckpointError> {
        match self.tensors.get(name) {
            Some((_, values)) => Ok(Cow::Borrowed(values)),
            None => Err(CheckpointError::NoTensor { name: name.to_owned() }),
        }
    }
}

/// Name and shape of every parameter, in the order of the parameter table.
pub(crate) fn parameter_specs(model: &ModelConfig) -> Vec<Spec> {
    parameters(model).into_iter().map(|spec| (spec.name, spec.shape)).collect()
}

/// Whether `name` is a parameter's: those of the optimizer carry the moment after a slash.
pub(crate) fn is_parameter(name: &str) -> bool {
    !name.contains('/')
}

/// The parameter to which a tensor of the optimizer belongs; of a parameter itself its name.
pub(crate) fn parameter_of(name: &str) -> &str {
    name.split_once('/').map_or(name, |(parameter, _)| parameter)
}

/// A tensor that was found somewhere.
pub(crate) struct Found<'a> {
    pub(crate) name: &'a str,
    pub(crate) shape: &'a [usize],
    /// The file that holds it, if it is in one.
    pub(crate) file: Option<&'a str>,
}

impl TensorEntry {
    pub(crate) fn found(&self) -> Found<'_> {
        let file = self.slices.first().map(|slice| slice.file.as_str());
        Found { name: &self.name, shape: &self.shape, file }
    }
}

/// Every difference between the tensors that a model needs and those that were found, a line each.
pub(crate) fn differences(expected: &[Spec], found: &[Found<'_>]) -> Vec<String> {
    let by_name: BTreeMap<&str, &Found<'_>> = found.iter().map(|tensor| (tensor.name, tensor)).collect();
    let place = |tensor: &Found<'_>| tensor.file.map_or(String::new(), |file| format!(" in {file}"));
    let mut faults = Vec::new();
    for (name, shape) in expected {
        match by_name.get(name.as_str()) {
            None => faults.push(format!("`{name}` is missing; expected shape {shape:?}")),
            Some(tensor) if tensor.shape != shape.as_slice() => {
                let (place, found) = (place(tensor), tensor.shape);
                faults.push(format!("`{name}`{place} has shape {found:?}; expected {shape:?}"));
            }
            Some(_) => {}
        }
    }
    let known: BTreeSet<&str> = expected.iter().map(|(name, _)| name.as_str()).collect();
    for tensor in found.iter().filter(|tensor| !known.contains(tensor.name)) {
        faults.push(format!("`{}`{} is not of this model", tensor.name, place(tensor)));
    }
    faults
}

/// Refuses tensors that are not exactly those that `model` needs.
pub(crate) fn check_parameters(
    source: &dyn TensorSource,
    model: &ModelConfig,
) -> Result<(), CheckpointError> {
    let specs = source.specs();
    let found: Vec<Found<'_>> = specs.iter().map(|(name, shape)| Found { name, shape, file: None }).collect();
    let faults = differences(&parameter_specs(model), &found);
    if faults.is_empty() { Ok(()) } else { Err(CheckpointError::WrongParameters { faults }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_differences_are_listed() {
        let expected = [("a".to_owned(), vec![2, 3]), ("b".to_owned(), vec![4]), ("c".to_owned(), vec![1])];
        let found = [
            Found { name: "a", shape: &[3, 2], file: Some("x.safetensors") },
            Found { name: "c", shape: &[1], file: None },
            Found { name: "d", shape: &[9], file: Some("y.safetensors") },
        ];
        assert_eq!(
            differences(&expected, &found),
            [
                "`a` in x.safetensors has shape [3, 2]; expected [2, 3]",
                "`b` is missing; expected shape [4]",
                "`d` in y.safetensors is not of this model",
            ]
        );
        assert!(differences(&expected[2..], &found[1..2]).is_empty());
    }

    #[test]
    fn a_map_is_a_source() {
        let mut map = TensorMap::default();
        map.insert("w", &[2, 2], vec![1.0, 2.0, 3.0, 4.0]);
        map.insert("v", &[1], vec![3.0]);
        assert_eq!(map.specs(), [("v".to_owned(), vec![1]), ("w".to_owned(), vec![2, 2])]);
        assert_eq!(map.take("v"), Some(vec![3.0]));
        assert!(matches!(map.read("v"), Err(CheckpointError::NoTensor { .. })));
        let column = Part { start: vec![0, 1], shape: vec![2, 1] };
        assert_eq!(map.read_part("w", &column).unwrap(), [2.0, 4.0]);
        let beyond = Part { start: vec![1, 1], shape: vec![2, 1] };
        let message = map.read_part("w", &beyond).unwrap_err().to_string();
        assert_eq!(
            message,
            "tensor `w` was refused: [2, 1] values from [1, 1] are not within its shape [2, 2]"
        );
    }
}
