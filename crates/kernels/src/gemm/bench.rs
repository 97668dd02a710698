//! Products to be timed, and the most that the CPU's multipliers can do.

use std::hint::black_box;

use multiversion::multiversion;
use rayon::prelude::*;

use super::{CpuPath, Multiply, Threads, View, ViewMut, Write, matmul};
use crate::element::{Element, bf16};

/// How the factors of a product lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Both row-major, as in `x w` of a forward pass.
    Plain,
    /// The right one transposed, as in `g w^T`: the gradient of an input.
    RightTransposed,
    /// The left one transposed, as in `x^T g`: the gradient of a weight.
    LeftTransposed,
}

/// `[rows, inner] x [inner, cols]` on numbers of one format, ready to run.
#[derive(Debug)]
pub struct Product<E> {
    sizes: [usize; 3],
    form: Form,
    a: Vec<E>,
    b: Vec<E>,
    out: Vec<E>,
}

impl<E: Element> Product<E> {
    /// Factors without a pattern.
    pub fn new(rows: usize, inner: usize, cols: usize, form: Form) -> Self {
        let numbers = |count: usize| (0..count).map(|i| E::round((i * 7 % 31) as f32 / 31.0 - 0.5)).collect();
        let sizes = [rows, inner, cols];
        Self { sizes, form, a: numbers(rows * inner), b: numbers(inner * cols), out: numbers(rows * cols) }
    }
}

impl<E: Multiply<E> + Multiply<f32>> Product<E> {
    /// Computes the product once, on all threads.
    pub fn run(&mut self) {
        let [m, k, n] = self.sizes;
        let left = self.form == Form::LeftTransposed;
        let right = self.form == Form::RightTransposed;
        let a = if left { View::new(&self.a, k, m).t() } else { View::new(&self.a, m, k) };
        let b = if right { View::new(&self.b, n, k).t() } else { View::new(&self.b, k, n) };
        matmul(ViewMut::new(&mut self.out, m, n), a, b, Write::Overwrite, Threads::All);
        black_box(&self.out);
    }
}

/// Runs a product of bfloat16 matrices.
pub type Bf16Product = Product<bf16>;

/// Runs a product of float32 matrices.
pub type F32Product = Product<f32>;

/// Multiply-adds on registers alone, on all threads at once; returns the floating-point operations done.
///
/// Timed, they give the peak that products are measured against. `bf16` asks for the instructions that
/// products of that format use.
pub fn multiply_on_registers(rounds: usize, format_is_bf16: bool) -> f64 {
    let threads = rayon::current_num_threads();
    (0..threads).into_par_iter().with_max_len(1).map(|_| one_thread(rounds, format_is_bf16)).sum()
}

#[cfg(target_arch = "x86_64")]
fn one_thread(rounds: usize, format_is_bf16: bool) -> f64 {
    match (CpuPath::best(), format_is_bf16) {
        // SAFETY: the path says that the CPU has the instructions.
        (CpuPath::Avx512Bf16, true) => unsafe { super::avx512::dots_on_registers(rounds) },
        // SAFETY: as above.
        (CpuPath::Avx512 | CpuPath::Avx512Bf16, _) => unsafe { super::avx512::fmas_on_registers(rounds) },
        _ => plainly(rounds),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn one_thread(rounds: usize, _: bool) -> f64 {
    plainly(rounds)
}

/// What the compiler makes of multiply-adds on an array that fills the registers.
#[multiversion(targets("x86_64+avx2+fma"))]
fn plainly(rounds: usize) -> f64 {
    const SUMS: usize = 96;
    let mut sums = [1.0_f32; SUMS];
    let factor: f32 = black_box(0.999);
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = if cfg!(target_arch = "x86_64") {
                sum.mul_add(factor, factor)
            } else {
                *sum * factor + factor
            };
        }
    }
    black_box(sums);
    (rounds * SUMS * 2) as f64
}
