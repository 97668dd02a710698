//! Names of transformers, translated anew so that a mistake of the importer cannot hide.

use switchyard_config::parameters::parameters;
use switchyard_config::{ModelConfig, StackKind};

/// Where the logical parameters keep a tensor of transformers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub parameter: String,
    /// Index into a stack of experts.
    pub expert: Option<usize>,
    /// `[in, out]` here, `[out, in]` there.
    pub transposed: bool,
}

impl Place {
    pub(crate) fn of(hf: &str, config: &ModelConfig) -> Self {
        let parts: Vec<&str> = hf.split('.').collect();
        let place = |parameter: String, transposed| Self { parameter, expert: None, transposed };
        match parts[..] {
            ["shared", "weight"] => place("shared.embedding".to_owned(), false),
            ["lm_head", "weight"] => place("lm_head".to_owned(), true),
            [stack, "final_layer_norm", "weight"] => place(format!("{stack}.final_norm"), false),
            [stack, "block", "0", "layer", "0", "SelfAttention", "relative_attention_bias", "weight"] => {
                place(format!("{stack}.relative_bias"), false)
            }
            [stack, "block", layer, "layer", number, ref rest @ .., "weight"] => {
                let kind = if stack == "encoder" { StackKind::Encoder } else { StackKind::Decoder };
                let sub_layer = match (stack, number) {
                    (_, "0") => "self_attention",
                    ("decoder", "1") => "cross_attention",
                    _ if config.is_sparse(kind, layer.parse().unwrap()) => "moe",
                    _ => "feed_forward",
                };
                let prefix = format!("{stack}.block.{layer}.{sub_layer}");
                match *rest {
                    ["layer_norm"] => place(format!("{prefix}.norm"), false),
                    ["mlp", "router", "classifier"] => place(format!("{prefix}.router"), true),
                    ["mlp", "experts", expert, matrix] => Self {
                        parameter: format!("{prefix}.experts.{matrix}"),
                        expert: Some(expert.trim_start_matches("expert_").parse().unwrap()),
                        transposed: true,
                    },
                    [_, matrix] => place(format!("{prefix}.{matrix}"), true),
                    _ => panic!("{hf}"),
                }
            }
            _ => panic!("{hf}"),
        }
    }

    /// The tensor of transformers within the `values` of its logical parameter.
    pub(crate) fn extract(&self, values: &[f32], config: &ModelConfig) -> Vec<f32> {
        let spec =
            parameters(config).into_iter().find(|spec| spec.name == self.parameter).expect("a parameter");
        assert_eq!(spec.num_elements() as usize, values.len());
        let shape = if self.expert.is_some() { &spec.shape[1..] } else { &spec.shape[..] };
        let len: usize = shape.iter().product();
        let values = &values[self.expert.unwrap_or(0) * len..][..len];
        match *shape {
            [rows, columns] if self.transposed => {
                (0..len).map(|i| values[i % rows * columns + i / rows]).collect()
            }
            _ => values.to_vec(),
        }
    }
}
