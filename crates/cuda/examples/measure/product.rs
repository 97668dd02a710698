//! Products of T5-Base at 64 rows of 512 and 114 tokens, and of the experts of Switch-Base.

use switchyard_cuda::{
    Address, Epilogue, Factor, Format, PRODUCT_WORKSPACE, Product, ProductAt, Rows, has_product, product,
    product_algorithms, product_by, product_choice,
};

use crate::clock::{Clock, Room};

/// What is timed of a product: its sizes as a forward pass has them, how the factors lie, and what follows.
struct Case {
    name: &'static str,
    count: usize,
    sizes: [usize; 3],
    transposed: [bool; 2],
    adds: bool,
    epilogue: Epilogue,
}

const FORWARD: [bool; 2] = [false, false];
const OF_X: [bool; 2] = [false, true];
const OF_WEIGHT: [bool; 2] = [true, false];

pub(crate) fn run(clock: &Clock) {
    let plain = Epilogue::None;
    let case =
        |name, sizes, transposed| Case { name, count: 1, sizes, transposed, adds: false, epilogue: plain };
    let (n, d, f) = (32_768, 768, 3072);
    let hidden = case("product hidden", [n, d, f], FORWARD);
    let expert = Case { count: 32, ..case("product experts' hidden", [1280, d, f], FORWARD) };
    let cases = [
        case("product projection", [n, d, d], FORWARD),
        Case { adds: true, ..case("product projection onto", [n, d, d], FORWARD) },
        case("product projection of x", [n, d, d], OF_X),
        case("product projection of weight", [d, n, d], OF_WEIGHT),
        case("product q k v", [n, d, 3 * d], FORWARD),
        case("product q k v of x", [n, 3 * d, d], OF_X),
        case("product q k v of weight", [d, n, 3 * d], OF_WEIGHT),
        Case { name: "product hidden relu", epilogue: Epilogue::Relu, ..hidden },
        hidden,
        case("product of hidden", [n, d, f], OF_X),
        Case { adds: true, ..case("product output onto", [n, f, d], FORWARD) },
        case("product output", [n, f, d], FORWARD),
        case("product of hidden's x", [n, f, d], OF_X),
        case("product of wi", [d, n, f], OF_WEIGHT),
        case("product of wo", [f, n, d], OF_WEIGHT),
        case("product decoder projection", [7296, d, d], FORWARD),
        case("product decoder projection of weight", [d, 7296, d], OF_WEIGHT),
        case("product head", [7296, d, 32_128], OF_X),
        case("product head of x", [7296, 32_128, d], FORWARD),
        case("product head of weight", [32_128, 7296, d], OF_WEIGHT),
        Case { name: "product experts' hidden relu", epilogue: Epilogue::Relu, ..expert },
        expert,
        Case { count: 32, ..case("product of experts' hidden", [1280, d, f], OF_X) },
        Case { count: 32, ..case("product experts' output", [1280, f, d], FORWARD) },
        Case { count: 32, ..case("product of experts' wi", [d, 1280, f], OF_WEIGHT) },
        Case { count: 32, ..case("product of experts' wo", [f, 1280, d], OF_WEIGHT) },
    ];
    if clock.wants("product") {
        let workspace = clock.zeros(PRODUCT_WORKSPACE);
        cases.iter().for_each(|case| case.run(clock, &workspace));
    }
}

impl Case {
    fn product(&self) -> Product {
        let Self { count, sizes: [rows, inner, cols], transposed, adds, epilogue, .. } = *self;
        let step = |values| if count > 1 { values } else { 0 };
        let factor = |rows, cols, transposed| {
            let stride = if transposed { rows } else { cols };
            Factor { rows: Rows { stride, step: step(rows * cols) }, transposed }
        };
        let out = Rows { stride: cols, step: step(rows * cols) };
        Product {
            count,
            rows,
            inner,
            cols,
            format: Format::Bf16,
            tf32: false,
            a: factor(rows, inner, transposed[0]),
            b: factor(inner, cols, transposed[1]),
            out,
            onto: adds.then_some(out),
            epilogue,
        }
    }

    /// Times the algorithm that the library prefers and the one that is chosen.
    #[expect(clippy::print_stdout, reason = "an example prints")]
    fn run(&self, clock: &Clock, workspace: &Room) {
        let Self { name, count, sizes: [rows, inner, cols], adds, .. } = *self;
        let (gpu, asked) = (clock.queue().gpu, self.product());
        let name = format!("{name} {count} x [{rows}, {inner}, {cols}]");
        if !clock.times(&name) {
            return;
        }
        if !has_product(gpu, &asked).expect("the library answers") {
            println!("{name:<48} has no algorithm");
            return;
        }
        let a = clock.normal_bf16(count * rows * inner, 1.0, 1);
        let b = clock.normal_bf16(count * inner * cols, 0.03, 2);
        let (onto, out) = (clock.zeros(count * rows * cols * 2), clock.zeros(count * rows * cols * 2));
        let at = ProductAt {
            a: a.at(),
            b: b.at(),
            onto: if adds { onto.at() } else { Address::NONE },
            out: out.at(),
            workspace: workspace.at(),
        };
        let flops = 2.0 * (count * rows * inner * cols) as f64;
        let algorithms = product_algorithms(gpu, &asked).expect("the library answers");
        println!("{} algorithms, the first {}", algorithms.len(), algorithms[0]);
        // SAFETY: all rooms have the values of the product.
        clock.time(&format!("{name} first"), flops, 0.0, |queue| unsafe {
            product_by(queue, &algorithms[0], at, &asked)
        });
        // SAFETY: as above.
        clock.time(&format!("{name} tuned"), flops, 0.0, |queue| unsafe { product(queue, at, &asked) });
        if let Some(chosen) = product_choice(gpu, &asked).expect("the library answers") {
            println!("number {:?}: {chosen}", algorithms.iter().position(|algorithm| *algorithm == chosen));
        }
    }
}
