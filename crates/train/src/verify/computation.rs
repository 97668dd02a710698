//! Runs a model on the inputs of a fixture and names the results as transformers names them.
//!
//! Knows nothing of what is expected: the inputs alone decide what is computed.

use burn::tensor::{Device, Int, Tensor};
use switchyard_config::plan::RoutingConfig;
use switchyard_config::{ModelConfig, StackKind};
use switchyard_kernels::{int_tensor, with_values};
use switchyard_model::generate::{argmax, greedy};
use switchyard_model::moe::RouterOutput;
use switchyard_model::t5::{BlockInputs, Stack, bucket};
use switchyard_model::{EncoderOutput, ForwardContext, Seq2SeqBatch, SwitchTransformer};

use super::fixture::{Array, Arrays, Inputs};
use super::router_table::RouterTable;

/// A model on its way through all the arrays that it can compute.
pub(super) struct Computation<'a> {
    model: &'a SwitchTransformer,
    context: ForwardContext<'a>,
    inputs: Inputs,
    device: Device,
    rows: usize,
    inputs_length: usize,
    targets_length: usize,
    out: Arrays,
}

impl<'a> Computation<'a> {
    pub(super) fn new(
        model: &'a SwitchTransformer,
        config: &'a ModelConfig,
        routing: &'a RoutingConfig,
        inputs: Inputs,
    ) -> Self {
        let [rows, inputs_length] = inputs.batch.input_mask.dims();
        Self {
            model,
            context: ForwardContext::evaluation(config, routing),
            device: model.device().inner(),
            rows,
            inputs_length,
            targets_length: inputs.batch.weights.dims()[0] / rows,
            inputs,
            out: Arrays::new(),
        }
    }

    pub(super) fn run(mut self) -> Arrays {
        self.buckets();
        let (encoder, encoder_routers) = self.encoder();
        let decoder_routers = self.decoder(&encoder);
        let ce = self.losses();
        let mut parts = [0.0; 2];
        for (stack, routers) in
            [(StackKind::Encoder, &encoder_routers), (StackKind::Decoder, &decoder_routers)]
        {
            if !routers.is_empty() {
                let [z, aux] = self.router_arrays(stack, routers);
                parts[0] += z;
                parts[1] += aux;
            }
        }
        let routing = self.context.routing;
        let router = routing.router_z_loss_coef * parts[0] + routing.load_balancing_loss_coef * parts[1];
        self.scalar("loss", ce + router);
        self.scalar("loss_no_router", ce);
        self.paper_loss(ce);
        self.other_masks(&encoder);
        self.greedy();
        self.out
    }

    fn numbers(&mut self, name: &str, shape: &[usize], values: Vec<f64>) {
        self.out.insert(name.to_owned(), Array { shape: shape.to_vec(), values, discrete: false });
    }

    fn ids(&mut self, name: &str, shape: &[usize], values: Vec<f64>) {
        self.out.insert(name.to_owned(), Array { shape: shape.to_vec(), values, discrete: true });
    }

    fn tensor<const D: usize>(&mut self, name: &str, shape: &[usize], tensor: Tensor<D>) {
        let values = with_values(tensor, |v| v.iter().map(|&v| f64::from(v)).collect());
        self.numbers(name, shape, values);
    }

    fn scalar(&mut self, name: &str, value: f64) {
        self.numbers(name, &[1], vec![value]);
    }

    fn buckets(&mut self) {
        let c = self.context.model;
        for (stack, bidirectional) in [("encoder", true), ("decoder", false)] {
            let (buckets, distance) = (c.relative_attention_num_buckets, c.relative_attention_max_distance);
            let values = (-300..=300).map(|r| bucket(r, bidirectional, buckets, distance) as f64).collect();
            self.ids(&format!("rel_bucket_{stack}"), &[601], values);
        }
    }

    fn encoder(&mut self) -> (EncoderOutput, Vec<RouterOutput>) {
        let (model, ids) = (self.model, self.inputs.batch.input_ids.clone());
        let mask = self.inputs.batch.input_mask.clone();
        let inputs = model.encoder_inputs(&mask, &self.context);
        let (hidden_nd, routers) = self.stack(model.encoder(), ids, &inputs);
        (EncoderOutput { hidden_nd, mask, rows: self.rows, routers: Vec::new() }, routers)
    }

    fn decoder(&mut self, encoder: &EncoderOutput) -> Vec<RouterOutput> {
        let (model, ids) = (self.model, self.inputs.batch.decoder_input_ids.clone());
        let inputs = model.decoder_inputs(&self.inputs.batch, encoder, &self.context);
        let (hidden_nd, routers) = self.stack(model.decoder(), ids.clone(), &inputs);
        self.ids("decoder_input_ids", &[self.rows, self.targets_length], with_ids(&ids));
        let logits = model.logits(hidden_nd, &self.context);
        self.tensor("logits", &self.logits_shape(), logits);
        routers
    }

    fn logits_shape(&self) -> [usize; 3] {
        [self.rows, self.targets_length, self.context.model.vocab_size]
    }

