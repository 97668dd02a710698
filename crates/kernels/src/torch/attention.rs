//! [`crate::attention`].

use burn_tch::TchTensor;
use switchyard_cuda::{
    Address, Attention, AttentionGradients, AttentionInputs, AttentionNoise, AttentionOutput, Format,
    HeadRows, Queue, Segments, attention_backward, attention_dropout, attention_dropout_bytes,
    attention_workspace,
};
use tch::{Device, Kind, Tensor};

use crate::attention::Core;
use crate::host::Held;
use crate::noise::Factor;
use crate::torch::gpu::{
    at, at_optional, by_rows, format, narrow, noise_key, queue, room, started, workspace,
};
use crate::torch::packed::{room_like, side_by_side};
use crate::torch::with_kernels::WithKernels;
use crate::torch::{contiguous, uploaded, wide};

const HIDDEN: f64 = f32::MIN as f64;

/// What kernels read and the forward pass wrote.
#[derive(Debug)]
pub(crate) struct Launched {
    rules: Attention,
    q: TchTensor,
    k: TchTensor,
    v: TchTensor,
    /// In float32, and the format it came in.
    bias: Option<(TchTensor, Kind)>,
    key_mask: Option<TchTensor>,
    /// Of queries and of keys.
    segments: Option<[TchTensor; 2]>,
    /// Which probabilities dropout keeps, a bit each.
    kept: Option<TchTensor>,
    out: TchTensor,
    log_sums: TchTensor,
}

/// Rows of all heads: of a tensor that lies row by row, or that [`by_rows`] returned.
fn rows(matrix: &Tensor) -> HeadRows {
    if matrix.is_contiguous() {
        return HeadRows { at: at(matrix), stride: matrix.size()[1] as usize };
    }
    let [stride, 1] = matrix.stride()[..] else { panic!("kernels take values of a row one after the other") };
    HeadRows { at: Address(matrix.data_ptr() as u64), stride: stride as usize }
}

impl Launched {
    fn inputs(&self) -> AttentionInputs {
        let optional = |tensor: Option<&TchTensor>| at_optional(tensor.map(|tensor| &tensor.tensor));
        AttentionInputs {
            q: rows(&self.q.tensor),
            k: rows(&self.k.tensor),
            v: rows(&self.v.tensor),
            relative_bias: optional(self.bias.as_ref().map(|(bias, _)| bias)),
            key_mask: optional(self.key_mask.as_ref()),
            segments: self
                .segments
                .as_ref()
                .map(|[queries, keys]| Segments { queries: at(&queries.tensor), keys: at(&keys.tensor) }),
            kept: optional(self.kept.as_ref()),
        }
    }

    fn output(&self) -> AttentionOutput {
        AttentionOutput { out: rows(&self.out.tensor), log_sums: at(&self.log_sums.tensor) }
    }

    /// Room for the gradients of queries, keys and values: side by side where these come of one product, whose
    /// gradients are then products with one matrix.
    fn room_for_gradients(&self) -> [Tensor; 3] {
        let [q, k, v] = [&self.q.tensor, &self.k.tensor, &self.v.tensor];
        if side_by_side(&[q, k, v]).is_some() {
            return room_like([q, k, v]);
        }
        let ([q], [k, v]) = (room_like([q]), room_like([k, v]));
        [q, k, v]
    }

    /// Gradients of queries, keys, values and, if it is wanted, the bias.
    fn gradients(&self, gradient: &Tensor, bias_wanted: bool) -> [Option<TchTensor>; 4] {
        let of_out = |tensor: &Tensor| (tensor.size(), tensor.kind());
        assert_eq!(of_out(gradient), of_out(&self.out.tensor), "gradients are like what they belong to");
        let [q, k, v] = self.room_for_gradients();
        let bias = self.bias.as_ref().filter(|_| bias_wanted);
        let bias = bias.map(|(bias, kind)| (bias.tensor.empty_like(), *kind));
        let scratch = workspace(attention_workspace(&self.rules), gradient);
        let to = AttentionGradients {
            out: rows(gradient),
            q: rows(&q),
            k: rows(&k),
            v: rows(&v),
            relative_bias: bias.as_ref().map_or(Address::NONE, |(bias, _)| at(bias)),
            workspace: at(&scratch),
        };
        let queue = queue(gradient).expect("kernels were chosen on a GPU");
        // SAFETY: all tensors have the sizes of the rules; scratch memory is reused in the order of the stream.
        started(unsafe { attention_backward(queue, self.inputs(), self.output(), to, self.rules) });
        let bias = bias.map(|(bias, kind)| bias.to_kind(kind));
        [Some(q), Some(k), Some(v), bias].map(|gradient| gradient.map(TchTensor::new))
    }
}

