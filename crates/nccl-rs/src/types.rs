//! Types of values and ways to combine them.

use std::ffi::c_int;
use std::fmt;

/// Type of the values of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DataType {
    /// 8-bit integer.
    I8,
    /// Unsigned 8-bit integer.
    U8,
    /// 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// IEEE half precision.
    F16,
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// bfloat16.
    Bf16,
    /// 8-bit float with 4 bits of exponent; NCCL 2.24 and a GPU of capability 9.0.
    F8E4M3,
    /// 8-bit float with 5 bits of exponent; NCCL 2.24 and a GPU of capability 9.0.
    F8E5M2,
}

impl DataType {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::F8E4M3 | Self::F8E5M2 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }

    /// Whether it is one of the 8-bit floats.
    pub(crate) const fn is_float8(self) -> bool {
        matches!(self, Self::F8E4M3 | Self::F8E5M2)
    }

    /// Its number in `ncclDataType_t` of `nccl.h`.
    pub(crate) const fn code(self) -> c_int {
        match self {
            Self::I8 => 0,
            Self::U8 => 1,
            Self::I32 => 2,
            Self::U32 => 3,
            Self::I64 => 4,
            Self::U64 => 5,
            Self::F16 => 6,
            Self::F32 => 7,
            Self::F64 => 8,
            Self::Bf16 => 9,
            Self::F8E4M3 => 10,
            Self::F8E5M2 => 11,
        }
    }
}

impl fmt::Display for DataType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::I8 => "i8",
            Self::U8 => "u8",
            Self::I32 => "i32",
            Self::U32 => "u32",
            Self::I64 => "i64",
            Self::U64 => "u64",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::Bf16 => "bf16",
            Self::F8E4M3 => "f8e4m3",
            Self::F8E5M2 => "f8e5m2",
        })
    }
}

/// How the values of the ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReduceOp {
    /// Their sum.
    Sum,
    /// Their product.
    Prod,
    /// The greatest.
    Max,
    /// The least.
    Min,
    /// Their sum divided by the number of ranks.
    Avg,
}

impl ReduceOp {
    /// Its number in `ncclRedOp_t` of `nccl.h`.
    pub(crate) const fn code(self) -> c_int {
        match self {
            Self::Sum => 0,
            Self::Prod => 1,
            Self::Max => 2,
            Self::Min => 3,
            Self::Avg => 4,
        }
    }
}
