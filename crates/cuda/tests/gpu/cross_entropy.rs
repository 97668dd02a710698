//! Cross-entropies and their gradients against float64.

use std::ops::Range;

use switchyard_cuda::{
    CrossEntropy, CrossEntropyAt, Format, ShardSums, cross_entropy, cross_entropy_joined,
    cross_entropy_shard, cross_entropy_sums,
};

use crate::support::{Buffer, assert_close, normal, queue};

const Z: f64 = 0.01;
const LOSS_SCALE: f64 = 0.25;

/// Rows and logits: every share of a row among threads, aligned and not.
const SIZES: [(usize, usize); 16] = [
    (1, 8),
    (5, 2),
    (9, 7),
    (40, 100),
    (3, 101),
    (4, 1000),
    (5, 4096),
    (3, 8192),
    (3, 16_384),
    (3, 16_385),
    (6, 32_128),
    (6, 32_127),
    (2, 32_768),
    (3, 50_257),
    (2, 70_000),
    (3, 70_001),
];

/// What is expected of each row.
struct Row {
    loss: f64,
    correct: f64,
    log_z: f64,
    gradients: Vec<f64>,
}

fn row(logits: &[f64], target: usize, weight: f64) -> Row {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|l| (l - largest).exp()).sum();
    let log_z = largest + total.ln();
    let factor = weight * LOSS_SCALE * (1.0 + 2.0 * Z * log_z);
    let mut gradients: Vec<f64> = logits.iter().map(|l| (l - log_z).exp() * factor).collect();
    gradients[target] -= weight * LOSS_SCALE;
    Row {
        loss: log_z - logits[target],
        correct: f64::from(u8::from(logits[target] >= largest)),
        log_z,
        gradients,
    }
}

/// Logits of some rows, with ties at the largest, and their targets.
fn batch(rows: usize, vocab: usize, format: Format) -> (Vec<f64>, Vec<i32>) {
    let mut logits: Vec<f64> = normal(1, rows * vocab, format).into_iter().map(|l| 4.0 * l).collect();
    let targets: Vec<i32> = (0..rows).map(|row| ((row * 7919 + vocab - 1) % vocab) as i32).collect();
    for (i, (logits, &target)) in logits.chunks_mut(vocab).zip(&targets).enumerate() {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        match i % 3 {
            1 => logits[target as usize] = largest,
            2 => logits[target as usize] = -100.0,
            _ => {}
        }
        if vocab > 4 && target != 3 {
            logits[3] = f64::NEG_INFINITY;
        }
    }
    (logits, targets)
}

fn weights(rows: usize) -> Vec<f32> {
    (0..rows).map(|row| [1.0, 0.0, 0.5, 2.0][row % 4]).collect()
}

/// What is expected of a batch with these [`weights`].
fn rows_of(logits: &[f64], targets: &[i32], vocab: usize) -> Vec<Row> {
    let rows = logits.chunks(vocab).zip(targets).zip(weights(targets.len()));
    rows.map(|((logits, &target), weight)| row(logits, target as usize, f64::from(weight))).collect()
}

fn tolerance(format: Format) -> f64 {
    if format == Format::F32 { 1e-4 } else { 1e-3 }
}

/// What a launch writes of every row.
struct Written {
    loss: Buffer,
    correct: Buffer,
    log_z: Buffer,
}

impl Written {
    fn of(rows: usize) -> Self {
        let [loss, correct, log_z] = [(); 3].map(|()| Buffer::poisoned(rows, Format::F32));
        Self { loss, correct, log_z }
    }

    fn check(&self, expected: &[Row], what: &str) {
        let column = |pick: fn(&Row) -> f64| expected.iter().map(pick).collect::<Vec<_>>();
        let found = [&self.loss, &self.correct, &self.log_z].map(|values| values.read_floats(Format::F32));
        let near = |found: &[f64], expected: &[f64]| {
            found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 2e-5)
        };
        assert!(near(&found[0], &column(|row| row.loss)), "{what}: losses {:?}", found[0]);
        assert_eq!(found[1], column(|row| row.correct), "{what}");
        assert!(near(&found[2], &column(|row| row.log_z)), "{what}: log_z {:?}", found[2]);
    }
}

