//! The kernels' sources, part of the program.

/// One source file with kernels that are compiled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// Its name below `kernels/`, without `.cu`.
    pub name: &'static str,
    /// CUDA C++, to be compiled behind `kernels/common.cuh`.
    pub text: &'static str,
}

/// What all sources share; it stands before each of them.
pub(crate) const COMMON: &str = include_str!("../kernels/common.cuh");

macro_rules! sources {
    ($($constant:ident = $name:literal),* $(,)?) => {
        $(pub(crate) const $constant: Source =
            Source { name: $name, text: include_str!(concat!("../kernels/", $name, ".cu")) };)*

        /// All of them.
        pub const SOURCES: &[Source] = &[$($constant),*];
    };
}

sources! {
    ACTIVATION = "activation",
    ATTENTION = "attention",
    CROSS_ENTROPY = "cross_entropy",
    EMBEDDING = "embedding",
    NOISE = "noise",
    NORM = "norm",
    DISPATCH = "dispatch",
    OPTIMIZER = "optimizer",
    ROUTE = "route",
}
