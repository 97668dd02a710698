//! A model's numbers beside those that another implementation recorded.
//!
//! A fixture is a safetensors file of inputs (`input_ids`, `attention_mask`, `labels`) and expected
//! arrays named as transformers names them. Every array that this module can compute is compared;
//! the caller learns which ones it could not.

use std::collections::BTreeMap;

use burn::tensor::{Device, Int, Tensor};
use switchyard_config::plan::RoutingConfig;
use switchyard_config::{ModelConfig, StackKind};
use switchyard_kernels::{int_tensor, with_values};
use switchyard_model::generate::greedy;
use switchyard_model::moe::RouterOutput;
use switchyard_model::t5::bucket;
use switchyard_model::{EncoderOutput, ForwardContext, Seq2SeqBatch, SwitchTransformer};

/// Numbers of any shape, row-major; integers exact.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f64>,
    /// Ids, choices and masks: must be equal.
    pub discrete: bool,
}

/// Arrays by name.
pub type Arrays = BTreeMap<String, Array>;

/// A fixture without the arrays that every comparison starts from.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FixtureError {
    /// An input is missing.
    #[error("the fixture has no array `{name}`; it needs input_ids, attention_mask and labels")]
    MissingInput {
        /// Its name.
        name: &'static str,
    },
    /// Inputs do not fit each other or the model.
    #[error("fixture array `{name}` {problem}")]
    BadInput {
        /// Its name.
        name: &'static str,
        /// What is wrong.
        problem: String,
    },
}

/// Largest allowed differences.
#[derive(Debug, Clone, Copy)]
pub struct Tolerances {
    /// Hidden states, logits and everything made of them.
    pub absolute: f64,
    /// Losses.
    pub loss: f64,
}

impl Default for Tolerances {
    /// What float32 on one CPU and another may differ by.
    fn default() -> Self {
        Self { absolute: 2e-4, loss: 5e-5 }
    }
}

/// One compared array.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Name.
    pub name: String,
    /// Largest absolute difference; of ids, 0 or 1; infinite for a wrong shape.
    pub difference: f64,
    /// Allowed difference.
    pub tolerance: f64,
}

impl Comparison {
    /// Whether the difference is allowed.
    pub fn passed(&self) -> bool {
        self.difference <= self.tolerance
    }
}

/// Compared arrays, and the expected ones that nothing was computed for.
#[derive(Debug, Clone, PartialEq)]
pub struct Verification {
    /// In the order of their names.
    pub compared: Vec<Comparison>,
    /// Names of arrays left out.
    pub not_compared: Vec<String>,
}

/// Computes and compares every array of `fixture` that this version can compute.
///
/// # Errors
/// [`FixtureError`] for missing inputs and ids outside the vocabulary.
pub fn verify(
    model: &SwitchTransformer,
    config: &ModelConfig,
    routing: &RoutingConfig,
    fixture: &Arrays,
    tolerances: Tolerances,
) -> Result<Verification, FixtureError> {
    let computed = Computation::new(model, config, routing, fixture)?.run();
    let mut verification = Verification { compared: Vec::new(), not_compared: Vec::new() };
    for (name, expected) in fixture {
        match computed.get(name) {
            Some(found) => {
                let tolerance = match (expected.discrete, name.contains("loss")) {
                    (true, _) => 0.0,
                    (false, true) => tolerances.loss,
                    (false, false) => tolerances.absolute,
                };
                let difference = difference(name, found, expected, fixture);
                verification.compared.push(Comparison { name: name.clone(), difference, tolerance });
            }
            None if INPUTS.contains(&name.as_str()) => {}
            None => verification.not_compared.push(name.clone()),
        }
    }
    Ok(verification)
}

const INPUTS: [&str; 5] =
    ["input_ids", "attention_mask", "labels", "alt_attention_mask", "decoder_attention_mask"];