impl Core {
    fn composed(&self, [q, k, v]: [&Tensor; 3], bias: Option<&Tensor>) -> Tensor {
        let rules = &self.rules;
        let [batch, heads, s, t, room] =
            [rules.batch, rules.num_heads, rules.queries, rules.keys, rules.key_room].map(|n| n as i64);
        let by_head = |x: &Tensor, rows: i64| wide(x).view([batch, rows, heads, -1]).transpose(1, 2);
        let keys = |x: &Tensor| by_head(x, room).narrow(2, 0, t);
        let mut scores = by_head(q, s).matmul(&keys(k).transpose(2, 3));
        let position = |n: i64| Tensor::arange(n, (Kind::Int64, q.device()));
        if let Some(bias) = bias {
            let column = position(t).unsqueeze(0) - position(s).unsqueeze(1) + (s - 1);
            scores = &scores + wide(bias).index_select(1, &column.view([-1])).view([1, heads, s, t]);
        }
        let mut hidden = Tensor::zeros([1, 1, s, t], (Kind::Bool, q.device()));
        if let Some(mask) = &self.key_mask {
            hidden = hidden.logical_or(&mask.in_torch().view([batch, 1, 1, t]).eq(0));
        }
        if let Some([queries, keys]) = &self.segments {
            let [queries, keys] =
                [queries.in_torch().view([batch, 1, s, 1]), keys.in_torch().view([batch, 1, 1, t])];
            hidden = hidden.logical_or(&queries.ne_tensor(&keys));
        }
        if rules.causal {
            let last = position(s).unsqueeze(1) + rules.query_offset as i64;
            hidden = hidden.logical_or(&position(t).unsqueeze(0).gt_tensor(&last));
        }
        // Adding swallows the score and lets its gradient pass, which counts where a query sees nothing.
        let scores = scores + hidden.to_kind(Kind::Float) * HIDDEN;
        let mut probabilities = scores.softmax(-1, Kind::Float);
        if rules.dropout > 0.0 {
            probabilities = &probabilities * self.dropout_factors(q.device());
        }
        // What the kernels multiply is rounded as the activations are.
        let probabilities = wide(&probabilities.to_kind(q.kind()));
        let out = probabilities.matmul(&keys(v)).transpose(1, 2).reshape([batch * s, -1]);
        out.to_kind(q.kind())
    }

    /// `[batch, heads, queries, keys]`
    fn dropout_factors(&self, device: Device) -> Tensor {
        let rules = &self.rules;
        let factor = Factor::Dropout { rate: rules.dropout as f32 };
        let rows = (0..rules.batch).flat_map(|b| (0..rules.num_heads).map(move |head| (b, head)));
        let factors: Vec<f32> =
            rows.flat_map(|(b, head)| self.noise_words(b, head)).map(|word| factor.of(word)).collect();
        let shape = [rules.batch, rules.num_heads, rules.queries, rules.keys].map(|n| n as i64);
        uploaded(&factors, &shape, &Tensor::empty([0], (Kind::Float, device)))
    }

    /// The rules as kernels take them.
    fn kernel_rules(&self, q: &Tensor) -> Attention {
        let rules = &self.rules;
        let (_, width) = q.size2().expect("activations are matrices");
        Attention {
            batch: rules.batch,
            num_heads: rules.num_heads,
            d_kv: width as usize / rules.num_heads,
            queries: rules.queries,
            keys: rules.keys,
            key_room: rules.key_room,
            causal: rules.causal,
            query_offset: rules.query_offset,
            dropout: rules.dropout,
            format: format(q),
        }
    }

