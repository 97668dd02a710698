//! The operations of a model one by one, forward and backward, and the optimizer.

use burn::tensor::{DType, Device, Tensor, TensorData};
use serde_json::{Value, json};
use switchyard_config::plan::PrecisionMode;
use switchyard_config::{ModelConfig, resolve_str};
use switchyard_kernels::optimizer::{Adafactor, AdafactorState, Adamw, AdamwState, adafactor, adamw};
use switchyard_kernels::{
    Activation, Attention, AttentionInputs, CrossEntropy, Element, ExpertRows, ExpertWeights,
    FeedForwardWeights, HeadLayout, HiddenDropout, NoiseKey, RouteOptions, TokenNoise, WeightGradients,
    attention, bf16, combine, cross_entropy, dispatch, expert_feed_forward, feed_forward, int_tensor,
    project_three, rms_norm_beside, route_top1, router_logits, with_gradient,
};

use super::gemm::{copy_bandwidth, median, peak_flops};
use super::synthetic_ids;
use crate::Outcome;
use crate::args::BenchLayerArguments;
use crate::commands::output;
use crate::job::share_cores;
use crate::report::in_options;

/// What an operation is measured against.
enum Work {
    /// Floating-point operations of its matrix products.
    Flops(f64),
    /// Bytes that it must read and write at least.
    Bytes(f64),
}

pub(crate) fn run(arguments: &BenchLayerArguments, device: &Device) -> anyhow::Result<Outcome> {
    share_cores(1);
    let text = format!(
        "name = \"bench\"\n[model]\npreset = \"{}\"\nnum_experts = {}\n[precision]\nmode = \"{}\"\n\
         [data]\nsources = [{{ path = \"synthetic\" }}]\n",
        arguments.preset, arguments.experts, arguments.precision
    );
    let plan = resolve_str(&text, &[]).map_err(in_options)?.plan;
    let bench = Bench {
        model: &plan.model,
        precision: plan.precision,
        batch: arguments.rows,
        length: arguments.inputs_length,
        rounds: arguments.rounds,
        device: device.clone().autodiff(),
    };
    let peak = peak_flops(plan.precision != PrecisionMode::Fp32, arguments.rounds);
    let bandwidth = copy_bandwidth(arguments.rounds.min(9));
    let mut rows = Vec::new();
    for (name, (seconds, work)) in [
        ("norm and residual", bench.norm()),
        ("query, key, value", bench.projections()),
        ("attention core", bench.attention()),
        ("feed-forward", bench.feed_forward()),
        ("router and plan", bench.router()),
        ("dispatch, combine", bench.permutation()),
        ("experts", bench.experts()),
        ("head, cross-entropy", bench.head()),
        ("Adafactor", bench.adafactor()),
        ("AdamW", bench.adamw()),
    ] {
        let mut row = json!({"name": name, "ms": seconds * 1e3});
        match work {
            Work::Flops(flops) => {
                row["gflops"] = json!(flops / seconds / 1e9);
                row["share_of_peak"] = json!(flops / seconds / peak);
            }
            Work::Bytes(bytes) => {
                row["gb_per_s"] = json!(bytes / seconds / 1e9);
                row["share_of_copy_bandwidth"] = json!(bytes / seconds / bandwidth);
            }
        }
        rows.push(row);
    }
    show(arguments, peak, bandwidth, &rows)
}