/// Rows of logits of some ids, and all that kernels read and write beside them.
struct OnDevice {
    ids: Range<usize>,
    logits: Buffer,
    targets: Buffer,
    weights: Buffer,
    loss_scale: Buffer,
    written: Written,
}

impl OnDevice {
    fn of(batch: (&[f64], &[i32]), vocab: usize, ids: Range<usize>, format: Format) -> Self {
        let (logits, targets) = batch;
        let logits: Vec<f64> = logits.chunks(vocab).flat_map(|row| &row[ids.clone()]).copied().collect();
        Self {
            ids,
            logits: Buffer::floats(&logits, format),
            targets: Buffer::of(targets),
            weights: Buffer::of(&weights(targets.len())),
            loss_scale: Buffer::of(&[LOSS_SCALE as f32]),
            written: Written::of(targets.len()),
        }
    }

    fn at(&self) -> CrossEntropyAt {
        CrossEntropyAt {
            logits: self.logits.at(),
            targets: self.targets.at(),
            weights: self.weights.at(),
            loss_scale: self.loss_scale.at(),
            loss: self.written.loss.at(),
            correct: self.written.correct.at(),
            log_z: self.written.log_z.at(),
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn losses_and_gradients_are_those_of_the_formula() {
    for format in [Format::F32, Format::Bf16] {
        for (rows, vocab) in SIZES {
            let (logits, targets) = batch(rows, vocab, format);
            let expected = rows_of(&logits, &targets, vocab);
            let there = OnDevice::of((&logits, &targets), vocab, 0..vocab, format);
            let before = there.logits.read_floats(format);
            let mut rules =
                CrossEntropy { rows, vocab_size: vocab, format, z_coefficient: Z, gradients: false };
            let what = format!("{rules:?}");
            // SAFETY: all buffers have the values of `rules`.
            unsafe { cross_entropy(queue(), there.at(), rules) }.unwrap();
            there.written.check(&expected, &what);
            assert_eq!(there.logits.read_floats(format), before, "{what}");

            rules.gradients = true;
            // SAFETY: as above.
            unsafe { cross_entropy(queue(), there.at(), rules) }.unwrap();
            there.written.check(&expected, &what);
            let found = there.logits.read_floats(format);
            for (i, row) in expected.iter().enumerate() {
                let gradients = &found[i * vocab..][..vocab];
                assert_close(
                    &format!("{what} row {i}"),
                    gradients,
                    &row.gradients,
                    tolerance(format),
                    format,
                );
            }
        }
    }
}

/// Shards of a vocabulary, aligned and not; one has the id whose logits are minus infinity alone.
const SHARDS: [(usize, &[usize]); 8] = [
    (5, &[1, 4]),
    (6, &[3, 1, 2]),
    (9, &[8, 16]),
    (40, &[61, 39]),
    (3, &[104, 101, 4096]),
    (6, &[16_064, 16_064]),
    (3, &[16_385, 16_063]),
    (2, &[35_000, 35_001]),
];

/// What a row of some shards comes to.
#[derive(Debug, Clone, Copy)]
struct Sums {
    largest: f64,
    total: f64,
    target_logit: f64,
}

impl Sums {
    /// The largest logit of nothing, for kernels.
    const NONE: Self = Self { largest: -1e38_f32 as f64, total: 0.0, target_logit: 0.0 };

    fn of(logits: &[f64], target: Option<usize>) -> Self {
        let largest = logits.iter().copied().fold(Self::NONE.largest, f64::max);
        let total = logits.iter().map(|logit| (logit - largest).exp()).sum();
        Self { largest, total, target_logit: target.map_or(0.0, |target| logits[target]) }
    }

    fn joined(self, other: Self) -> Self {
        let largest = f64::max(self.largest, other.largest);
        let total = [self, other].iter().map(|sums| sums.total * (sums.largest - largest).exp()).sum();
        Self { largest, total, target_logit: self.target_logit + other.target_logit }
    }
}

/// [`Sums`] of many rows on the device.
struct SumsAt([Buffer; 3]);

impl SumsAt {
    fn poisoned(rows: usize) -> Self {
        Self([(); 3].map(|()| Buffer::poisoned(rows, Format::F32)))
    }

    fn of(rows: &[Sums]) -> Self {
        let column =
            |pick: fn(&Sums) -> f64| Buffer::floats(&rows.iter().map(pick).collect::<Vec<_>>(), Format::F32);
        Self([column(|row| row.largest), column(|row| row.total), column(|row| row.target_logit)])
    }

    fn at(&self) -> ShardSums {
        let [largest, total, target_logit] = self.0.each_ref().map(Buffer::at);
        ShardSums { largest, total, target_logit }
    }

    fn read(&self) -> Vec<Sums> {
        let [largest, total, target_logit] = self.0.each_ref().map(|column| column.read_floats(Format::F32));
        let rows = largest.into_iter().zip(total).zip(target_logit);
        rows.map(|((largest, total), target_logit)| Sums { largest, total, target_logit }).collect()
    }
}

impl OnDevice {
    /// What the kernel says that the rows come to, as float64 confirms.
    fn sums(&self, targets: &[i32], rules: CrossEntropy) -> Vec<Sums> {
        let (sums, logits) = (SumsAt::poisoned(rules.rows), self.logits.read_floats(rules.format));
        // SAFETY: all buffers have the values of `rules`.
        unsafe { cross_entropy_shard(queue(), self.at(), sums.at(), self.ids.start, rules) }
            .expect("launched");
        assert_eq!(self.logits.read_floats(rules.format), logits, "{rules:?}");
        let found = sums.read();
        for ((found, logits), &target) in found.iter().zip(logits.chunks(self.ids.len())).zip(targets) {
            let here = Some(target as usize).filter(|target| self.ids.contains(target));
            let expected = Sums::of(logits, here.map(|target| target - self.ids.start));
            let off = (found.total - expected.total).abs();
            assert!(off <= 1e-5 * expected.total, "{rules:?}: {found:?}, expected {expected:?}");
            let exact = |sums: &Sums| (sums.largest, sums.target_logit);
            assert_eq!(exact(found), exact(&expected), "{rules:?}");
        }
        found
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn shards_joined_by_hand_are_the_whole() {
    for (format, (rows, lengths)) in
        SHARDS.map(|shards| [(Format::F32, shards), (Format::Bf16, shards)]).concat()
    {
        let vocab = lengths.iter().sum();
        let (logits, targets) = batch(rows, vocab, format);
        let expected = rows_of(&logits, &targets, vocab);
        let rules = |shard: &OnDevice, gradients| {
            let vocab_size = shard.ids.len();
            CrossEntropy { rows, vocab_size, format, z_coefficient: Z, gradients }
        };
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        let ids = ends.zip(lengths).map(|(end, length)| end - length..end);
        let shards: Vec<_> = ids.map(|ids| OnDevice::of((&logits, &targets), vocab, ids, format)).collect();
        let mut all = vec![Sums::NONE; rows];
        for shard in &shards {
            let sums = shard.sums(&targets, rules(shard, false));
            all.iter_mut().zip(sums).for_each(|(all, sums)| *all = all.joined(sums));
        }
        let all = SumsAt::of(&all);
        let gradients = shards.iter().map(|shard| {
            let before = shard.logits.read_floats(format);
            for gradients in [false, true] {
                assert_eq!(shard.logits.read_floats(format), before, "read only without gradients");
                let rules = rules(shard, gradients);
                // SAFETY: all buffers have the values of `rules`.
                unsafe { cross_entropy_joined(queue(), shard.at(), all.at(), shard.ids.start, rules) }
                    .unwrap();
                shard.written.check(&expected, &format!("{rules:?}"));
            }
            shard.logits.read_floats(format)
        });
        let gradients: Vec<_> = gradients.collect();
        for (i, row) in expected.iter().enumerate() {
            let parts = gradients.iter().zip(lengths);
            let found = parts.flat_map(|(part, &length)| &part[i * length..][..length]).copied();
            let what = format!("{lengths:?} in {format:?}, row {i}");
            assert_close(&what, &found.collect::<Vec<_>>(), &row.gradients, tolerance(format), format);
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_chunk_may_begin_anywhere_in_the_rows() {
    let (rows, vocab, format) = (5, 64, Format::Bf16);
    let (logits, targets) = batch(rows, vocab, format);
    let expected: Vec<f64> =
        (0..rows).map(|at| row(&logits[at * vocab..][..vocab], targets[at] as usize, 1.0).loss).collect();
    let (logits, targets) = (Buffer::floats(&logits, format), Buffer::of(&targets));
    let (weights, loss_scale) = (Buffer::of(&[1.0_f32; 5]), Buffer::of(&[1.0_f32]));
    let [loss, correct, log_z] = [(); 3].map(|()| Buffer::poisoned(rows, Format::F32));
    for (first, rows) in [(0, 3), (3, 2), (5, 0)] {
        let at = CrossEntropyAt {
            logits: logits.at().plus(first * vocab * 2),
            targets: targets.at().plus(first * 4),
            weights: weights.at().plus(first * 4),
            loss_scale: loss_scale.at(),
            loss: loss.at().plus(first * 4),
            correct: correct.at().plus(first * 4),
            log_z: log_z.at().plus(first * 4),
        };
        let rules = CrossEntropy { rows, vocab_size: vocab, format, z_coefficient: 0.0, gradients: true };
        // SAFETY: all buffers have the values of `rules` behind their first row.
        unsafe { cross_entropy(queue(), at, rules) }.unwrap();
    }
    assert_close("loss", &loss.read_floats(Format::F32), &expected, 1e-5, Format::F32);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_target_outside_the_vocabulary_shows() {
    let logits = Buffer::floats(&[1.0; 16], Format::F32);
    let (targets, weights) = (Buffer::of(&[-1_i32, 8]), Buffer::of(&[1.0_f32; 2]));
    let loss_scale = Buffer::of(&[1.0_f32]);
    let [loss, correct, log_z] = [(); 3].map(|()| Buffer::poisoned(2, Format::F32));
    let at = CrossEntropyAt {
        logits: logits.at(),
        targets: targets.at(),
        weights: weights.at(),
        loss_scale: loss_scale.at(),
        loss: loss.at(),
        correct: correct.at(),
        log_z: log_z.at(),
    };
    let rules =
        CrossEntropy { rows: 2, vocab_size: 8, format: Format::F32, z_coefficient: 0.0, gradients: true };
    // SAFETY: all buffers have the values of `rules`.
    unsafe { cross_entropy(queue(), at, rules) }.unwrap();
    assert!(loss.read::<f32>().iter().all(|loss| loss.is_nan()));
    assert_eq!(correct.read::<f32>(), [0.0; 2]);
    assert_close("gradient", &logits.read_floats(Format::F32), &[0.125; 16], 1e-6, Format::F32);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_that_count_are_summed() {
    for rows in [0, 1, 511, 512, 7296] {
        let [mut loss, mut log_z] = [1, 2].map(|seed| normal(seed, rows, Format::F32));
        let weights: Vec<f64> = (0..rows).map(|row| [1.0, 0.0, 0.5][row % 3]).collect();
        let correct: Vec<f64> = (0..rows).map(|row| (row % 2) as f64).collect();
        for (row, &weight) in weights.iter().enumerate() {
            if weight == 0.0 {
                (loss[row], log_z[row]) = (f64::NAN, f64::INFINITY);
            }
        }
        let counted = |value: &dyn Fn(usize) -> f64| -> f64 {
            (0..rows).filter(|&row| weights[row] != 0.0).map(|row| weights[row] * value(row)).sum()
        };
        let expected = [
            counted(&|row| loss[row] + Z * log_z[row] * log_z[row]),
            counted(&|row| loss[row]),
            counted(&|row| correct[row]),
            counted(&|_| 1.0),
        ];
        let [loss, correct, log_z, weights] =
            [&loss, &correct, &log_z, &weights].map(|values| Buffer::floats(values, Format::F32));
        let sums = Buffer::poisoned(4, Format::F32);
        let at = CrossEntropyAt {
            logits: loss.at(),
            targets: loss.at(),
            weights: weights.at(),
            loss_scale: loss.at(),
            loss: loss.at(),
            correct: correct.at(),
            log_z: log_z.at(),
        };
        // SAFETY: the four buffers that are read have `rows` values.
        unsafe { cross_entropy_sums(queue(), at, rows, Z, sums.at()) }.unwrap();
        for (found, expected) in sums.read_floats(Format::F32).into_iter().zip(expected) {
            assert!((found - expected).abs() <= 1e-6 * expected.abs() + 1e-9, "{rows}: {found} {expected}");
        }
    }
}
