//! The kernels' sources, part of the program.

/// One source file with kernels that are compiled together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Source {
    /// Its name below `kernels/`, without `.cu`.
    pub name: &'static str,
    /// CUDA C++, to be compiled behind `kernels/common.cuh`.
    pub text: &'static str,
    /// Whether it has instructions that only Hopper has.
    pub hopper_only: bool,
}

impl Source {
    /// Whether it can be compiled for `architecture`, such as `sm_80` or `sm_90a`.
    pub fn is_for(&self, architecture: &str) -> bool {
        !self.hopper_only || architecture == "sm_90a"
    }
}

/// What all sources share; it stands before each of them.
pub(crate) const COMMON: &str = include_str!("../kernels/common.cuh");

macro_rules! kernels {
    ($name:literal) => {
        include_str!(concat!("../kernels/", $name, ".cu"))
    };
    ($name:literal behind $($shared:literal)+) => {
        concat!(
            $("\n#line 1 \"kernels/", $shared, "\"\n", include_str!(concat!("../kernels/", $shared)),)+
            "\n#line 1 \"kernels/",
            $name,
            ".cu\"\n",
            kernels!($name)
        )
    };
}

macro_rules! is_hopper {
    () => {
        false
    };
    (Hopper) => {
        true
    };
}

macro_rules! sources {
    ($($constant:ident = $name:literal $(behind $($shared:literal)+)? $(on $hopper:ident)?),* $(,)?) => {
        $(pub(crate) const $constant: Source = Source {
            name: $name,
            text: kernels!($name $(behind $($shared)+)?),
            hopper_only: is_hopper!($($hopper)?),
        };)*

        /// All of them.
        pub const SOURCES: &[Source] = &[$($constant),*];
    };
}

sources! {
    ACTIVATION = "activation",
    ATTENTION = "attention" behind "attention.cuh",
    ATTENTION_HOPPER = "attention_hopper" behind "attention.cuh" "attention_hopper.cuh" on Hopper,
    ATTENTION_BACKWARD_HOPPER =
        "attention_backward_hopper" behind "attention.cuh" "attention_hopper.cuh" on Hopper,
    CROSS_ENTROPY = "cross_entropy",
    EMBEDDING = "embedding",
    NOISE = "noise",
    NORM = "norm",
    DISPATCH = "dispatch",
    OPTIMIZER = "optimizer",
    ROUTE = "route",
}