fn show(
    arguments: &BenchLayerArguments,
    peak: f64,
    bandwidth: f64,
    rows: &[Value],
) -> anyhow::Result<Outcome> {
    let threads = rayon::current_num_threads();
    if arguments.json {
        output::json(&json!({
            "preset": arguments.preset, "experts": arguments.experts, "precision": arguments.precision,
            "threads": threads, "peak_gflops": peak / 1e9, "copy_gb_per_s": bandwidth / 1e9,
            "operations": rows,
        }))?;
        return Ok(Outcome::Done);
    }
    output::line(format!(
        "{threads} threads, peak {:.0} GFLOP/s, copies {:.1} GB/s read and written; forward and backward",
        peak / 1e9,
        bandwidth / 1e9
    ))?;
    for row in rows {
        let number = |key: &str| row[key].as_f64().unwrap_or_default();
        let rate = if row["gflops"].is_null() {
            format!(
                "{:>6.1} GB/s    {:>4.0} %",
                number("gb_per_s"),
                number("share_of_copy_bandwidth") * 100.0
            )
        } else {
            format!("{:>6.0} GFLOP/s {:>4.0} %", number("gflops"), number("share_of_peak") * 100.0)
        };
        let name = row["name"].as_str().unwrap_or_default();
        output::line(format!("{name:<20} {:>8.3} ms {rate}", number("ms")))?;
    }
    Ok(Outcome::Done)
}

/// Sizes of the measured operations.
struct Bench<'a> {
    model: &'a ModelConfig,
    precision: PrecisionMode,
    batch: usize,
    length: usize,
    rounds: usize,
    device: Device,
}

type Measured = (f64, Work);

