//! The hot operations of the model as CUDA kernels, on memory that belongs to the caller.
//!
//! A file of `src/` holds what an operation launches, the file of the same name in `kernels/` what
//! runs on the device. Nothing here knows of tensors or of automatic differentiation: operations take
//! device addresses, sizes and a [`Queue`], never wait for the device and never allocate, so that whole
//! training steps can be captured into a CUDA graph; but the first [`product`] of a kind may do both, and the
//! first launch of a kernel loads it. What changes from step to step (the number of the step, the learning rate, the factor of
//! clipping) is therefore read from device memory.
//!
//! The driver and NVRTC are loaded when a [`Gpu`] is opened, cuBLASLt with the first product: a program with
//! this crate also starts where there is none of them. Kernels are compiled for the device at hand once and
//! kept on the disk, as is the choice of an algorithm for a product.
//!
//! # Safety of operations
//! Each operation is `unsafe`: every [`Address`] must point to as many values as the operation's
//! documentation says, aligned to 16 bytes, alive until the queue has come past it, and what is
//! written must not overlap what else is read or written, unless said otherwise.

mod activation;
mod address;
mod attention;
mod blas_lt;
mod compile;
mod cross_entropy;
mod dispatch;
mod embedding;
mod error;
mod gpu;
mod mark;
mod noise;
mod norm;
mod optimizer;
mod pinned;
mod product;
mod route;
mod size;
mod source;
mod tuning;

pub use activation::{
    Activation, ActivationGradients, ExpertNoise, Hidden, HiddenDropout, UsedRows, activate,
    activate_backward, clear_empty_rows,
};
pub use address::{Address, Format};
pub use attention::{
    Attention, AttentionGradients, AttentionInputs, AttentionNoise, AttentionOutput, HeadRows, Segments,
    attention, attention_backward, attention_dropout, attention_dropout_bytes, attention_workspace,
};
pub use blas_lt::Algorithm;
pub use compile::{Compiler, cache_directory};
pub use cross_entropy::{
    CrossEntropy, CrossEntropyAt, ShardSums, cross_entropy, cross_entropy_joined, cross_entropy_shard,
    cross_entropy_sums,
};
pub use dispatch::{CombineGradients, Slots, combine, combine_backward, dispatch, dispatch_backward};
pub use embedding::{LookedUp, Table, embedding, embedding_backward, embedding_workspace};
pub use error::CudaError;
pub use gpu::{Gpu, Queue, Stream};
pub use mark::Mark;
pub use noise::{Columns, Dropout, NoiseKey, TokenNoise, TokenTensor, dropout, jitter};
pub use norm::{RmsNorm, RmsNormGradients, rms_norm, rms_norm_backward, rms_norm_workspace};
pub use optimizer::{
    UpdateControl, UpdateMemory, UpdatePlan, UpdateRules, UpdatedTensor, gradient_squares, parameter_squares,
    prepare_update, update, update_means, update_part,
};
pub use pinned::{PinnedIntegers, PinnedWords};
pub use product::{
    Epilogue, Factor, PRODUCT_WORKSPACE, Product, ProductAt, Rows, has_product, product, product_algorithms,
    product_by, product_choice,
};
pub use route::{Route, RouteAt, RouteGradients, RouterChoice, route, route_backward, route_workspace};
pub use source::{SOURCES, Source};