fn difference(name: &str, found: &Array, expected: &Array, fixture: &Arrays) -> f64 {
    if name == "greedy_logits" {
        return greedy_logits_difference(found, expected, fixture);
    }
    if found.shape != expected.shape {
        return f64::INFINITY;
    }
    let pairs = found.values.iter().zip(&expected.values);
    if expected.discrete {
        return if pairs.clone().all(|(a, b)| a == b) { 0.0 } else { 1.0 };
    }
    pairs.map(|(a, b)| if a.is_nan() { f64::INFINITY } else { (a - b).abs() }).fold(0.0, f64::max)
}

/// Rows that have ended keep listing logits of padding, which mean nothing: only live steps count.
fn greedy_logits_difference(found: &Array, expected: &Array, fixture: &Arrays) -> f64 {
    let (Some(ids), &[rows, steps, vocabulary], &[_, found_steps, _]) =
        (fixture.get("greedy_ids"), &expected.shape[..], &found.shape[..])
    else {
        return f64::INFINITY;
    };
    let mut largest: f64 = 0.0;
    for row in 0..rows {
        let ids = &ids.values[row * (steps + 1)..][1..=steps];
        let live = ids.iter().position(|&id| id == 1.0).map_or(steps, |end| end + 1);
        if live > found_steps {
            return f64::INFINITY;
        }
        for step in 0..live {
            let a = &found.values[(row * found_steps + step) * vocabulary..][..vocabulary];
            let b = &expected.values[(row * steps + step) * vocabulary..][..vocabulary];
            largest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(largest, f64::max);
        }
    }
    largest
}

struct Computation<'a> {
    model: &'a SwitchTransformer,
    context: ForwardContext<'a>,
    fixture: &'a Arrays,
    device: Device,
    rows: usize,
    inputs_length: usize,
    targets_length: usize,
    batch: Seq2SeqBatch,
    out: Arrays,
}

/// The inputs of a fixture as a batch; labels of -100 carry no loss.
///
/// # Errors
/// [`FixtureError`] for missing inputs and ids outside the vocabulary.
pub fn fixture_batch(
    fixture: &Arrays,
    config: &ModelConfig,
    device: &Device,
) -> Result<Seq2SeqBatch, FixtureError> {
    let find = |name: &'static str| {
        let array = fixture.get(name).ok_or(FixtureError::MissingInput { name })?;
        match array.shape[..] {
            [rows, length] if rows > 0 && length > 0 => Ok((array, rows, length)),
            _ => Err(FixtureError::BadInput { name, problem: format!("has shape {:?}", array.shape) }),
        }
    };
    let ids = |name: &'static str, array: &Array| {
        let outside = array.values.iter().find(|&&id| id >= config.vocab_size as f64 || id < -100.0);
        match outside {
            Some(id) => Err(FixtureError::BadInput {
                name,
                problem: format!("holds id {id}, outside the vocabulary of {}", config.vocab_size),
            }),
            None => Ok(array.values.iter().map(|&id| id as i32).collect::<Vec<_>>()),
        }
    };
    let (input_ids, rows, inputs_length) = find("input_ids")?;
    let (mask, ..) = find("attention_mask")?;
    let (labels, label_rows, targets_length) = find("labels")?;
    if mask.shape != input_ids.shape || label_rows != rows {
        let problem = format!("has shape {:?} beside input_ids {:?}", mask.shape, input_ids.shape);
        return Err(FixtureError::BadInput { name: "attention_mask", problem });
    }
    let pad = config.pad_token_id as i32;
    let labels = ids("labels", labels)?;
    let targets: Vec<i32> = labels.iter().map(|&id| if id < 0 { pad } else { id }).collect();
    let mut decoder = vec![pad; targets.len()];
    for (to, from) in decoder.chunks_mut(targets_length).zip(targets.chunks(targets_length)) {
        to[1..].copy_from_slice(&from[..targets_length - 1]);
    }
    let mut batch = Seq2SeqBatch::from_ids(rows, ids("input_ids", input_ids)?, decoder, targets, pad, device);
    batch.input_mask = mask_tensor(mask, rows, inputs_length, device);
    batch.weights = labels.iter().map(|&id| if id < 0 { 0.0 } else { 1.0 }).collect();
    Ok(batch)
}

