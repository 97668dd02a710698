use std::time::Instant;
use switchyard_kernels::gemm::bench::*;
fn med(mut f: impl FnMut()) -> f64 {
    for _ in 0..3 {
        f();
    }
    let mut t: Vec<f64> = (0..15)
        .map(|_| {
            let s = Instant::now();
            f();
            s.elapsed().as_secs_f64()
        })
        .collect();
    t.sort_by(f64::total_cmp);
    t[7]
}
fn main() {
    for bf in [true, false] {
        let mut o = 0.0;
        let t = med(|| o = multiply_on_registers(2_000_000, bf));
        println!("peak bf16={bf} {:.0} GF", o / t / 1e9);
    }
    for (m, k, n) in [
        (2048, 256, 256),
        (2048, 256, 1024),
        (2048, 1024, 256),
        (512, 256, 256),
        (512, 256, 1024),
        (320, 256, 1024),
        (80, 256, 1024),
        (20, 256, 1024),
        (20, 1024, 256),
        (512, 256, 32128),
        (130, 256, 32128),
        (2048, 768, 3072),
        (4096, 1024, 4096),
    ] {
        for form in [Form::Plain, Form::RightTransposed, Form::LeftTransposed] {
            let mut p = Bf16Product::new(m, k, n, form);
            let tb = med(|| p.run());
            let mut q = F32Product::new(m, k, n, form);
            let tf = med(|| q.run());
            println!(
                "{m}x{k}x{n} {form:?}: bf16 {:.3} ms {:.0} GF; f32 {:.3} ms {:.0} GF",
                tb * 1e3,
                p.operations() / tb / 1e9,
                tf * 1e3,
                q.operations() / tf / 1e9
            );
        }
    }
}
