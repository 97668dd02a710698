//! The one table between logical tensors and those of transformers: names, shapes, orientation.

use switchyard_config::ModelConfig;
use switchyard_config::parameters::{ParameterKind, ParameterSpec, parameters};
use switchyard_config::partition::Part;

use super::Family;

/// Untied head, absent (or a redundant copy of [`EMBEDDING`]) in a tied model.
pub(super) const HEAD: &str = "lm_head.weight";
/// Embedding of both stacks.
pub(super) const EMBEDDING: &str = "shared.weight";

/// Aliases of the embedding.
const EMBEDDING_OF_STACK: [&str; 2] = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"];

/// Keys of old hub files that carry nothing: aliases of the embedding, and a bias that is never used.
pub(super) const REDUNDANT: [&str; 3] = [
    EMBEDDING_OF_STACK[0],
    EMBEDDING_OF_STACK[1],
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",
];

/// A logical tensor and the tensors of transformers that hold it.
#[derive(Debug)]
pub(super) struct Translation {
    /// The logical tensor.
    pub(super) logical: ParameterSpec,
    /// One name, or one for each expert. More than one without experts are copies: an untied Switch
    /// of transformers stores the embedding of each stack as well.
    pub(super) names: Vec<String>,
    /// Whether each piece, `[in, out]` here, is `[out, in]` there.
    pub(super) transposed: bool,
}

impl Translation {
    /// Shape of each piece here.
    pub(super) fn piece_shape(&self) -> &[usize] {
        &self.logical.shape[usize::from(self.logical.kind.is_expert())..]
    }

    /// Shape of each piece in transformers.
    pub(super) fn foreign_shape(&self) -> Vec<usize> {
        let mut shape = self.piece_shape().to_vec();
        if self.transposed {
            shape.reverse();
        }
        shape
    }

    /// Values of a piece.
    pub(super) fn piece_len(&self) -> usize {
        self.piece_shape().iter().product()
    }

    /// Where the piece called `names[index]` lies in the logical tensor.
    pub(super) fn piece(&self, index: usize) -> Part {
        let mut piece = Part::whole(&self.logical.shape);
        if self.logical.kind.is_expert() {
            piece.start[0] = index;
            piece.shape[0] = 1;
        }
        piece
    }

    /// Names of further copies of the whole tensor.
    pub(super) fn copies(&self) -> &[String] {
        if self.logical.kind.is_expert() { &[] } else { &self.names[1..] }
    }
}

/// Every tensor of `model`, in the order of the parameter table.
pub(super) fn table(family: Family, model: &ModelConfig) -> Vec<Translation> {
    let translate = |logical: ParameterSpec| {
        let mut names = foreign_names(family, &logical);
        if logical.kind == ParameterKind::Embedding && family == Family::Switch && !model.tie_word_embeddings
        {
            names.extend(EMBEDDING_OF_STACK.map(str::to_owned));
        }
        Translation { names, transposed: is_transposed(logical.kind), logical }
    };
    parameters(model).into_iter().map(translate).collect()
}

fn is_transposed(kind: ParameterKind) -> bool {
    match kind {
        ParameterKind::Embedding
        | ParameterKind::RelativeBias
        | ParameterKind::Norm
        | ParameterKind::RouterBias => false,
        ParameterKind::Head
        | ParameterKind::Query
        | ParameterKind::KeyValue
        | ParameterKind::AttentionOutput
        | ParameterKind::FeedForwardIn
        | ParameterKind::FeedForwardOut
        | ParameterKind::Router
        | ParameterKind::ExpertIn
        | ParameterKind::ExpertOut => true,
    }
}

