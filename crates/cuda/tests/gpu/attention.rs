//! Attention beside the same mathematics in float64.

use switchyard_cuda::{
    Address, Attention, AttentionGradients, AttentionInputs, AttentionNoise, AttentionOutput, CudaError,
    Format, Gpu, HeadRows, Queue, Segments, attention, attention_backward, attention_dropout,
    attention_dropout_bytes, attention_workspace,
};

use crate::noise::{STEP, dropout_factor, key, word};
use crate::support::{Buffer, assert_close, held, normal, queue, queues};

const RULES: Attention = Attention {
    batch: 2,
    num_heads: 2,
    d_kv: 64,
    queries: 70,
    keys: 90,
    key_room: 90,
    causal: false,
    query_offset: 0,
    dropout: 0.0,
    format: Format::Bf16,
};
const FIRST_ROW: u32 = 3;
const FIRST_HEAD: usize = 2;

/// What hides keys in one check.
#[derive(Default, Clone)]
struct Hidden {
    key_mask: Option<Vec<i32>>,
    segments: Option<(Vec<i32>, Vec<i32>)>,
    without_bias: bool,
    /// Queries, keys and values are parts of one row, and so are their gradients.
    packed: bool,
}

/// Values as the format holds them; q, k, v and the output's gradient are `[rows, num_heads * d_kv]`.
struct Case {
    rules: Attention,
    hidden: Hidden,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    gradient: Vec<f64>,
    bias: Vec<f64>,
}

#[derive(Default)]
struct Expected {
    out: Vec<f64>,
    log_sums: Vec<f64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    bias: Vec<f64>,
}

impl Case {
    fn new(rules: Attention, hidden: Hidden) -> Self {
        let Attention { batch, queries, keys, format, .. } = rules;
        let width = rules.num_heads * rules.d_kv;
        let values = |seed, rows: usize, deviation: f64| -> Vec<f64> {
            let values = normal(seed, batch * rows * width, format);
            values.into_iter().map(|v| held(v * deviation, format)).collect()
        };
        // Scores with a deviation of 1.
        let q = values(1, queries, 1.0 / (rules.d_kv as f64).sqrt());
        let bias = normal(5, rules.num_heads * (queries + keys - 1), Format::F32);
        Self {
            rules,
            hidden,
            q,
            k: values(2, keys, 1.0),
            v: values(3, keys, 1.0),
            gradient: values(4, queries, 1.0),
            bias,
        }
    }

    fn is_hidden(&self, row: usize, i: usize, j: usize) -> bool {
        let Attention { queries, keys, causal, query_offset, .. } = self.rules;
        self.hidden.key_mask.as_ref().is_some_and(|mask| mask[row * keys + j] == 0)
            || self.hidden.segments.as_ref().is_some_and(|(q, k)| q[row * queries + i] != k[row * keys + j])
            || (causal && j > i + query_offset)
    }

