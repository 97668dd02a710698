use proptest::prelude::*;

use super::blocked::{BLOCK_WORDS, PAST_CACHES_BYTES};
use super::*;
use crate::element::bf16;
use crate::memory::CACHE_LINE;

/// Numbers that bfloat16 holds exactly, without a pattern.
fn numbers(count: usize, salt: u32) -> Vec<f32> {
    let mut state = salt.wrapping_mul(0x9E37_79B9) | 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bf16::round((state >> 8) as f32 / 8_388_608.0 - 1.0).widen()
        })
        .collect()
}

fn rounded<E: Element>(values: &[f32]) -> Vec<E> {
    values.iter().map(|&value| E::round(value)).collect()
}

/// A factor stored as it is or transposed, with `gap` unused values after each row.
struct Stored<E> {
    data: Vec<E>,
    rows: usize,
    cols: usize,
    transposed: bool,
    gap: usize,
}

impl<E: Element> Stored<E> {
    fn new(values: &[f32], rows: usize, cols: usize, transposed: bool, gap: usize) -> Self {
        let (lines, width) = if transposed { (cols, rows) } else { (rows, cols) };
        let mut data = vec![E::round(f32::NAN); lines * (width + gap)];
        for line in 0..lines {
            for i in 0..width {
                let value = if transposed { values[i * cols + line] } else { values[line * cols + i] };
                data[line * (width + gap) + i] = E::round(value);
            }
        }
        Self { data, rows, cols, transposed, gap }
    }

    fn view(&self) -> View<'_, E> {
        if self.transposed {
            View::strided(&self.data, self.cols, self.rows, self.rows + self.gap).t()
        } else {
            View::strided(&self.data, self.rows, self.cols, self.cols + self.gap)
        }
    }
}