    /// Where kernels run on these queries, and their rules; `None` where there are none.
    fn kernels(&self, q: &Tensor) -> Option<(Queue<'static>, Attention)> {
        let queue = queue(q)?;
        let rules = self.kernel_rules(q);
        let has_kernel = match rules.format {
            Format::Bf16 => matches!(rules.d_kv, 64 | 128),
            Format::F32 => (1..=128).contains(&rules.d_kv),
        };
        (has_kernel && rules.keys > 0 && rules.fits(queue.gpu)).then_some((queue, rules))
    }

    fn launched(
        &self,
        queue: Queue<'_>,
        rules: Attention,
        [q, k, v]: [&TchTensor; 3],
        bias: Option<&TchTensor>,
    ) -> Launched {
        let [q, k, v] = [q, k, v].map(by_rows);
        let Attention { batch, num_heads, queries, keys, .. } = rules;
        let width = num_heads * rules.d_kv;
        let assert_shape = |tensor: &TchTensor, rows: usize, width: usize| {
            assert_eq!(
                tensor.tensor.size(),
                [rows as i64, width as i64],
                "tensors have the sizes of the rules"
            );
        };
        assert!([&k, &v].iter().all(|x| x.tensor.kind() == q.tensor.kind()), "one format for all three");
        assert_shape(&q, batch * queries, width);
        assert_shape(&k, batch * rules.key_room, width);
        assert_shape(&v, batch * rules.key_room, width);
        let bias = bias.map(|bias| {
            assert_shape(bias, num_heads, queries + keys - 1);
            let (bias, kind) = (contiguous(bias), bias.tensor.kind());
            (if kind == Kind::Float { bias } else { TchTensor::new(wide(&bias.tensor)) }, kind)
        });
        let integers = |held: &Held<i32>, of_row: usize| {
            let integers = TchTensor::new(narrow(held.in_torch()));
            assert_shape(&integers, batch, of_row);
            integers
        };
        let key_mask = self.key_mask.as_ref().map(|mask| integers(mask, keys));
        let segments = self.segments.as_ref();
        let segments =
            segments.map(|[of_queries, of_keys]| [integers(of_queries, queries), integers(of_keys, keys)]);
        let out = TchTensor::new(room(&[batch * queries, width], q.tensor.kind(), &q.tensor));
        let log_sums = TchTensor::new(room(&[batch, num_heads, queries], Kind::Float, &q.tensor));
        let kept = (rules.dropout > 0.0).then(|| self.draw(queue, rules, &q.tensor));
        let launched = Launched { rules, q, k, v, bias, key_mask, segments, kept, out, log_sums };
        // SAFETY: all tensors have the sizes of the rules.
        started(unsafe {
            switchyard_cuda::attention(queue, launched.inputs(), launched.output(), launched.rules)
        });
        launched
    }

    /// Which probabilities dropout keeps.
    fn draw(&self, queue: Queue<'_>, rules: Attention, like: &Tensor) -> TchTensor {
        let kept = workspace(attention_dropout_bytes(&rules), like);
        let noise = AttentionNoise {
            key: noise_key(self.rules.noise, like),
            first_row: self.rules.first_row,
            first_head: self.rules.first_head,
        };
        // SAFETY: the bits have room.
        started(unsafe { attention_dropout(queue, at(&kept), noise, rules) });
        TchTensor::new(kept)
    }
}

/// Queries, keys and values, and the bias if there is one.
fn told_apart<T>(inputs: &[T]) -> ([&T; 3], Option<&T>) {
    let [q, k, v, bias @ ..] = inputs else { panic!("attention takes three tensors at least") };
    ([q, k, v], bias.first())
}

/// With a bias or without.
impl<const N: usize> WithKernels<N, 1> for Core {
    type Kept = Box<Launched>;

    fn compose(&self, inputs: [&Tensor; N]) -> [Tensor; 1] {
        let (inputs, bias) = told_apart(&inputs);
        [self.composed(inputs.map(|input| *input), bias.copied())]
    }

