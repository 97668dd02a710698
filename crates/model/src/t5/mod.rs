//! The dense parts of an encoder-decoder: attention, feed-forward, blocks and stacks.

mod attention;
mod block;
mod feed_forward;
mod relative_bias;
mod stack;

pub use attention::{AttentionLayer, AttentionScope, KeyValues};
pub use block::{Block, BlockCache, BlockInputs, DecoderCache};
pub use feed_forward::DenseLayer;
pub(crate) use feed_forward::kernel_activation;
pub use relative_bias::{bucket, relative_bias};
pub use stack::{Stack, block_number};