    /// Runs a stack block by block; returns its normed output.
    fn stack(
        &mut self,
        stack: &Stack,
        ids: Tensor<1, Int>,
        inputs: &BlockInputs,
    ) -> (Tensor<2>, Vec<RouterOutput>) {
        let (name, length) = (inputs.stack.name(), inputs.row_tokens);
        self.position_bias(name, inputs.relative_bias.clone(), length);
        let mut hidden = stack.begin(self.model.embed(ids, &self.context), inputs, &self.context);
        let (mut states, mut routers) = (vec![hidden.clone()], Vec::new());
        for (layer, block) in stack.blocks().iter().enumerate() {
            let (next, router) = block.forward(layer, hidden, inputs, None, &self.context);
            states.push(next.clone());
            routers.extend(router);
            hidden = next;
        }
        let last = stack.finish(hidden, inputs, &self.context);
        self.states(name, states, last.clone(), length);
        (last, routers)
    }

    /// Embedding, the state after each block but the last, and the normed output.
    fn states(&mut self, stack: &str, mut states: Vec<Tensor<2>>, last: Tensor<2>, length: usize) {
        let d = self.context.model.d_model;
        self.tensor(&format!("{stack}_last_hidden_state"), &[self.rows, length, d], last.clone());
        let layers = states.len();
        states[layers - 1] = last;
        let all = Tensor::cat(states, 0);
        self.tensor(&format!("{stack}_hidden_states"), &[layers, self.rows, length, d], all);
    }

    /// The bias vector spread out to every query and key.
    fn position_bias(&mut self, stack: &str, bias: Tensor<2>, length: usize) {
        let heads = self.context.model.num_heads;
        let width = 2 * length - 1;
        let values = with_values(bias, |bias| {
            let at = |i: usize| {
                let (head, query, key) = (i / (length * length), i / length % length, i % length);
                f64::from(bias[head * width + length - 1 - query + key])
            };
            (0..heads * length * length).map(at).collect()
        });
        self.numbers(&format!("{stack}_position_bias"), &[1, heads, length, length], values);
    }

    /// Loss of every token; returns the mean over targets.
    fn losses(&mut self) -> f64 {
        let batch = &self.inputs.batch;
        let output = self.model.loss(batch, 0.0, &self.context).cross_entropy;
        let mut losses = with_values(output.token_loss, <[f32]>::to_vec);
        let weights = with_values(batch.weights.clone(), <[f32]>::to_vec);
        for (loss, weight) in losses.iter_mut().zip(&weights) {
            *loss *= weight;
        }
        let count: f32 = weights.iter().sum();
        let ce = losses.iter().map(|&l| f64::from(l)).sum::<f64>() / f64::from(count);
        let losses = losses.into_iter().map(f64::from).collect();
        self.numbers("token_loss", &[self.rows, self.targets_length], losses);
        self.scalar("ce_loss", ce);
        ce
    }

    /// All router arrays of a stack; returns its z and auxiliary loss as transformers 4 adds them.
    fn router_arrays(&mut self, stack: StackKind, routers: &[RouterOutput]) -> [f64; 2] {
        let (name, rows) = (stack.name(), self.rows);
        let table = RouterTable::new(routers, rows);
        let layers = table.layers;
        let shape = [layers, rows, table.tokens / rows];
        let index = table.index_hf4();
        let (z, aux4, aux5) = (table.z(), table.pooled_balance(&index), table.pooled_balance(&table.choice));
        // Transformers adds the router losses of a stack only if its sparse step is above 1.
        let counted = if layers == self.context.model.layers(stack) { 0.0 } else { 1.0 };
        self.scalar(&format!("{name}_z_loss"), z * counted);
        self.scalar(&format!("{name}_z_loss_ungated"), z);
        self.scalar(&format!("{name}_aux_loss"), aux4 * counted);
        self.scalar(&format!("{name}_aux_loss_hf5"), aux5 * counted);
        self.scalar(&format!("{name}_aux_loss_ungated_hf4"), aux4);
        self.numbers(&format!("{name}_balance_per_layer_row"), &[layers], table.balance_per_layer(rows));
        self.numbers(&format!("{name}_balance_per_layer_all"), &[layers], table.balance_per_layer(1));
        self.numbers(&format!("{name}_z_per_layer"), &[layers], table.z_per_layer());
        self.numbers(&format!("{name}_router_prob"), &shape, table.best_probability());
        let [_, _, length] = shape;
        self.numbers(&format!("{name}_router_logits"), &[layers, rows, length, table.experts], table.logits);
        self.ids(&format!("{name}_expert_choice"), &shape, table.choice);
        self.ids(&format!("{name}_expert_kept"), &shape, table.kept);
        self.ids(&format!("{name}_expert_index_hf4"), &shape, index);
        [z * counted, aux4 * counted]
    }

