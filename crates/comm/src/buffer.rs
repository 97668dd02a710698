//! Typed memory that collectives read and write.

use half::bf16;

/// Type of the values of a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// 64-bit float.
    F64,
    /// bfloat16.
    Bf16,
    /// 32-bit integer.
    I32,
    /// Unsigned 64-bit integer.
    U64,
    /// Byte.
    U8,
}

impl ElementType {
    /// Bytes of one value.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F64 | Self::U64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::Bf16 => 2,
            Self::U8 => 1,
        }
    }
}

mod sealed {
    use super::Buffer;

    pub trait Sealed: Sized {
        /// The values of a buffer of this type.
        fn values(buffer: Buffer<'_>) -> Option<&[Self]>;
    }
}

/// A type that collectives can move.
pub trait Element: sealed::Sealed + bytemuck::Pod + Default + Send + Sync + std::fmt::Debug {
    /// Its name for backends.
    const TYPE: ElementType;
}

macro_rules! elements {
    ($($variant:ident($type:ty)),+ $(,)?) => {
        /// Values to send, in main memory; those in the memory of devices are `DeviceSlice`s.
        #[derive(Debug, Clone, Copy)]
        #[non_exhaustive]
        pub enum Buffer<'a> {
            $(#[doc = concat!("Host memory of `", stringify!($type), "`.")] $variant(&'a [$type]),)+
        }

        /// Room for values to receive.
        #[derive(Debug)]
        #[non_exhaustive]
        pub enum BufferMut<'a> {
            $(#[doc = concat!("Host memory of `", stringify!($type), "`.")] $variant(&'a mut [$type]),)+
        }

        /// A copy of what a buffer held.
        #[derive(Debug)]
        pub(crate) enum Values {
            $($variant(Vec<$type>),)+
        }

        impl Values {
            /// Copies the values of a buffer.
            pub(crate) fn of(buffer: Buffer<'_>) -> Self {
                match buffer { $(Buffer::$variant(values) => Self::$variant(values.to_vec()),)+ }
            }

            /// The copied values.
            pub(crate) fn buffer(&self) -> Buffer<'_> {
                match self { $(Self::$variant(values) => Buffer::$variant(values),)+ }
            }
        }

        impl Buffer<'_> {
            /// Number of values.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(values) => values.len(),)+ }
            }

            /// Type of the values.
            pub fn element_type(&self) -> ElementType {
                match self { $(Self::$variant(_) => ElementType::$variant,)+ }
            }
        }

        impl BufferMut<'_> {
            /// Number of values.
            pub fn len(&self) -> usize {
                match self { $(Self::$variant(values) => values.len(),)+ }
            }

            /// Type of the values.
            pub fn element_type(&self) -> ElementType {
                match self { $(Self::$variant(_) => ElementType::$variant,)+ }
            }

            /// The same memory, borrowed for a shorter time.
            pub fn reborrow(&mut self) -> BufferMut<'_> {
                match self { $(Self::$variant(values) => BufferMut::$variant(values),)+ }
            }

            /// The same memory, to read.
            pub fn as_buffer(&self) -> Buffer<'_> {
                match self { $(Self::$variant(values) => Buffer::$variant(values),)+ }
            }
        }

        $(
            impl sealed::Sealed for $type {
                fn values(buffer: Buffer<'_>) -> Option<&[Self]> {
                    match buffer {
                        Buffer::$variant(values) => Some(values),
                        _ => None,
                    }
                }
            }

            impl Element for $type {
                const TYPE: ElementType = ElementType::$variant;
            }

            impl<'a> From<&'a [$type]> for Buffer<'a> {
                fn from(values: &'a [$type]) -> Self {
                    Self::$variant(values)
                }
            }

            impl<'a> From<&'a mut [$type]> for BufferMut<'a> {
                fn from(values: &'a mut [$type]) -> Self {
                    Self::$variant(values)
                }
            }
        )+
    };
}

elements!(F32(f32), F64(f64), Bf16(bf16), I32(i32), U64(u64), U8(u8));

/// Runs the same code on the slice of a [`BufferMut`], whatever its type.
macro_rules! with_values {
    ($buffer:expr, $values:ident => $body:expr) => {
        match $buffer {
            $crate::buffer::BufferMut::F32($values) => $body,
            $crate::buffer::BufferMut::F64($values) => $body,
            $crate::buffer::BufferMut::Bf16($values) => $body,
            $crate::buffer::BufferMut::I32($values) => $body,
            $crate::buffer::BufferMut::U64($values) => $body,
            $crate::buffer::BufferMut::U8($values) => $body,
        }
    };
}
pub(crate) use with_values;

impl Buffer<'_> {
    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl BufferMut<'_> {
    /// Whether there is no room.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