    fn expected(&self) -> Expected {
        let Attention { batch, num_heads, d_kv, queries, keys, dropout, .. } = self.rules;
        let width = num_heads * d_kv;
        let mut out = Expected {
            out: vec![0.0; self.q.len()],
            log_sums: Vec::new(),
            q: vec![0.0; self.q.len()],
            k: vec![0.0; self.k.len()],
            v: vec![0.0; self.v.len()],
            bias: vec![0.0; self.bias.len()],
        };
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let add = |to: &mut [f64], factor: f64, from: &[f64]| {
            for (to, from) in to.iter_mut().zip(from) {
                *to += factor * from;
            }
        };
        for (row, head) in (0..batch).flat_map(|row| (0..num_heads).map(move |head| (row, head))) {
            let of = |token: usize| token * width + head * d_kv..token * width + (head + 1) * d_kv;
            let bias_at = |i: usize, j: usize| head * (queries + keys - 1) + j + queries - 1 - i;
            for i in 0..queries {
                let at = of(row * queries + i);
                let (q, g) = (&self.q[at.clone()], &self.gradient[at.clone()]);
                let key = |j: usize| of(row * keys + j);
                let mut p: Vec<f64> = (0..keys)
                    .map(|j| {
                        let bias = if self.hidden.without_bias { 0.0 } else { self.bias[bias_at(i, j)] };
                        let score = dot(q, &self.k[key(j)]) + bias;
                        if self.is_hidden(row, i, j) { f64::MIN } else { score }
                    })
                    .collect();
                let most = p.iter().copied().fold(f64::MIN, f64::max);
                for p in &mut p {
                    *p = (*p - most).exp();
                }
                let total: f64 = p.iter().sum();
                let sees_nothing = most == f64::MIN;
                out.log_sums.push(if sees_nothing { f64::NEG_INFINITY } else { most + total.ln() });
                let factors: Vec<f64> = (0..keys)
                    .map(|j| {
                        if dropout == 0.0 {
                            return 1.0;
                        }
                        let element = ((FIRST_HEAD + head) * queries + i) * keys + j;
                        f64::from(dropout_factor(word(element, FIRST_ROW + row as u32, 0), dropout))
                    })
                    .collect();
                let mut mean = 0.0;
                let mut gp = vec![0.0; keys];
                for j in 0..keys {
                    p[j] /= total;
                    gp[j] = factors[j] * dot(g, &self.v[key(j)]);
                    mean += p[j] * gp[j];
                    add(&mut out.out[at.clone()], p[j] * factors[j], &self.v[key(j)]);
                    add(&mut out.v[key(j)], p[j] * factors[j], g);
                }
                for j in 0..keys {
                    let gs = p[j] * (gp[j] - mean);
                    add(&mut out.q[at.clone()], gs, &self.k[key(j)]);
                    add(&mut out.k[key(j)], gs, q);
                    out.bias[bias_at(i, j)] += gs;
                }
            }
        }
        out
    }
}

/// Three tensors on the device, packed into one or not.
struct Three {
    buffers: Vec<Buffer>,
    rows: [HeadRows; 3],
    width: usize,
}

impl Three {
    /// Of `q`, `k` and `v`; `None` for poison.
    fn new(case: &Case, values: Option<[&[f64]; 3]>, lens: [usize; 3]) -> Self {
        let (format, width) = (case.rules.format, case.rules.num_heads * case.rules.d_kv);
        let buffer = |values: Option<Vec<f64>>, len| match values {
            Some(values) => Buffer::floats(&values, format),
            None => Buffer::poisoned(len, format),
        };
        if case.hidden.packed {
            let tokens = lens[0] / width;
            let values = values.map(|[q, k, v]| {
                let row = |x: &[f64], token: usize| x[token * width..][..width].to_vec();
                (0..tokens).flat_map(|token| [row(q, token), row(k, token), row(v, token)].concat()).collect()
            });
            let buffer = buffer(values, 3 * tokens * width);
            let rows = [0, 1, 2].map(|part| HeadRows {
                at: buffer.at().plus(part * width * format.bytes()),
                stride: 3 * width,
            });
            return Self { buffers: vec![buffer], rows, width };
        }
        let buffers: Vec<Buffer> =
            (0..3).map(|part| buffer(values.map(|v| v[part].to_vec()), lens[part])).collect();
        let rows = [0, 1, 2].map(|part| HeadRows { at: buffers[part].at(), stride: width });
        Self { buffers, rows, width }
    }

    fn read(&self, part: usize, format: Format) -> Vec<f64> {
        let [packed] = &self.buffers[..] else { return self.buffers[part].read_floats(format) };
        let values = packed.read_floats(format);
        values
            .chunks(3 * self.width)
            .flat_map(|row| row[part * self.width..][..self.width].to_vec())
            .collect()
    }
}

