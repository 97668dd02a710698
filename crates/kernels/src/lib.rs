//! The hot operations of the model, each with a hand-written backward, one file an operation.
//!
//! A file holds what the operation computes, its CPU form and, in its tests, a plain reference
//! composed from tensor operations. The model calls the functions re-exported here and nothing
//! below them, so a faster form or another device changes no model code. Activations flow as
//! `[tokens, d_model]`.

#![cfg_attr(
    feature = "libtorch",
    expect(
        deprecated,
        reason = "burn on LibTorch is deprecated, and still the fastest way to NVIDIA's GPUs"
    )
)]

mod activation;
mod attention;
mod cross_entropy;
mod device;
mod device_work;
mod dispatch;
mod element;
mod embedding;
mod expert_rows;
mod feed_forward;
pub mod gemm;
mod gradient_marks;
mod host;
mod linear_map;
mod logits;
mod math;
mod memory;
#[cfg(test)]
mod narrow_tests;
#[cfg(not(feature = "libtorch"))]
mod no_device;
mod noise;
mod norm;
mod operation;
pub mod optimizer;
mod plan;
mod projection;
mod route;
mod router_logits;
mod seed;
mod slot_travel;
#[cfg(feature = "libtorch")]
mod torch;
mod vocabulary;

pub use activation::Activation;
pub use attention::{Attention, AttentionInputs, Segments, attention};
pub use cross_entropy::{CrossEntropy, CrossEntropyOutput, HeadLayout, cross_entropy};
pub use device::{
    DeviceError, DeviceMemory, DeviceName, Place, allow_tf32, bind_device, device_memory, devices,
    gpu_failure, gpus, place_of, test_device,
};
pub use device_work::{DeviceMark, SideKind, SideWork, device_zeros};
pub use dispatch::{combine, dispatch};
pub use element::{Element, bf16};
pub use embedding::{embedding, embedding_and_table, embedding_shard, embedding_two};
pub use expert_rows::{ExpertRows, SlotsInUse, TokenPlaces, WeightGradients};
pub use feed_forward::{ExpertWeights, FeedForwardWeights, HiddenDropout, expert_feed_forward, feed_forward};
pub use gemm::CpuPath;
pub use gradient_marks::{GradientMarks, mark_gradients};
pub use host::{
    DeviceFormat, Values, ValuesMut, copy_into, int_tensor, integers, update_in_place, with_values,
};
pub use linear_map::{DeviceMap, LinearMap, linear_map};
pub use logits::logits;
pub use memory::CacheLines;
#[cfg(not(feature = "libtorch"))]
pub use no_device::{
    Deferral, DeferredGradients, DeviceIntegers, DeviceOptimizer, DeviceValues, Readback, Recording,
    WorkStream,
};
pub use noise::{Columns, NoiseKey, TokenNoise, TokenPlace, dropout, jitter};
pub use norm::{rms_norm, rms_norm_beside};
pub use plan::{DispatchPlan, TokenSlots};
pub use projection::{add, project, project_onto, project_three, project_two};
pub use route::{RouteOptions, Routing, route_expert_choice, route_top1, route_top2};
pub use router_logits::router_logits;
pub use seed::with_gradient;
pub use slot_travel::{SlotChunk, SlotTravel, SlotWay};
#[cfg(feature = "libtorch")]
pub use torch::deferred::{Deferral, DeferredGradients};
#[cfg(feature = "libtorch")]
pub use torch::recording::{DeviceIntegers, Readback, Recording, WorkStream};
#[cfg(feature = "libtorch")]
pub use torch::update::{DeviceOptimizer, DeviceValues};
pub use vocabulary::{DeviceVocabularyGroup, VocabularyGroup, VocabularyShard};