/// Sums in double precision, and sums of magnitudes, which bound the error of any order.
fn exact(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<(f64, f64)> {
    let at = |i: usize, j: usize| {
        let products = (0..k).map(|p| f64::from(a[i * k + p]) * f64::from(b[p * n + j]));
        products.fold((0.0, 0.0), |(sum, size), product| (sum + product, size + product.abs()))
    };
    (0..m * n).map(|i| at(i / n, i % n)).collect()
}

/// All paths, all ways to write, the two outer dimensions in any layout.
fn check<In: Multiply<Out> + Multiply<f32>, Out: Element>(sizes: [usize; 3], layout: [bool; 2], gap: usize) {
    let [m, k, n] = sizes;
    let (a, b) = (numbers(m * k, 1), numbers(k * n, 2));
    let other: Vec<Out> = rounded(&numbers(m * n, 3));
    let sums = exact(&a, &b, sizes);
    let a = Stored::<In>::new(&a, m, k, layout[0], gap);
    let b = Stored::<In>::new(&b, k, n, layout[1], gap);
    let ulp = if Out::PER_WORD == 2 { 1.0 / 256.0 } else { 1.0 / 8_388_608.0 };
    for path in CpuPath::available() {
        let others = View::new(&other, m, n);
        for write in [
            Write::Overwrite,
            Write::PastCaches,
            Write::Add,
            Write::Onto(others),
            Write::Relu,
            Write::Mask(others),
        ] {
            for right in ["plain", "packed"] {
                let width = n + gap;
                let mut out = vec![Out::round(7.0); m * width];
                for (out, other) in out.chunks_exact_mut(width).zip(other.chunks_exact(n.max(1))) {
                    out[..n].copy_from_slice(other);
                }
                let view = ViewMut::strided(&mut out, m, n, width);
                if right == "plain" {
                    multiply(path, view, a.view(), Right::Plain(b.view()), write, Threads::All);
                } else if path == CpuPath::best() {
                    matmul_packed(view, a.view(), &Packed::new(b.view()), write, Threads::One);
                } else {
                    continue;
                }
                for (i, out) in out.chunks_exact(width).enumerate() {
                    assert!(out[n..].iter().all(|v| v.widen() == 7.0), "{path:?} wrote beyond its columns");
                    for (j, out) in out[..n].iter().enumerate() {
                        let ((sum, size), other) = (sums[i * n + j], f64::from(other[i * n + j].widen()));
                        let expected = match write {
                            Write::Overwrite | Write::PastCaches => sum,
                            Write::Add | Write::Onto(_) => other + sum,
                            Write::Relu => sum.max(0.0),
                            Write::Mask(_) if other > 0.0 => sum,
                            Write::Mask(_) => 0.0,
                        };
                        let bound = size * (k as f64 + 2.0).sqrt() * 2e-7 + expected.abs() * ulp + 1e-30;
                        let error = (f64::from(out.widen()) - expected).abs();
                        assert!(
                            error <= bound,
                            "{path:?} {write:?} {right} {sizes:?} {layout:?} at {i},{j}: {error:e} > {bound:e}"
                        );
                    }
                }
            }
        }
    }
}

fn check_formats(sizes: [usize; 3], layout: [bool; 2], gap: usize) {
    check::<f32, f32>(sizes, layout, gap);
    check::<bf16, f32>(sizes, layout, gap);
    check::<bf16, bf16>(sizes, layout, gap);
}

#[test]
fn every_form_of_sizes_around_the_tiles() {
    let sizes = [
        [1, 1, 1],
        [1, 70, 130],
        [14, 2, 32],
        [15, 33, 33],
        [28, 16, 64],
        [29, 37, 31],
        [5, 18, 100],
        [43, 65, 17],
    ];
    for sizes in sizes {
        for layout in [[false, false], [false, true], [true, false], [true, true]] {
            for gap in [0, 3] {
                check_formats(sizes, layout, gap);
            }
        }
    }
}

#[test]
fn sums_over_several_blocks_and_no_summands() {
    check_formats([9, 2 * BLOCK_WORDS * 2 + 6, 35], [false, true], 0);
    check_formats([20, BLOCK_WORDS * 2 + 3, 40], [true, false], 0);
    check_formats([3, 0, 5], [false, false], 0);
    check_formats([3, 0, 64], [false, false], 0);
    check_formats([3, 0, 300], [false, true], 0);
    check_formats([1, 0, 100], [false, false], 0);
    check_formats([1, 0, 100], [false, true], 0);
}

#[test]
fn products_large_enough_for_many_tasks() {
    check_formats([600, 130, 300], [false, false], 0);
    check_formats([70, 600, 900], [true, false], 0);
}

#[test]
fn few_rows_read_a_factor_where_it_is() {
    // Rows of 1024 columns are taken in several blocks, also by several tasks.
    check_formats([5, 70, 1024], [false, false], 0);
    check_formats([20, 66, 1024], [false, false], 8);
    check_formats([24, 520, 2048], [false, false], 0);
    check_formats([3, BLOCK_WORDS * 4 + 2, 64], [false, false], 0);
    for rows in [2, 13, 16, 17, 31] {
        check_formats([rows, 66, 300], [false, true], 0);
        check_formats([rows, 66, 300], [true, true], 2);
    }
    check_formats([7, BLOCK_WORDS * 4 + 2, 240], [false, true], 0);
    check_formats([30, 600, 1000], [false, true], 0);
}

/// A product whose rows are the first of `a`, on ones.
fn first_rows<In: Multiply<Out> + Multiply<f32>, Out: Element>(
    a: &Stored<In>,
    b: &Stored<In>,
    rows: usize,
    add: bool,
) -> Vec<Out> {
    let mut out = vec![Out::round(1.0); rows * b.cols];
    let write = if add { Write::Add } else { Write::Overwrite };
    let a = View::new(&a.data[..rows * a.cols], rows, a.cols);
    matmul(ViewMut::new(&mut out, rows, b.cols), a, b.view(), write, Threads::All);
    out
}

#[test]
fn a_row_has_the_same_bits_among_few_rows_and_among_many() {
    fn check<In: Multiply<Out> + Multiply<f32>, Out: Element>(inner: usize, cols: usize, transposed: bool) {
        let a = Stored::<In>::new(&numbers(90 * inner, 1), 90, inner, false, 0);
        let b = Stored::<In>::new(&numbers(inner * cols, 2), inner, cols, transposed, 0);
        for add in [false, true] {
            let many: Vec<Out> = first_rows(&a, &b, 90, add);
            for rows in [2, 5, 14, 16, 20, 32, 33] {
                let few: Vec<Out> = first_rows(&a, &b, rows, add);
                assert!(few == many[..rows * cols], "{rows} rows, {inner} x {cols}, {transposed}, {add}");
            }
        }
    }
    for transposed in [false, true] {
        for (inner, cols) in [(64, 256), (320, 1024), (2 * BLOCK_WORDS + 64, 128), (4 * BLOCK_WORDS, 96)] {
            check::<f32, f32>(inner, cols, transposed);
            check::<bf16, f32>(inner, cols, transposed);
            check::<bf16, bf16>(inner, cols, transposed);
        }
    }
}

#[test]
fn outputs_past_the_caches_are_those_of_ordinary_stores() {
    fn check<In: Multiply<Out> + Multiply<f32>, Out: Element>() {
        let (rows, inner, cols) = (520, 10, 512);
        let a = Stored::<In>::new(&numbers(rows * inner, 1), rows, inner, true, 0);
        let b = Stored::<In>::new(&numbers(inner * cols, 2), inner, cols, false, 0);
        // From its first cache line on the buffer is written past the caches, an element later it is not.
        let mut buffer = vec![Out::default(); rows * cols + CACHE_LINE];
        let line = buffer.as_ptr().align_offset(CACHE_LINE);
        let mut product = |start: usize| {
            let out = &mut buffer[start..][..rows * cols];
            let view = ViewMut::new(out, rows, cols);
            matmul(view, a.view(), b.view(), Write::PastCaches, Threads::All);
            out.to_vec()
        };
        assert!(product(line) == product(line + 1));
    }
    assert!(520 * 512 * size_of::<bf16>() >= PAST_CACHES_BYTES, "large enough to go past the caches");
    check::<f32, f32>();
    check::<bf16, f32>();
    check::<bf16, bf16>();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn any_sizes(m in 1..60_usize, k in 1..80_usize, n in 1..80_usize, left: bool, right: bool, gap in 0..5_usize) {
        check_formats([m, k, n], [left, right], gap);
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for ([m, k, n], transposed) in
        [([700, 300, 500], false), ([20, 2400, 1024], false), ([20, 2400, 1000], true)]
    {
        let a = Stored::<bf16>::new(&numbers(m * k, 1), m, k, false, 0);
        let b = Stored::<bf16>::new(&numbers(k * n, 2), k, n, transposed, 0);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads start");
            let mut out = vec![0.0_f32; m * n];
            let view = ViewMut::new(&mut out, m, n);
            pool.install(|| matmul(view, a.view(), b.view(), Write::Overwrite, Threads::All));
            out
        };
        let one = run(1);
        assert!([2, 3, 7].into_iter().all(|threads| run(threads) == one), "{m} x {k} x {n}");
    }
}

#[test]
fn a_nan_passes_a_relu_and_no_other_does_not() {
    let (a, b) = ([bf16::round(f32::NAN), bf16::round(1.0)], [bf16::round(-2.0)]);
    for path in CpuPath::available() {
        let mut out = [bf16::round(0.0); 2];
        let right = Right::Plain(View::new(&b, 1, 1));
        multiply(path, ViewMut::new(&mut out, 2, 1), View::new(&a, 2, 1), right, Write::Relu, Threads::One);
        assert!(out[0].widen().is_nan() && out[1].widen() == 0.0, "{path:?}");
    }
}

#[test]
#[should_panic(expected = "matrix view leaves its slice")]
fn views_outside_their_slice_are_refused() {
    View::strided(&[0.0_f32; 5], 2, 2, 4);
}
