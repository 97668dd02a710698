//! Parameters by their logical names: reading, loading, gradients and updates in place.
//!
//! A module's field path *is* the logical name of the parameter table, which the constructors
//! check by asking the table for every name.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Gradients, Tensor};
use switchyard_kernels::{
    DeferredGradients, DeviceValues, GradientMarks, Values, ValuesMut, update_in_place, with_values,
};

use crate::init::{leaf, of_values};
use crate::model::SwitchTransformer;

/// A parameter that cannot be loaded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ParameterError {
    /// The name is not of this model.
    #[error("the model has no parameter `{name}`")]
    Unknown {
        /// The name.
        name: String,
    },
    /// The number of values does not fit.
    #[error("parameter `{name}` has {expected} values, {found} were given")]
    WrongSize {
        /// The parameter.
        name: String,
        /// Values the model needs.
        expected: usize,
        /// Values that came.
        found: usize,
    },
}

impl SwitchTransformer {
    /// Values of one parameter.
    ///
    /// # Errors
    /// [`ParameterError::Unknown`] for a name that the model does not have.
    pub fn parameter(&self, name: &str) -> Result<Vec<f32>, ParameterError> {
        struct Find<'a>(&'a str, Option<Vec<f32>>);
        impl OnParameter for Find<'_> {
            fn visit<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>) {
                if name == self.0 {
                    self.1 = Some(with_values(param.val(), <[f32]>::to_vec));
                }
            }
        }
        let mut found = Named::new(Find(name, None));
        Module::visit(self, &mut found);
        found.on.1.ok_or_else(|| ParameterError::Unknown { name: name.to_owned() })
    }

    /// Replaces the values of parameter `name`.
    ///
    /// # Errors
    /// Names the parameter when the model lacks it or its size differs.
    pub fn set_parameter(&mut self, name: &str, values: Vec<f32>) -> Result<(), ParameterError> {
        struct Replace<'a> {
            name: &'a str,
            values: Option<Vec<f32>>,
            format: DType,
            outcome: Result<(), ParameterError>,
        }
        impl MapParameter for Replace<'_> {
            fn map<const D: usize>(&mut self, name: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                if name != self.name {
                    return param;
                }
                let values = self.values.take().expect("names are unique");
                let (shape, device) = (param.lazy_shape(), param.lazy_device());
                if shape.num_elements() != values.len() {
                    self.outcome = Err(ParameterError::WrongSize {
                        name: name.to_owned(),
                        expected: shape.num_elements(),
                        found: values.len(),
                    });
                    return param;
                }
                Param::initialized(param.id, of_values(values, shape, self.format, &device))
            }
        }
        let format = self.formats.get(name).copied().unwrap_or(DType::F32);
        let mut replace = NamedMap::new(Replace { name, values: Some(values), format, outcome: Ok(()) });
        *self = Module::map(self.clone(), &mut replace);
        match replace.on {
            Replace { values: None, outcome, .. } => outcome,
            Replace { .. } => Err(ParameterError::Unknown { name: name.to_owned() }),
        }
    }

    /// This model with the values that `read` gives for each parameter, rounded to its format; none is
    /// drawn.
    ///
    /// `read` is called with the name and the number of values, and must return as many.
    ///
    /// # Errors
    /// The first error of `read`.
    pub fn with_parameters<E>(self, read: impl FnMut(&str, usize) -> Result<Vec<f32>, E>) -> Result<Self, E> {
        struct Load<F, E> {
            read: F,
            formats: Arc<HashMap<String, DType>>,
            failure: Option<E>,
        }
        impl<E, F: FnMut(&str, usize) -> Result<Vec<f32>, E>> MapParameter for Load<F, E> {
            fn map<const D: usize>(&mut self, name: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                if self.failure.is_some() {
                    return param;
                }
                let (shape, device) = (param.lazy_shape(), param.lazy_device());
                match (self.read)(name, shape.num_elements()) {
                    Ok(values) => {
                        Param::initialized(param.id, of_values(values, shape, self.formats[name], &device))
                    }
                    Err(error) => {
                        self.failure = Some(error);
                        param
                    }
                }
            }
        }
        let formats = Arc::clone(&self.formats);
        let mut load = NamedMap::new(Load { read, formats, failure: None });
        let model = Module::map(self, &mut load);
        load.on.failure.map_or(Ok(model), Err)
    }

    /// Takes the gradients out of `gradients` and calls `take` with the name and values of each.
    ///
    /// A parameter that the loss does not depend on has none and is left out.
    pub fn take_gradients(&self, gradients: &mut Gradients, take: impl FnMut(&str, Values)) {
        self.take_marked_gradients(gradients, None, take);
    }

    /// [`take_gradients`](Self::take_gradients) of a backward pass that left `marks`, which are told of gradients
    /// that had to be copied.
    pub fn take_marked_gradients(
        &self,
        gradients: &mut Gradients,
        marks: Option<&GradientMarks>,
        take: impl FnMut(&str, Values),
    ) {
        struct Take<'a, F>(&'a mut Gradients, Option<&'a GradientMarks>, F);
        impl<F: FnMut(&str, Values)> OnParameter for Take<'_, F> {
            fn visit<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>) {
                let Some(gradient) = param.val().grad_remove(self.0) else { return };
                if let Some(marks) = self.1
                    && DeviceValues::of(&gradient).is_some_and(|values| !values.lie_in(&gradient))
                {
                    marks.note_late(name);
                }
                (self.2)(name, Values::of(gradient));
            }
        }
        Module::visit(self, &mut Named::new(Take(gradients, marks, take)));
    }

    /// Calls `take` with the name and values of every gradient that was put off; then none is.
    ///
    /// # Panics
    /// When one is not of a parameter of this model.
    pub fn take_deferred_gradients(&self, deferred: &DeferredGradients, take: impl FnMut(&str, Values)) {
        struct Take<F>(BTreeMap<u64, DeviceValues>, F);
        impl<F: FnMut(&str, Values)> OnParameter for Take<F> {
            fn visit<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>) {
                if let Some(gradient) = self.0.remove(&param.id.val()) {
                    (self.1)(name, Values::Device(gradient));
                }
            }
        }
        let mut visitor = Named::new(Take(deferred.take(), take));
        Module::visit(self, &mut visitor);
        assert!(visitor.on.0.is_empty(), "gradients wait by the numbers of the model's own parameters");
    }

    /// The parameters that are on a GPU, by name: what is written into them is what the model then has.
    pub fn device_parameters(&self) -> BTreeMap<String, DeviceValues> {
        struct OnDevice(BTreeMap<String, DeviceValues>);
        impl OnParameter for OnDevice {
            fn visit<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>) {
                if let Some(values) = DeviceValues::shared(&param.val()) {
                    self.0.insert(name.to_owned(), values);
                }
            }
        }
        let mut found = Named::new(OnDevice(BTreeMap::new()));
        Module::visit(self, &mut found);
        found.on.0
    }

    /// Calls `read` with the name and values of every `wanted` parameter, widened to float32.
    pub fn visit_parameters(&self, wanted: impl Fn(&str) -> bool, read: impl FnMut(&str, &[f32])) {
        struct Read<W, F>(W, F);
        impl<W: Fn(&str) -> bool, F: FnMut(&str, &[f32])> OnParameter for Read<W, F> {
            fn visit<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>) {
                if (self.0)(name) {
                    with_values(param.val(), |values| (self.1)(name, values));
                }
            }
        }
        Module::visit(self, &mut Named::new(Read(wanted, read)));
    }

    /// Lets `update` write into the values of every parameter, in place where nothing shares them.
    #[must_use]
    pub fn update_parameters(self, update: impl FnMut(&str, &[usize], ValuesMut<'_>)) -> Self {
        struct Update<F>(F);
        impl<F: FnMut(&str, &[usize], ValuesMut<'_>)> MapParameter for Update<F> {
            fn map<const D: usize>(&mut self, name: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let (id, tensor, mapper) = param.consume();
                let (device, shape) = (tensor.device(), tensor.dims());
                let updated = update_in_place(tensor, |values| (self.0)(name, &shape, values));
                Param::from_mapped_value(id, on_device(updated, &device), mapper)
            }
        }
        Module::map(self, &mut NamedMap::new(Update(update)))
    }

    /// Names of all parameters.
    pub fn parameter_names(&self) -> HashSet<String> {
        struct Names(HashSet<String>);
        impl OnParameter for Names {
            fn visit<const D: usize>(&mut self, name: &str, _: &Param<Tensor<D>>) {
                self.0.insert(name.to_owned());
            }
        }
        let mut names = Named::new(Names(HashSet::new()));
        Module::visit(self, &mut names);
        names.on.0
    }
}

/// A leaf on `device` that shares the buffer of `tensor`.
fn on_device<const D: usize>(tensor: Tensor<D>, device: &Device) -> Tensor<D> {
    leaf(if device.is_autodiff() { tensor.autodiff() } else { tensor })
}

trait OnParameter {
    fn visit<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>);
}

trait MapParameter {
    fn map<const D: usize>(&mut self, name: &str, param: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// Joins field names into logical names.
struct Named<V> {
    path: Vec<String>,
    on: V,
}

impl<V> Named<V> {
    fn new(on: V) -> Self {
        Self { path: Vec::new(), on }
    }
}

impl<V: OnParameter> ModuleVisitor for Named<V> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.on.visit(&self.path.join("."), param);
    }
}

struct NamedMap<M> {
    path: Vec<String>,
    on: M,
}

impl<M> NamedMap<M> {
    fn new(on: M) -> Self {
        Self { path: Vec::new(), on }
    }
}

impl<M: MapParameter> ModuleMapper for NamedMap<M> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.join(".");
        self.on.map(&name, param)
    }
}