impl Bench<'_> {
    fn tokens(&self) -> usize {
        self.batch * self.length
    }

    fn format(&self) -> DType {
        if self.precision == PrecisionMode::Fp32 { DType::F32 } else { DType::BF16 }
    }

    /// Bytes of an activation.
    fn width(&self) -> f64 {
        if self.precision == PrecisionMode::Fp32 { 4.0 } else { 2.0 }
    }

    fn leaf<const D: usize>(&self, shape: [usize; D], format: DType) -> Tensor<D> {
        let values = (0..shape.iter().product()).map(|i: usize| (i * 7 % 31) as f32 / 310.0 - 0.05);
        let data = match format {
            DType::BF16 => TensorData::new(values.map(bf16::round).collect::<Vec<_>>(), shape),
            _ => TensorData::new(values.collect::<Vec<f32>>(), shape),
        };
        Tensor::from_data(data, (&self.device, format)).require_grad()
    }

    fn tensor<const D: usize>(&self, shape: [usize; D]) -> Tensor<D> {
        self.leaf(shape, self.format())
    }

    /// Seconds of the forward and the backward pass of `outputs`.
    fn both_ways(&self, outputs: impl Fn() -> Vec<Tensor<2>>) -> f64 {
        let plain = self.device.clone().inner();
        let upstream = |out: &Tensor<2>| Tensor::<2>::ones(out.dims(), (&plain, out.dtype()));
        let gradients: Vec<Tensor<2>> = outputs().iter().map(upstream).collect();
        median(self.rounds, || {
            let seeds = outputs().into_iter().zip(&gradients);
            let seeds = seeds.map(|(out, gradient)| with_gradient(out, gradient.clone()));
            drop(seeds.reduce(|a, b| a + b).expect("one output at least").backward());
        })
    }

    fn norm(&self) -> Measured {
        let (n, d) = (self.tokens(), self.model.d_model);
        let (x, weight) = (self.tensor([n, d]), self.leaf([d], DType::F32));
        let seconds = self.both_ways(|| rms_norm_beside(x.clone(), weight.clone(), 1e-6).into());
        // Read x, write the norm; read x and both gradients, write one.
        (seconds, Work::Bytes(6.0 * (n * d) as f64 * self.width()))
    }

    fn projections(&self) -> Measured {
        let (n, d) = (self.tokens(), self.model.d_model);
        let inner = self.model.d_attention();
        let (x, w) = (self.tensor([n, d]), self.tensor([d, inner]));
        let seconds = self.both_ways(|| project_three(x.clone(), [w.clone(), w.clone(), w.clone()]).into());
        (seconds, Work::Flops(3.0 * 3.0 * 2.0 * (n * d * inner) as f64))
    }

    fn attention(&self) -> Measured {
        let (n, inner, s) = (self.tokens(), self.model.d_attention(), self.length);
        let heads = self.model.num_heads;
        let [q, k, v] = [0; 3].map(|_| self.tensor([n, inner]));
        let bias = self.leaf([heads, 2 * s - 1], DType::F32);
        let rules = Attention {
            batch: self.batch,
            num_heads: heads,
            queries: s,
            keys: s,
            key_room: s,
            causal: false,
            query_offset: 0,
            dropout: 0.0,
            noise: NOISE,
            first_row: 0,
            first_head: 0,
        };
        let seconds = self.both_ways(|| {
            let inputs = AttentionInputs {
                q: q.clone(),
                k: k.clone(),
                v: v.clone(),
                relative_bias: Some(bias.clone()),
                key_mask: None,
                segments: None,
            };
            vec![attention(inputs, rules)]
        });
        // Two products forward, five backward: the scores are computed again.
        (seconds, Work::Flops(7.0 * 2.0 * (n * s * inner) as f64))
    }

    fn feed_forward(&self) -> Measured {
        let (n, d, f) = (self.tokens(), self.model.d_model, self.model.d_ff);
        let (x, wi, wo) = (self.tensor([n, d]), self.tensor([d, f]), self.tensor([f, d]));
        let noise = TokenNoise { key: NOISE, first_row: 0, row_tokens: self.length, columns: None };
        let seconds = self.both_ways(|| {
            let weights = FeedForwardWeights { wi: wi.clone(), wi_gate: None, wo: wo.clone() };
            vec![feed_forward(x.clone(), weights, Activation::Relu, 0.0, noise, Some(x.clone()))]
        });
        (seconds, Work::Flops(3.0 * 2.0 * 2.0 * (n * d * f) as f64))
    }

    fn slots(&self) -> usize {
        (self.tokens() / self.model.num_experts).max(1)
    }

    fn route_options(&self) -> RouteOptions {
        let expert_capacity = Some(self.slots() * 5 / 4);
        RouteOptions { groups: 1, expert_capacity, token_mask: None, force_balanced: true }
    }

    fn router(&self) -> Measured {
        let (n, d, e) = (self.tokens(), self.model.d_model, self.model.num_experts);
        let kept = if self.precision == PrecisionMode::Bf16 { DType::BF16 } else { DType::F32 };
        let (x, w) = (self.tensor([n, d]), self.leaf([d, e], kept));
        let noise = TokenNoise { key: NOISE, first_row: 0, row_tokens: self.length, columns: None };
        let seconds = self.both_ways(|| {
            let [logits, x] = router_logits(x.clone(), w.clone(), 0.0, noise);
            let routing = route_top1(logits, self.route_options());
            let slots = routing.gates.dims()[0];
            vec![routing.gates.reshape([1, slots]), routing.mean_probability, x]
        });
        (seconds, Work::Flops(3.0 * 2.0 * (n * d * e) as f64))
    }

    fn permutation(&self) -> Measured {
        let (n, d, e) = (self.tokens(), self.model.d_model, self.model.num_experts);
        let x = self.tensor([n, d]);
        let logits = self.leaf([n, e], DType::F32);
        let routing = route_top1(logits, self.route_options());
        let seconds = self.both_ways(|| {
            let slots = dispatch(x.clone(), &routing.plan);
            vec![combine(slots, routing.gates.clone().detach(), &routing.plan, None)]
        });
        // Each way and back: a token is read and written.
        (seconds, Work::Bytes(8.0 * (n * d) as f64 * self.width()))
    }

    fn experts(&self) -> Measured {
        let (d, f, e, c) = (self.model.d_model, self.model.d_ff, self.model.num_experts, self.slots());
        let (x, wi, wo) = (self.tensor([e, c, d]), self.tensor([e, d, f]), self.tensor([e, f, d]));
        let seconds = self.both_ways(|| {
            let rows = ExpertRows {
                first_expert: 0,
                segments: 1,
                used: vec![c; e].into(),
                places: None,
                weight_gradients: WeightGradients::Summed,
            };
            let weights = ExpertWeights { wi: wi.clone(), wi_gate: None, wo: wo.clone() };
            let dropout = HiddenDropout { rate: 0.0, key: NOISE, columns: None };
            let out = expert_feed_forward(x.clone(), weights, Activation::Relu, dropout, rows, None, None);
            vec![out.reshape([e * c, d])]
        });
        (seconds, Work::Flops(3.0 * 2.0 * 2.0 * (e * c * d * f) as f64))
    }

    fn head(&self) -> Measured {
        let (n, d, v) = (self.tokens() / 4, self.model.d_model, self.model.vocab_size);
        let (hidden, head) = (self.tensor([n, d]), self.tensor([v, d]));
        let plain = self.device.clone().inner();
        let targets = int_tensor(synthetic_ids(n, v, 1), [n], &plain);
        let weights = Tensor::<1>::ones([n], &plain);
        let rules = CrossEntropy { layout: HeadLayout::VocabularyByModel, scale: 1.0, z_coefficient: 0.0 };
        let seconds = self.both_ways(|| {
            let (targets, weights, scale) = (targets.clone(), weights.clone(), Tensor::ones([1], &plain));
            let out = cross_entropy(hidden.clone(), head.clone(), targets, weights, scale, rules, None);
            vec![out.loss_sum.reshape([1, 1])]
        });
        (seconds, Work::Flops(3.0 * 2.0 * (n * d * v) as f64))
    }

    /// Parameters of all experts of one layer's input matrices, repeated to be larger than any cache.
    fn matrices(&self) -> [usize; 3] {
        let matrix = self.model.d_model * self.model.d_ff;
        [(1_usize << 25).div_ceil(matrix).max(self.model.num_experts), self.model.d_model, self.model.d_ff]
    }

    fn adafactor(&self) -> Measured {
        let shape = self.matrices();
        let len = shape.iter().product::<usize>();
        let rules = Adafactor {
            learning_rate: 1e-3,
            gradient_scale: 1.0,
            decay_exponent: 0.8,
            eps: 1e-30,
            update_clip: 1.0,
            weight_decay: 0.0,
            parameter_scale: Some(1e-3),
            update: 2,
        };
        let (mut values, mut state) = (vec![0.1; len], AdafactorState::new(&shape));
        let seconds = if self.precision == PrecisionMode::Fp32 {
            let gradient = vec![0.01_f32; len];
            median(self.rounds, || adafactor(&mut values, &gradient, &shape, &mut state, rules, &mut []))
        } else {
            let (gradient, mut rounded) = (vec![bf16::round(0.01); len], vec![bf16::default(); len]);
            median(self.rounds, || adafactor(&mut values, &gradient, &shape, &mut state, rules, &mut rounded))
        };
        (seconds, Work::Bytes(UPDATE_BYTES * len as f64))
    }

    fn adamw(&self) -> Measured {
        let [stack, rows, cols] = self.matrices();
        let len = stack * rows * cols;
        let rules = Adamw {
            learning_rate: 1e-3,
            gradient_scale: 1.0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            parameter_scale: None,
            update: 2,
        };
        let (mut values, mut state) = (vec![0.1; len], AdamwState::new(len));
        let matrix = rows * cols;
        let seconds = if self.precision == PrecisionMode::Fp32 {
            let gradient = vec![0.01_f32; len];
            median(self.rounds, || adamw(&mut values, &gradient, &mut state, matrix, rules, &mut []))
        } else {
            let (gradient, mut rounded) = (vec![bf16::round(0.01); len], vec![bf16::default(); len]);
            median(self.rounds, || adamw(&mut values, &gradient, &mut state, matrix, rules, &mut rounded))
        };
        (seconds, Work::Bytes((UPDATE_BYTES + 16.0) * len as f64))
    }
}

/// Bytes that an update reads and writes of a value beside its moments: the value twice and a float32
/// gradient, or a bfloat16 one and the rounded copy.
const UPDATE_BYTES: f64 = 12.0;

const NOISE: NoiseKey = NoiseKey { seed: 0, step: 0, site: 0 };