    fn launch(&self, inputs: &[TchTensor; N]) -> Option<([TchTensor; 1], Box<Launched>)> {
        let (inputs, bias) = told_apart(inputs);
        let (queue, rules) = self.kernels(&inputs[0].tensor)?;
        let launched = self.launched(queue, rules, inputs, bias);
        Some(([launched.out.clone()], Box::new(launched)))
    }

    fn launch_backward(
        &self,
        launched: &Box<Launched>,
        [gradient]: [TchTensor; 1],
        wanted: [bool; N],
    ) -> [Option<TchTensor>; N] {
        let (_, bias_wanted) = told_apart(&wanted);
        let mut all = launched.gradients(&gradient.tensor, bias_wanted == Some(&true)).into_iter();
        std::array::from_fn(|_| all.next().flatten())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Distribution};

    use super::*;
    use crate::noise::NoiseKey;
    use crate::test_device;
    use crate::torch::floats;

    const RULES: crate::Attention = crate::Attention {
        batch: 2,
        num_heads: 3,
        queries: 70,
        keys: 70,
        key_room: 70,
        causal: true,
        query_offset: 0,
        dropout: 0.1,
        noise: NoiseKey { seed: 5, step: 1, site: 2 },
        first_row: 4,
        first_head: 0,
    };

    fn random(rows: usize, width: usize, format: DType) -> Tensor {
        let tensor = burn::tensor::Tensor::<2>::random([rows, width], Distribution::Default, &test_device());
        floats(tensor.cast(format)).tensor
    }

    /// The output, its gradients with respect to all inputs, and whether kernels read `inputs` where they lie.
    fn run(rules: crate::Attention, inputs: [Tensor; 4]) -> (Vec<Tensor>, bool) {
        let core = Core { rules, key_mask: None, segments: None };
        let inputs = inputs.map(TchTensor::new);
        let ([out], launched) = core.launch(&inputs).expect("attention of this size has a kernel");
        let gradients = core.launch_backward(&launched, [out.clone()], [true; 4]);
        let read = [&launched.q, &launched.k, &launched.v];
        let in_place = read.iter().zip(&inputs).all(|(a, b)| a.tensor.data_ptr() == b.tensor.data_ptr());
        let found = [Some(out)].into_iter().chain(gradients).map(|found| found.expect("wanted").tensor);
        (found.collect(), in_place)
    }

    #[test]
    fn parts_of_one_product_are_read_where_they_lie_and_so_are_their_gradients() {
        if queue(&random(1, 1, DType::F32)).is_none() {
            return;
        }
        for (format, d_kv) in [(DType::F32, 64), (DType::BF16, 64), (DType::BF16, 128)] {
            for to_itself in [true, false] {
                let queries = if to_itself { RULES.keys } else { 33 };
                let rules = crate::Attention { queries, causal: to_itself, ..RULES };
                let (tokens, width) = (RULES.batch * RULES.keys, RULES.num_heads * d_kv);
                let part = |of: &Tensor, i: usize| of.narrow(1, (i * width) as i64, width as i64);
                let bias = random(RULES.num_heads, queries + RULES.keys - 1, DType::F32);
                let inputs = if to_itself {
                    let packed = random(tokens, 3 * width, format);
                    [part(&packed, 0), part(&packed, 1), part(&packed, 2), bias]
                } else {
                    let packed = random(tokens, 2 * width, format);
                    [random(RULES.batch * queries, width, format), part(&packed, 0), part(&packed, 1), bias]
                };
                let (separate, _) = run(rules, inputs.each_ref().map(Tensor::contiguous));
                let (found, in_place) = run(rules, inputs);
                assert!(in_place);
                for (separate, found) in separate.iter().zip(&found) {
                    assert!(separate.equal(found));
                }
                let [_, q, k, v, _] = &found[..] else { panic!("an output and four gradients") };
                assert_eq!(side_by_side(&[q, k, v]).is_some(), to_itself);
                assert!(side_by_side(&[k, v]).is_some());
            }
        }
    }
}
