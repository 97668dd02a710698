//! Times every operation on a device at the sizes of T5-Base and Switch-Base.
//!
//! `measure [NAME]` prints the operations whose name holds NAME, all without one.

mod activation;
mod attention;
mod clock;
mod cross_entropy;
mod dispatch;
mod embedding;
mod noise;
mod norm;
mod optimizer;
mod product;
mod route;

fn main() {
    let wanted = std::env::args().nth(1).unwrap_or_default();
    let clock = clock::Clock::open(&wanted);
    clock.report();
    norm::run(&clock);
    noise::run(&clock);
    embedding::run(&clock);
    cross_entropy::run(&clock);
    attention::run(&clock);
    activation::run(&clock);
    dispatch::run(&clock);
    optimizer::run(&clock);
    route::run(&clock);
    product::run(&clock);
}