/// Largest and root mean square difference, as parts of the root mean square of `expected`.
fn assert_near(what: &str, found: &[f64], expected: &[f64], format: Format, [most, mean]: [f64; 2]) {
    // A query with one key tells nothing of it: there the differences of equal sums are what is found.
    if expected.iter().all(|&e| e == 0.0) {
        return assert!(found.iter().all(|f| f.abs() < 1e-4), "{what}: {found:?}, expected zeros");
    }
    if format == Format::F32 {
        return assert_close(what, found, expected, 3e-5, format);
    }
    assert_close(what, found, expected, most, format);
    let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let error = squares(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    let scale = squares(&mut expected.iter().copied());
    assert!(error <= mean * mean * scale + 1e-12, "{what}: {:.5} of the values", (error / scale).sqrt());
}

/// Output, row sums and gradients on the device.
struct Found {
    out: Vec<f64>,
    log_sums: Vec<f32>,
    gradients: [Vec<f64>; 3],
    bias: Vec<f32>,
}

fn run(queue: Queue<'_>, case: &Case) -> Found {
    let rules = case.rules;
    let Attention { batch, num_heads, queries, format, .. } = rules;
    let inputs_at =
        Three::new(case, Some([&case.q, &case.k, &case.v]), [case.q.len(), case.k.len(), case.v.len()]);
    let [q, k, v] = inputs_at.rows;
    let width = num_heads * rules.d_kv;
    let bias = Buffer::of(&case.bias.iter().map(|&b| b as f32).collect::<Vec<_>>());
    let key_mask = case.hidden.key_mask.as_ref().map(|mask| Buffer::of(mask));
    let segments = case.hidden.segments.as_ref().map(|(q, k)| (Buffer::of(q), Buffer::of(k)));
    let kept = Buffer::of(&vec![0xFF_u8; attention_dropout_bytes(&rules)]);
    let step = Buffer::of(&[STEP]);
    let inputs = AttentionInputs {
        q,
        k,
        v,
        relative_bias: if case.hidden.without_bias { Address::NONE } else { bias.at() },
        key_mask: key_mask.as_ref().map_or(Address::NONE, Buffer::at),
        segments: segments.as_ref().map(|(q, k)| Segments { queries: q.at(), keys: k.at() }),
        kept: kept.at(),
    };
    let (out, gradient) = (Buffer::poisoned(case.q.len(), format), Buffer::floats(&case.gradient, format));
    let log_sums = Buffer::poisoned(batch * num_heads * queries, Format::F32);
    let to = AttentionOutput { out: HeadRows { at: out.at(), stride: width }, log_sums: log_sums.at() };
    let gradients = Three::new(case, None, [case.q.len(), case.k.len(), case.v.len()]);
    let [gq, gk, gv] = gradients.rows;
    let bias_gradient = Buffer::poisoned(case.bias.len(), Format::F32);
    let workspace = Buffer::of(&vec![0xFF_u8; attention_workspace(&rules)]);
    let backward = AttentionGradients {
        out: HeadRows { at: gradient.at(), stride: width },
        q: gq,
        k: gk,
        v: gv,
        relative_bias: if case.hidden.without_bias { Address::NONE } else { bias_gradient.at() },
        workspace: workspace.at(),
    };
    let noise = AttentionNoise { key: key(&step), first_row: FIRST_ROW, first_head: FIRST_HEAD };
    // SAFETY: all buffers have the sizes that `rules` name.
    unsafe {
        attention_dropout(queue, kept.at(), noise, rules).expect("started");
        attention(queue, inputs, to, rules).expect("started");
        attention_backward(queue, inputs, to, backward, rules).expect("started");
    }
    kept.read::<u8>();
    workspace.read::<u8>();
    Found {
        out: out.read_floats(format),
        log_sums: log_sums.read(),
        gradients: [0, 1, 2].map(|part| gradients.read(part, format)),
        bias: bias_gradient.read(),
    }
}

fn check(rules: Attention, hidden: &Hidden) {
    let rules = Attention { key_room: rules.keys, ..rules };
    let case = Case::new(rules, hidden.clone());
    let expected = case.expected();
    for queue in queues() {
        compare(&case, &run(queue, &case), &expected, queue.gpu);
    }
}

fn compare(case: &Case, found: &Found, expected: &Expected, gpu: &Gpu) {
    let (rules, hidden) = (case.rules, &case.hidden);
    let what = |name: &str| {
        let masks = (hidden.key_mask.is_some(), hidden.segments.is_some());
        let packed = hidden.packed;
        format!(
            "{name} of {rules:?}, key mask and segments {masks:?}, packed {packed}, \
             products of warpgroups {}, one pass {}",
            gpu.has_warpgroup_products(),
            gpu.one_pass_attention() == Some(true)
        )
    };
    assert_near(&what("out"), &found.out, &expected.out, rules.format, [0.02, 0.004]);
    for (found, expected) in found.log_sums.iter().zip(&expected.log_sums) {
        let found = f64::from(*found);
        let near = found == *expected || (found - expected).abs() < 2e-5 * (1.0 + expected.abs());
        assert!(near, "{}: {found}, expected {expected}", what("row sum"));
    }
    // The backward pass starts from the rounded output, which tells most where single keys prevail.
    let parts = [("q", &expected.q), ("k", &expected.k), ("v", &expected.v)];
    for ((name, expected), found) in parts.into_iter().zip(&found.gradients) {
        let name = what(&format!("gradient of {name}"));
        assert_near(&name, found, expected, rules.format, [0.1, 0.008]);
    }
    if !hidden.without_bias {
        let bias: Vec<f64> = found.bias.iter().copied().map(f64::from).collect();
        assert_near(&what("gradient of the bias"), &bias, &expected.bias, rules.format, [0.05, 0.006]);
    }
}

/// Every format and head size.
fn check_all(rules: Attention, hidden: &Hidden) {
    for d_kv in [64, 128] {
        check(Attention { d_kv, ..rules }, hidden);
    }
    check(Attention { d_kv: 20, format: Format::F32, ..rules }, hidden);
}

/// Keys that may be seen: some not, none from three quarters on, and none of a whole tile between.
fn holes(rules: &Attention) -> Vec<i32> {
    let of_row = |row: usize| {
        (0..rules.keys).map(move |j| {
            let seen = (j + row) % 5 != 1 && 4 * j <= 3 * rules.keys && !(64..130).contains(&j);
            i32::from(seen)
        })
    };
    (0..rules.batch).flat_map(of_row).collect()
}

/// Three documents in each row; some queries of the first row are in none.
fn documents(rules: &Attention) -> (Vec<i32>, Vec<i32>) {
    let of = |len: usize, i: usize| (i * 3 / len) as i32;
    let queries = (0..rules.batch * rules.queries).map(|at| {
        let (row, i) = (at / rules.queries, at % rules.queries);
        if row == 0 && i % 37 == 5 { 9 } else { of(rules.queries, i) }
    });
    let keys = (0..rules.batch * rules.keys).map(|at| of(rules.keys, at % rules.keys));
    (queries.collect(), keys.collect())
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn equals_the_reference() {
    check_all(RULES, &Hidden::default());
    check_all(Attention { queries: 150, keys: 150, ..RULES }, &Hidden { packed: true, ..Hidden::default() });
    for (queries, keys) in
        [(1, 1), (1, 200), (200, 1), (128, 64), (129, 65), (64, 129), (191, 193), (300, 33)]
    {
        check_all(Attention { batch: 1, queries, keys, ..RULES }, &Hidden::default());
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_of_the_length_of_training() {
    let rules = Attention { batch: 1, queries: 512, keys: 512, ..RULES };
    check(rules, &Hidden { packed: true, ..Hidden::default() });
    check(Attention { queries: 114, ..rules }, &Hidden { without_bias: true, ..Hidden::default() });
    let decoder = Attention { queries: 114, keys: 114, causal: true, ..rules };
    check(decoder, &Hidden { packed: true, ..Hidden::default() });
    check(Attention { dropout: 0.1, ..rules }, &Hidden { packed: true, ..Hidden::default() });
    let rules = Attention { batch: 2, queries: 500, keys: 500, ..RULES };
    for (causal, dropout) in [(false, 0.0), (true, 0.1)] {
        let rules = Attention { causal, dropout, ..rules };
        let documents = Some(documents(&rules));
        check(rules, &Hidden { segments: documents.clone(), packed: true, ..Hidden::default() });
        check(rules, &Hidden { segments: documents, key_mask: Some(holes(&rules)), ..Hidden::default() });
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn one_pass_backward_at_the_edges_of_its_tiles() {
    let packed = Hidden { packed: true, ..Hidden::default() };
    for len in [127, 128, 129, 255, 257, 384, 511, 513, 640] {
        check(Attention { batch: 1, queries: len, keys: len, ..RULES }, &packed);
    }
    for (queries, keys) in [(513, 1), (1, 513), (114, 512), (512, 114), (129, 640), (640, 129)] {
        check(Attention { batch: 1, queries, keys, ..RULES }, &Hidden::default());
    }
    // Tiles that no key of a block is seen from come first, and come between.
    check(Attention { batch: 1, queries: 700, keys: 700, causal: true, ..RULES }, &packed);
    let apart = Attention { queries: 640, keys: 640, ..RULES };
    let in_turn = |len: usize| (0..apart.batch * len).map(|at| (at % len / 128 % 2) as i32).collect();
    let segments = Some((in_turn(apart.queries), in_turn(apart.keys)));
    check(apart, &Hidden { segments, ..Hidden::default() });
    // The last whose sums fit into shared memory, and the first that takes two passes everywhere.
    for queries in [896, 897] {
        check(Attention { batch: 1, num_heads: 1, queries, keys: 130, ..RULES }, &Hidden::default());
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn cross_attention_has_no_bias() {
    let rules = Attention { keys: 330, ..RULES };
    let hidden = Hidden { without_bias: true, ..Hidden::default() };
    check_all(rules, &hidden);
    check_all(rules, &Hidden { key_mask: Some(holes(&rules)), ..hidden });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn masks_may_have_holes_and_segments_keep_apart() {
    let rules = Attention { queries: 200, keys: 260, ..RULES };
    check_all(rules, &Hidden { key_mask: Some(holes(&rules)), ..Hidden::default() });
    check_all(rules, &Hidden { segments: Some(documents(&rules)), ..Hidden::default() });
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn causal_with_and_without_offset() {
    let rules = Attention { causal: true, queries: 200, keys: 200, ..RULES };
    check_all(rules, &Hidden { packed: true, ..Hidden::default() });
    check_all(Attention { keys: 390, query_offset: 190, ..rules }, &Hidden::default());
    check_all(Attention { queries: 1, keys: 77, query_offset: 76, ..rules }, &Hidden::default());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn dropout_acts_on_the_probabilities_of_the_row_in_the_global_batch() {
    for (queries, keys) in [(140, 132), (33, 70), (40, 131)] {
        check_all(Attention { dropout: 0.3, queries, keys, ..RULES }, &Hidden::default());
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn all_rules_together() {
    let rules = Attention { causal: true, query_offset: 20, dropout: 0.25, queries: 150, keys: 170, ..RULES };
    check_all(
        rules,
        &Hidden { key_mask: Some(holes(&rules)), segments: Some(documents(&rules)), ..Hidden::default() },
    );
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_query_that_sees_nothing_gives_the_mean_of_the_values() {
    for causal in [false, true] {
        for dropout in [0.0, 0.2] {
            let rules = Attention { causal, dropout, queries: 140, keys: 140, ..RULES };
            let one_row = [vec![0; 140], vec![1; 140]].concat();
            check_all(rules, &Hidden { key_mask: Some(one_row), ..Hidden::default() });
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_bits_of_dropout_are_the_numbers_of_the_cpu() {
    let rules = Attention { dropout: 0.3, queries: 9, keys: 133, key_room: 133, ..RULES };
    let kept = Buffer::of(&vec![0xFF_u8; attention_dropout_bytes(&rules)]);
    let step = Buffer::of(&[STEP]);
    let noise = AttentionNoise { key: key(&step), first_row: FIRST_ROW, first_head: FIRST_HEAD };
    // SAFETY: `kept` has the bytes that were asked for.
    unsafe { attention_dropout(queue(), kept.at(), noise, rules).expect("started") };
    let kept: Vec<u32> = kept.read();
    let words = kept.len() / (rules.batch * rules.num_heads * rules.queries);
    for at in 0..rules.batch * rules.num_heads * rules.queries {
        let (row, head, i) =
            (at / rules.queries / rules.num_heads, at / rules.queries % rules.num_heads, at % rules.queries);
        for j in 0..rules.keys {
            let element = ((FIRST_HEAD + head) * rules.queries + i) * rules.keys + j;
            let factor = dropout_factor(word(element, FIRST_ROW + row as u32, 0), rules.dropout);
            let bit = kept[at * words + j / 32] >> (j % 32) & 1;
            assert_eq!(bit == 1, factor > 0.0, "row {row}, head {head}, query {i}, key {j}");
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn room_after_cached_keys_is_not_read() {
    for (queries, keys, room) in [(1, 70, 77), (1, 64, 65), (3, 40, 130)] {
        for format in [Format::F32, Format::Bf16] {
            let rules =
                Attention { queries, keys, causal: true, query_offset: keys - queries, format, ..RULES };
            let case = Case::new(rules, Hidden::default());
            let width = rules.num_heads * rules.d_kv;
            let roomy = |x: &[f64]| {
                let rest = vec![f64::NAN; (room - keys) * width];
                let values: Vec<f64> = x.chunks(keys * width).flat_map(|row| [row, &rest].concat()).collect();
                Buffer::floats(&values, format)
            };
            let (q, k, v) = (Buffer::floats(&case.q, format), roomy(&case.k), roomy(&case.v));
            let bias = Buffer::of(&case.bias.iter().map(|&b| b as f32).collect::<Vec<_>>());
            let out = Buffer::poisoned(case.q.len(), format);
            let log_sums = Buffer::poisoned(rules.batch * rules.num_heads * queries, Format::F32);
            let rows = |buffer: &Buffer| HeadRows { at: buffer.at(), stride: width };
            let inputs = AttentionInputs {
                q: rows(&q),
                k: rows(&k),
                v: rows(&v),
                relative_bias: bias.at(),
                key_mask: Address::NONE,
                segments: None,
                kept: Address::NONE,
            };
            let to = AttentionOutput { out: rows(&out), log_sums: log_sums.at() };
            // SAFETY: all buffers have the sizes that `rules` name.
            unsafe {
                attention(queue(), inputs, to, Attention { key_room: room, ..rules }).expect("started")
            };
            let expected = case.expected().out;
            assert_near("out with cached keys", &out.read_floats(format), &expected, format, [0.02, 0.006]);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn the_same_again_is_the_same() {
    let rules = Attention { batch: 3, queries: 300, keys: 300, key_room: 300, dropout: 0.1, ..RULES };
    let long = Attention { batch: 1, queries: 512, keys: 512, key_room: 512, dropout: 0.0, ..rules };
    for rules in [rules, long, Attention { causal: true, ..long }] {
        let case = Case::new(rules, Hidden { packed: true, ..Hidden::default() });
        for queue in queues() {
            let first = run(queue, &case);
            for _ in 0..5 {
                let again = run(queue, &case);
                assert!(again.out == first.out && again.log_sums == first.log_sums);
                assert!(again.gradients == first.gradients && again.bias == first.bias);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn nothing_has_no_gradient() {
    for (batch, queries) in [(0, 5), (2, 0)] {
        for format in [Format::F32, Format::Bf16] {
            let rules = Attention { batch, queries, format, ..RULES };
            for queue in queues() {
                let found = run(queue, &Case::new(rules, Hidden::default()));
                assert!(found.bias.iter().chain(&found.log_sums).all(|&g| g == 0.0), "{rules:?}");
                assert!(found.gradients.iter().flatten().all(|&g| g == 0.0), "{rules:?}");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn sizes_that_there_are_not_are_errors_that_say_what_would_do() {
    let rows = HeadRows { at: Address(256), stride: RULES.num_heads * RULES.d_kv };
    let inputs = AttentionInputs {
        q: rows,
        k: rows,
        v: rows,
        relative_bias: Address::NONE,
        key_mask: Address::NONE,
        segments: None,
        kept: Address::NONE,
    };
    let to = AttentionOutput { out: rows, log_sums: Address(256) };
    let message = |inputs, rules| {
        // SAFETY: nothing is started.
        let error = unsafe { attention(queue(), inputs, to, rules) }.unwrap_err();
        assert!(matches!(error, CudaError::Size { .. }), "{error}");
        error.to_string()
    };
    assert!(message(inputs, Attention { d_kv: 32, ..RULES }).contains("64 or 128"));
    assert!(message(inputs, Attention { keys: 91, ..RULES }).contains("room for 90"));
    assert!(message(inputs, Attention { dropout: 0.1, ..RULES }).contains("attention_dropout"));
    let odd = AttentionInputs { q: HeadRows { stride: 129, ..rows }, ..inputs };
    assert!(message(odd, RULES).contains("multiple of 8"));
}
