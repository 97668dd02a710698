//! What a kernel is called with.

/// Where values lie in the memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// No values: for what an operation may be given or not.
    pub const NONE: Self = Self(0);

    /// The place `bytes` further on.
    #[must_use]
    pub const fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// The format of activations, weights and gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// float32.
    F32,
    /// bfloat16.
    Bf16,
}

impl Format {
    /// Bytes of a value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// The end of the name of a kernel's variant.
    pub(crate) const fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// One argument of a kernel: up to eight bytes, the first at the lowest address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arg(pub(crate) u64);

impl From<Address> for Arg {
    fn from(value: Address) -> Self {
        Self(value.0)
    }
}

impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self(value)
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self(u64::from(value))
    }
}

impl From<i32> for Arg {
    fn from(value: i32) -> Self {
        Self::from(value.cast_unsigned())
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::from(value.to_bits())
    }
}