    /// Cross-entropy plus 1e-2 times every layer's balance loss, one group a row.
    fn paper_loss(&mut self, ce: f64) {
        let total: f64 = ["encoder", "decoder"]
            .iter()
            .filter_map(|stack| self.out.get(&format!("{stack}_balance_per_layer_row")))
            .flat_map(|array| &array.values)
            .sum();
        self.scalar("paper_loss_row_groups", ce + 1e-2 * total);
    }

    fn other_masks(&mut self, encoder: &EncoderOutput) {
        if let Some(mask) = self.inputs.alt_input_mask.clone() {
            let other = self.model.encode(self.inputs.batch.input_ids.clone(), mask, &self.context);
            let shape = [self.rows, self.inputs_length, self.context.model.d_model];
            self.tensor("alt_encoder_last_hidden_state", &shape, other.hidden_nd.clone());
            let logits = self.decode_all(&self.inputs.batch, &other);
            self.tensor("alt_logits", &self.logits_shape(), logits);
        }
        if let Some(mask) = self.inputs.decoder_mask.clone() {
            let batch = Seq2SeqBatch { decoder_mask: Some(mask), ..self.inputs.batch.clone() };
            let logits = self.decode_all(&batch, encoder);
            self.tensor("decmask_logits", &self.logits_shape(), logits);
        }
    }

    fn decode_all(&self, batch: &Seq2SeqBatch, encoder: &EncoderOutput) -> Tensor<2> {
        let inputs = self.model.decoder_inputs(batch, encoder, &self.context);
        let embedded = self.model.embed(batch.decoder_input_ids.clone(), &self.context);
        let (hidden, _) = self.model.decoder().forward(embedded, &inputs, None, &self.context);
        self.model.logits(hidden, &self.context)
    }

    fn greedy(&mut self) {
        if let Some(steps) = self.inputs.greedy_steps {
            self.greedy_with_cache(steps);
        }
        if let Some(steps) = self.inputs.uncached_greedy_steps {
            let ids = self.greedy_without_cache(steps);
            self.ids("greedy_nocache_ids", &[self.rows, steps + 1], ids);
        }
    }

    fn greedy_with_cache(&mut self, steps: usize) {
        let batch = &self.inputs.batch;
        let (input_ids, input_mask) = (batch.input_ids.clone(), batch.input_mask.clone());
        let mut logits: Vec<Vec<f32>> = Vec::new();
        let written = greedy(self.model, input_ids, input_mask, steps, &self.context, |step| {
            logits.push(step.logits.to_vec());
            true
        });
        let ids = self.padded(&written, steps);
        self.ids("greedy_ids", &[self.rows, steps + 1], ids);
        let (taken, vocabulary) = (logits.len(), self.context.model.vocab_size);
        let mut values = Vec::with_capacity(self.rows * taken * vocabulary);
        for row in 0..self.rows {
            for step in &logits {
                values.extend(step[row * vocabulary..][..vocabulary].iter().map(|&v| f64::from(v)));
            }
        }
        self.numbers("greedy_logits", &[self.rows, taken, vocabulary], values);
    }

    /// Decodes by running the whole prefix at each step, so that capacity acts on the decoder too.
    fn greedy_without_cache(&self, steps: usize) -> Vec<f64> {
        let (rows, c, batch) = (self.rows, self.context.model, &self.inputs.batch);
        let (pad, eos) = (c.pad_token_id as i32, c.eos_token_id as i32);
        let encoder = self.model.encode(batch.input_ids.clone(), batch.input_mask.clone(), &self.context);
        let mut prefix = vec![vec![pad]; rows];
        let mut written = vec![Vec::new(); rows];
        for length in 1..=steps {
            let batch = Seq2SeqBatch {
                decoder_input_ids: int_tensor(prefix.concat(), [rows * length], &self.device),
                weights: Tensor::ones([rows * length], &self.device),
                ..batch.clone()
            };
            let logits = self.decode_all(&batch, &encoder);
            let best: Vec<i32> = with_values(logits, |values| {
                let row = |row: usize| &values[((row + 1) * length - 1) * c.vocab_size..][..c.vocab_size];
                (0..rows).map(|r| argmax(row(r))).collect()
            });
            for (row, id) in best.into_iter().enumerate() {
                let ended = written[row].last() == Some(&eos);
                prefix[row].push(if ended { pad } else { id });
                if !ended {
                    written[row].push(id);
                }
            }
        }
        self.padded(&written, steps)
    }

    /// Rows of ids after the start token, padded. `[rows, steps + 1]`
    fn padded(&self, written: &[Vec<i32>], steps: usize) -> Vec<f64> {
        // Decoding starts with the padding id.
        let pad = f64::from(self.context.model.pad_token_id);
        let mut ids = Vec::with_capacity(written.len() * (steps + 1));
        for row in written {
            ids.push(pad);
            ids.extend((0..steps).map(|i| row.get(i).map_or(pad, |&id| f64::from(id))));
        }
        ids
    }
}

/// Integers of a tensor, exact.
pub(super) fn with_ids(ids: &Tensor<1, Int>) -> Vec<f64> {
    ids.clone().into_data().iter::<i64>().map(|id| id as f64).collect()
}