fn foreign_names(family: Family, logical: &ParameterSpec) -> Vec<String> {
    let mut parts = logical.name.splitn(5, '.');
    let mut part = || parts.next().unwrap_or_default();
    let (stack, group, layer, module, leaf) = (part(), part(), part(), part(), part());
    let block = format!("{stack}.block.{layer}.layer");
    // The feed-forward layer comes third where there is cross-attention.
    let last = if stack == "encoder" { 1 } else { 2 };
    let feed_forward = if family == Family::Switch { "mlp" } else { "DenseReluDense" };
    let name = match (stack, group, module, leaf) {
        ("shared", ..) => EMBEDDING.to_owned(),
        ("lm_head", ..) => HEAD.to_owned(),
        (_, "final_norm", ..) => format!("{stack}.final_layer_norm.weight"),
        (_, "relative_bias", ..) => {
            format!("{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        }
        (_, _, "self_attention", "norm") => format!("{block}.0.layer_norm.weight"),
        (_, _, "self_attention", _) => format!("{block}.0.SelfAttention.{leaf}.weight"),
        (_, _, "cross_attention", "norm") => format!("{block}.1.layer_norm.weight"),
        (_, _, "cross_attention", _) => format!("{block}.1.EncDecAttention.{leaf}.weight"),
        (_, _, _, "norm") => format!("{block}.{last}.layer_norm.weight"),
        (_, _, _, "router") => format!("{block}.{last}.mlp.router.classifier.weight"),
        (_, _, _, "router_bias") => format!("{block}.{last}.mlp.router.classifier.bias"),
        (_, _, "feed_forward", _) => format!("{block}.{last}.{feed_forward}.{leaf}.weight"),
        _ => {
            let matrix = leaf.trim_start_matches("experts.");
            let expert = |e| format!("{block}.{last}.mlp.experts.expert_{e}.{matrix}.weight");
            return (0..logical.shape[0]).map(expert).collect();
        }
    };
    vec![name]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use switchyard_config::preset;

    use super::*;

    fn names(family: Family, model: &ModelConfig) -> BTreeMap<String, (Vec<String>, Vec<usize>)> {
        let entry = |t: Translation| (t.logical.name.clone(), (t.names.clone(), t.foreign_shape()));
        table(family, model).into_iter().map(entry).collect()
    }

    #[test]
    fn switch_names_and_shapes() {
        let mut model = preset("tiny").unwrap();
        model.router_bias = true;
        let names = names(Family::Switch, &model);
        let one = |name: &str| (&names[name].0[0][..], &names[name].1[..]);
        assert_eq!(one("shared.embedding"), ("shared.weight", &[32128, 256][..]));
        assert_eq!(
            one("encoder.relative_bias"),
            ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", &[32, 4][..])
        );
        assert_eq!(
            one("decoder.block.3.cross_attention.o"),
            ("decoder.block.3.layer.1.EncDecAttention.o.weight", &[256, 256][..])
        );
        assert_eq!(
            one("encoder.block.2.feed_forward.wi"),
            ("encoder.block.2.layer.1.mlp.wi.weight", &[1024, 256][..])
        );
        assert_eq!(
            one("decoder.block.1.moe.router"),
            ("decoder.block.1.layer.2.mlp.router.classifier.weight", &[8, 256][..])
        );
        assert_eq!(
            one("decoder.block.1.moe.router_bias"),
            ("decoder.block.1.layer.2.mlp.router.classifier.bias", &[8][..])
        );
        assert_eq!(one("decoder.block.1.moe.norm").0, "decoder.block.1.layer.2.layer_norm.weight");
        assert_eq!(one("decoder.final_norm").0, "decoder.final_layer_norm.weight");
        let (experts, shape) = &names["encoder.block.3.moe.experts.wo"];
        assert_eq!(experts.len(), 8);
        assert_eq!(experts[7], "encoder.block.3.layer.1.mlp.experts.expert_7.wo.weight");
        assert_eq!(shape[..], [256, 1024]);
    }

    #[test]
    fn t5_names_and_uniqueness() {
        let model = preset("t5-v1.1-small").unwrap();
        let names = names(Family::T5, &model);
        assert_eq!(
            names["decoder.block.7.feed_forward.wi_1"],
            (vec!["decoder.block.7.layer.2.DenseReluDense.wi_1.weight".to_owned()], vec![1024, 512])
        );
        assert_eq!(names["lm_head"], (vec!["lm_head.weight".to_owned()], vec![32128, 512]));
        for preset_name in ["t5-v1.1-small", "tiny"] {
            let table = table(Family::Switch, &preset(preset_name).unwrap());
            let mut all: Vec<String> = table.into_iter().flat_map(|t| t.names).collect();
            let count = all.len();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), count);
        }
    }
}