fn mask_tensor(mask: &Array, rows: usize, length: usize, device: &Device) -> Tensor<2, Int> {
    int_tensor(mask.values.iter().map(|&m| m as i32).collect(), [rows, length], device)
}

impl<'a> Computation<'a> {
    fn new(
        model: &'a SwitchTransformer,
        config: &'a ModelConfig,
        routing: &'a RoutingConfig,
        fixture: &'a Arrays,
    ) -> Result<Self, FixtureError> {
        let device = model.device().inner();
        let batch = fixture_batch(fixture, config, &device)?;
        let [rows, inputs_length] = batch.input_mask.dims();
        let targets_length = batch.weights.len() / rows;
        let context = ForwardContext::evaluation(config, routing);
        let out = Arrays::new();
        Ok(Self { model, context, fixture, device, rows, inputs_length, targets_length, batch, out })
    }

    fn run(mut self) -> Arrays {
        self.buckets();
        let (encoder, encoder_routers) = self.encoder_states();
        let decoder_routers = self.decoder_states(&encoder);
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

    fn put(&mut self, name: &str, shape: &[usize], values: Vec<f64>, discrete: bool) {
        self.out.insert(name.to_owned(), Array { shape: shape.to_vec(), values, discrete });
    }

    fn tensor<const D: usize>(&mut self, name: &str, shape: &[usize], tensor: Tensor<D>) {
        let values = with_values(tensor, |v| v.iter().map(|&v| f64::from(v)).collect());
        self.put(name, shape, values, false);
    }

    fn scalar(&mut self, name: &str, value: f64) {
        self.put(name, &[1], vec![value], false);
    }

    fn buckets(&mut self) {
        let c = self.context.model;
        for (stack, bidirectional) in [("encoder", true), ("decoder", false)] {
            let (buckets, distance) = (c.relative_attention_num_buckets, c.relative_attention_max_distance);
            let values = (-300..=300).map(|r| bucket(r, bidirectional, buckets, distance) as f64).collect();
            self.put(&format!("rel_bucket_{stack}"), &[601], values, true);
        }
    }

    fn encoder_states(&mut self) -> (EncoderOutput, Vec<RouterOutput>) {
        let (model, context) = (self.model, self.context);
        let inputs = model.encoder_inputs(&self.batch.input_mask, &context);
        self.position_bias("encoder", inputs.relative_bias.clone(), self.inputs_length);
        let stack = model.encoder();
        let mut hidden = stack.begin(model.embed(self.batch.input_ids.clone()), &inputs, &context);
        let (mut states, mut routers) = (vec![hidden.clone()], Vec::new());
        for (layer, block) in stack.blocks().iter().enumerate() {
            let (next, router) = block.forward(layer, hidden, &inputs, None, &context);
            states.push(next.clone());
            routers.extend(router);
            hidden = next;
        }
        let last = stack.finish(hidden, &inputs, &context);
        self.states("encoder", states, last.clone(), self.inputs_length);
        let output = EncoderOutput {
            hidden_nd: last,
            mask: self.batch.input_mask.clone(),
            rows: self.rows,
            routers: Vec::new(),
        };
        (output, routers)
    }

    fn decoder_states(&mut self, encoder: &EncoderOutput) -> Vec<RouterOutput> {
        let (model, context) = (self.model, self.context);
        let inputs = model.decoder_inputs(&self.batch, encoder, &context);
        self.position_bias("decoder", inputs.relative_bias.clone(), self.targets_length);
        let stack = model.decoder();
        let mut hidden = stack.begin(model.embed(self.batch.decoder_input_ids.clone()), &inputs, &context);
        let (mut states, mut routers) = (vec![hidden.clone()], Vec::new());
        for (layer, block) in stack.blocks().iter().enumerate() {
            let (next, router) = block.forward(layer, hidden, &inputs, None, &context);
            states.push(next.clone());
            routers.extend(router);
            hidden = next;
        }
        let last = stack.finish(hidden, &inputs, &context);
        self.states("decoder", states, last.clone(), self.targets_length);
        let ids = with_ids(&self.batch.decoder_input_ids);
        self.put("decoder_input_ids", &[self.rows, self.targets_length], ids, true);
        let logits = model.logits(last, &context);
        let shape = [self.rows, self.targets_length, context.model.vocab_size];
        self.tensor("logits", &shape, logits);
        routers
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
        self.put(&format!("{stack}_position_bias"), &[1, heads, length, length], values, false);
    }

    fn losses(&mut self) -> f64 {
        let output = self.model.loss(&self.batch, 0.0, &self.context).cross_entropy;
        let mut losses = with_values(output.token_loss, <[f32]>::to_vec);
        for (loss, weight) in losses.iter_mut().zip(&self.batch.weights) {
            *loss *= weight;
        }
        let count: f32 = self.batch.weights.iter().sum();
        let ce = losses.iter().map(|&l| f64::from(l)).sum::<f64>() / f64::from(count);
        let losses = losses.into_iter().map(f64::from).collect();
        self.put("token_loss", &[self.rows, self.targets_length], losses, false);
        self.scalar("ce_loss", ce);
        ce
    }

    /// All router arrays of a stack; returns its z and auxiliary loss as transformers 4 adds them.
    fn router_arrays(&mut self, stack: StackKind, routers: &[RouterOutput]) -> [f64; 2] {
        let name = stack.name();
        let table = RouterTable::new(routers, self.rows);
        let RouterTable { layers, tokens, experts, .. } = table;
        let (rows, length) = (self.rows, tokens / self.rows);
        let shape = [layers, rows, length];
        self.put(
            &format!("{name}_router_logits"),
            &[layers, rows, length, experts],
            table.logits.clone(),
            false,
        );
        self.put(&format!("{name}_router_prob"), &shape, table.best_probability(), false);
        self.put(&format!("{name}_expert_choice"), &shape, table.choice.clone(), true);
        self.put(&format!("{name}_expert_kept"), &shape, table.kept.clone(), true);
        // Transformers 4 reports a dropped token under expert 0.
        let index: Vec<f64> = table.choice.iter().zip(&table.kept).map(|(c, k)| c * k).collect();
        self.put(&format!("{name}_expert_index_hf4"), &shape, index.clone(), true);
        let (z, aux4, aux5) = (table.z(), table.pooled_balance(&index), table.pooled_balance(&table.choice));
        let counted = if layers == self.context.model.layers(stack) { 0.0 } else { 1.0 };
        self.scalar(&format!("{name}_z_loss"), z * counted);
        self.scalar(&format!("{name}_z_loss_ungated"), z);
        self.scalar(&format!("{name}_aux_loss"), aux4 * counted);
        self.scalar(&format!("{name}_aux_loss_hf5"), aux5 * counted);
        self.scalar(&format!("{name}_aux_loss_ungated_hf4"), aux4);
        let by_row = table.balance_per_layer(rows);
        self.put(&format!("{name}_balance_per_layer_row"), &[layers], by_row, false);
        self.put(&format!("{name}_balance_per_layer_all"), &[layers], table.balance_per_layer(1), false);
        self.put(&format!("{name}_z_per_layer"), &[layers], table.z_per_layer(), false);
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
        let (model, context) = (self.model, self.context);
        let d = context.model.d_model;
        let logits_shape = [self.rows, self.targets_length, context.model.vocab_size];
        if let Some(mask) = self.fixture.get("alt_attention_mask") {
            let mask = mask_tensor(mask, self.rows, self.inputs_length, &self.device);
            let other = model.encode(self.batch.input_ids.clone(), mask, &context);
            let shape = [self.rows, self.inputs_length, d];
            self.tensor("alt_encoder_last_hidden_state", &shape, other.hidden_nd.clone());
            let logits = self.decode_all(&self.batch.clone(), &other);
            self.tensor("alt_logits", &logits_shape, logits);
        }
        if let Some(mask) = self.fixture.get("decoder_attention_mask") {
            let mut batch = self.batch.clone();
            batch.decoder_mask = Some(mask_tensor(mask, self.rows, self.targets_length, &self.device));
            let logits = self.decode_all(&batch, encoder);
            self.tensor("decmask_logits", &logits_shape, logits);
        }
    }

    fn decode_all(&self, batch: &Seq2SeqBatch, encoder: &EncoderOutput) -> Tensor<2> {
        let inputs = self.model.decoder_inputs(batch, encoder, &self.context);
        let embedded = self.model.embed(batch.decoder_input_ids.clone());
        let (hidden, _) = self.model.decoder().forward(embedded, &inputs, None, &self.context);
        self.model.logits(hidden, &self.context)
    }

    fn greedy(&mut self) {
        let Some(expected) = self.fixture.get("greedy_ids") else { return };
        let steps = expected.shape[1] - 1;
        let mut logits: Vec<Vec<f32>> = Vec::new();
        let written = greedy(
            self.model,
            self.batch.input_ids.clone(),
            self.batch.input_mask.clone(),
            steps,
            &self.context,
            |step| {
                logits.push(step.logits.to_vec());
                true
            },
        );
        let ids = pad_ids(&written, steps);
        self.put("greedy_ids", &[self.rows, steps + 1], ids, true);
        let (taken, vocabulary) = (logits.len(), self.context.model.vocab_size);
        let mut values = Vec::with_capacity(self.rows * taken * vocabulary);
        for row in 0..self.rows {
            for step in &logits {
                values.extend(step[row * vocabulary..][..vocabulary].iter().map(|&v| f64::from(v)));
            }
        }
        self.put("greedy_logits", &[self.rows, taken, vocabulary], values, false);
        if self.fixture.contains_key("greedy_nocache_ids") {
            let ids = self.greedy_without_cache(steps);
            self.put("greedy_nocache_ids", &[self.rows, steps + 1], ids, true);
        }
    }

    /// Decodes by running the whole prefix at each step, so that capacity acts on the decoder too.
    fn greedy_without_cache(&self, steps: usize) -> Vec<f64> {
        let (rows, c) = (self.rows, self.context.model);
        let (pad, eos) = (c.pad_token_id as i32, c.eos_token_id as i32);
        let encoder =
            self.model.encode(self.batch.input_ids.clone(), self.batch.input_mask.clone(), &self.context);
        let mut prefix = vec![vec![pad]; rows];
        let mut written = vec![Vec::new(); rows];
        for length in 1..=steps {
            let mut batch = self.batch.clone();
            batch.decoder_input_ids = int_tensor(prefix.concat(), [rows * length], &self.device);
            batch.weights = vec![1.0; rows * length];
            let logits = self.decode_all(&batch, &encoder);
            let best: Vec<i32> = with_values(logits, |values| {
                let row = |row: usize| &values[((row + 1) * length - 1) * c.vocab_size..][..c.vocab_size];
                (0..rows).map(|r| switchyard_model::generate::argmax(row(r))).collect()
            });
            for (row, id) in best.into_iter().enumerate() {
                let ended = written[row].last() == Some(&eos);
                prefix[row].push(if ended { pad } else { id });
                if !ended {
                    written[row].push(id);
                }
            }
        }
        pad_ids(&written, steps)
    }
}

/// Rows of ids after a start token, padded with 0. `[rows, steps + 1]`
fn pad_ids(written: &[Vec<i32>], steps: usize) -> Vec<f64> {
    let mut ids = Vec::new();
    for row in written {
        ids.push(0.0);
        ids.extend((0..steps).map(|i| row.get(i).map_or(0.0, |&id| f64::from(id))));
    }
    ids
}

fn with_ids(ids: &Tensor<1, Int>) -> Vec<f64> {
    ids.clone().into_data().iter::<i64>().map(|id| id as f64).collect()
}

/// Router results of all sparse layers of a stack, `[layers, rows * length]`.
struct RouterTable {
    layers: usize,
    rows: usize,
    tokens: usize,
    experts: usize,
    logits: Vec<f64>,
    probabilities: Vec<f64>,
    log_z: Vec<f64>,
    choice: Vec<f64>,
    kept: Vec<f64>,
}

impl RouterTable {
    fn new(routers: &[RouterOutput], rows: usize) -> Self {
        let [tokens, experts] = routers[0].logits_ne.dims();
        let mut table = Self {
            layers: routers.len(),
            rows,
            tokens,
            experts,
            logits: Vec::new(),
            probabilities: Vec::new(),
            log_z: Vec::new(),
            choice: Vec::new(),
            kept: Vec::new(),
        };
        for router in routers {
            let logits: Vec<f64> =
                with_values(router.logits_ne.clone(), |l| l.iter().map(|&l| f64::from(l)).collect());
            for row in logits.chunks(experts) {
                let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = row.iter().map(|l| (l - largest).exp()).sum();
                table.probabilities.extend(row.iter().map(|l| (l - largest).exp() / total));
                table.log_z.push(largest + total.ln());
            }
            table.logits.extend(logits);
            table.choice.extend(with_ids(&router.routing.choice));
            let offsets = with_ids(&router.routing.plan.slot_offsets);
            table.kept.extend(offsets.windows(2).map(|o| o[1] - o[0]));
        }
        table
    }

