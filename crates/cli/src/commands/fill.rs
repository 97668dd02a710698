//! Filling the sentinels of texts with a model.

use serde::Serialize;
use switchyard_config::ModelConfig;
use switchyard_config::plan::{RoutingConfig, RoutingSemantics};
use switchyard_data::Tokenizer;
use switchyard_kernels::int_tensor;
use switchyard_model::generate::greedy;
use switchyard_model::{Capacity, ForwardContext, SwitchTransformer};
use switchyard_parallel::Mesh;

/// One text and what became of it.
#[derive(Debug, Serialize)]
pub(crate) struct Filled {
    /// The text with its sentinels.
    pub prompt: String,
    /// The text with words in their place.
    pub filled: String,
    /// What the model wrote, sentinels included.
    pub output: String,
    /// Tokens that the model wrote.
    pub tokens: usize,
}

/// A model with what is needed to run it on text.
pub(crate) struct Filler<'a> {
    pub model: &'a SwitchTransformer,
    pub config: &'a ModelConfig,
    pub routing: &'a RoutingConfig,
    pub tokenizer: &'a Tokenizer,
    pub mesh: &'a Mesh,
}

impl Filler<'_> {
    /// Fills all `prompts` as one batch; `on_output` sees the first one's output as it grows.
    pub(crate) fn fill(
        &self,
        prompts: &[String],
        max_new_tokens: usize,
        mut on_output: impl FnMut(&str) -> anyhow::Result<()>,
    ) -> anyhow::Result<Vec<Filled>> {
        let device = self.model.device();
        let rows = prompts
            .iter()
            .map(|prompt| self.tokenizer.encode_with_eos(prompt))
            .collect::<Result<Vec<_>, _>>()?;
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        let cell = |row: &Vec<u32>, at: usize| row.get(at).copied();
        let grid = || rows.iter().flat_map(|row| (0..length).map(move |at| cell(row, at)));
        let pad = self.config.pad_token_id;
        let ids = grid().map(|id| id.unwrap_or(pad) as i32).collect();
        let mask = grid().map(|id| i32::from(id.is_some())).collect();
        let mut first = Vec::new();
        let mut failure = None;
        let written = greedy(
            self.model,
            int_tensor(ids, [rows.len() * length], &device),
            int_tensor(mask, [rows.len(), length], &device),
            max_new_tokens,
            &self.context(),
            |step| {
                first.push(step.ids[0] as u32);
                let shown = self.text(&first).and_then(|text| on_output(&text));
                failure = shown.err();
                failure.is_none()
            },
        );
        self.mesh.check()?;
        if let Some(error) = failure {
            return Err(error);
        }
        prompts.iter().zip(written).map(|(prompt, ids)| self.filled(prompt, &ids)).collect()
    }

    /// Rows must not take each other's slots, except where the model was made to drop as it reads.
    fn context(&self) -> ForwardContext<'_> {
        let capacity = match self.routing.semantics {
            RoutingSemantics::Paper => Capacity::Unlimited,
            RoutingSemantics::Hf => Capacity::Evaluation,
        };
        ForwardContext {
            capacity,
            dispatcher: self.mesh.dispatcher(),
            tensor_parallel: self.mesh.tensor_parallel(),
            ..ForwardContext::evaluation(self.config, self.routing)
        }
    }

    fn filled(&self, prompt: &str, ids: &[i32]) -> anyhow::Result<Filled> {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        Ok(Filled {
            prompt: prompt.to_owned(),
            filled: self.tokenizer.fill(prompt, &ids)?,
            output: self.text(&ids)?,
            tokens: ids.len(),
        })
    }

    /// Text of ids up to the end of the sequence, sentinels spelled out.
    fn text(&self, ids: &[u32]) -> anyhow::Result<String> {
        let ended = |&&id: &&u32| id != self.config.eos_token_id;
        let ids: Vec<u32> = ids.iter().take_while(ended).copied().collect();
        Ok(self.tokenizer.decode(&ids, false)?)
    }
}