    fn best_probability(&self) -> Vec<f64> {
        self.probabilities.chunks(self.experts).map(|row| row.iter().copied().fold(0.0, f64::max)).collect()
    }

    fn z(&self) -> f64 {
        self.log_z.iter().map(|z| z * z).sum::<f64>() / self.log_z.len() as f64
    }

    fn z_per_layer(&self) -> Vec<f64> {
        let mean = |layer: &[f64]| layer.iter().map(|z| z * z).sum::<f64>() / layer.len() as f64;
        self.log_z.chunks(self.tokens).map(mean).collect()
    }

    /// `experts * sum_e f_e P_e` over the given tokens, numbered across layers.
    fn balance(&self, tokens: impl Iterator<Item = usize> + Clone, index: &[f64]) -> f64 {
        let count = tokens.clone().count() as f64;
        let (mut f, mut p) = (vec![0.0; self.experts], vec![0.0; self.experts]);
        for token in tokens {
            f[index[token] as usize] += 1.0 / count;
            for (p, q) in p.iter_mut().zip(&self.probabilities[token * self.experts..]) {
                *p += q / count;
            }
        }
        self.experts as f64 * f.iter().zip(&p).map(|(f, p)| f * p).sum::<f64>()
    }

    /// Layers of a row pooled before the product, as transformers does; mean over rows.
    fn pooled_balance(&self, index: &[f64]) -> f64 {
        let length = self.tokens / self.rows;
        let row = |row: usize| {
            let tokens = (0..self.layers)
                .flat_map(move |layer| (0..length).map(move |t| layer * self.tokens + row * length + t));
            self.balance(tokens, index)
        };
        (0..self.rows).map(row).sum::<f64>() / self.rows as f64
    }

    /// Each layer alone, mean over `groups` equal runs of tokens.
    fn balance_per_layer(&self, groups: usize) -> Vec<f64> {
        let size = self.tokens / groups;
        let group = |layer: usize, g: usize| {
            let start = layer * self.tokens + g * size;
            self.balance(start..start + size, &self.choice)
        };
        (0..self.layers)
            .map(|layer| (0..groups).map(|g| group(layer, g)).sum::<f64>() / groups as f64)
            .collect()
    }
}
