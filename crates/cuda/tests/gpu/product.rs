//! Products against float64: every algorithm that the library offers, and the one that is chosen.

use std::sync::OnceLock;

use cudarc::driver::sys::CUgraphInstantiate_flags;
use cudarc::driver::sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
use switchyard_cuda::{
    Address, CudaError, Epilogue, Factor, Format, PRODUCT_WORKSPACE, Product, ProductAt, Queue, Rows, Stream,
    has_product, product, product_algorithms, product_by, product_choice,
};

use crate::support::{Buffer, assert_close, gpu, normal, queue};

/// A stack of matrices without gaps.
fn dense(rows: usize, cols: usize, count: usize) -> Rows {
    Rows { stride: cols, step: if count > 1 { rows * cols } else { 0 } }
}

/// A stack of matrices whose rows and matrices stand apart by whole pieces of 16 bytes.
fn gapped(rows: usize, cols: usize, count: usize) -> Rows {
    let stride = cols.next_multiple_of(8) + 24;
    Rows { stride, step: if count > 1 { rows * stride + 64 } else { 0 } }
}

type Lie = fn(usize, usize, usize) -> Rows;

/// `count` times `[rows, inner] x [inner, cols]`, all matrices as `lie` has them.
fn case(
    count: usize,
    [rows, inner, cols]: [usize; 3],
    transposed: [bool; 2],
    format: Format,
    lie: Lie,
) -> Product {
    let factor = |rows, cols, transposed| {
        let rows = if transposed { lie(cols, rows, count) } else { lie(rows, cols, count) };
        Factor { rows, transposed }
    };
    Product {
        count,
        rows,
        inner,
        cols,
        format,
        tf32: false,
        a: factor(rows, inner, transposed[0]),
        b: factor(inner, cols, transposed[1]),
        out: lie(rows, cols, count),
        onto: None,
        epilogue: Epilogue::None,
    }
}

/// Where value `[i, row, col]` of a stack lies.
fn place(rows: Rows, transposed: bool, [i, row, col]: [usize; 3]) -> usize {
    let (row, col) = if transposed { (col, row) } else { (row, col) };
    i * rows.step + row * rows.stride + col
}

/// `values`, `[count, rows, cols]`, as they lie, NaN between them.
fn laid_out(values: &[f64], [count, rows, cols]: [usize; 3], lie: Rows, transposed: bool) -> Vec<f64> {
    let mut all = Vec::new();
    for (at, &value) in values.iter().enumerate() {
        let index = [at / (rows * cols), at / cols % rows, at % cols];
        let place = place(lie, transposed, index);
        all.resize(all.len().max(place + 1), f64::NAN);
        all[place] = value;
    }
    assert_eq!(values.len(), count * rows * cols);
    all
}

/// The values of a stack, and whether nothing lies between them.
fn gathered(all: &[f64], [count, rows, cols]: [usize; 3], lie: Rows) -> Vec<f64> {
    let mut between = vec![true; all.len()];
    let mut values = Vec::with_capacity(count * rows * cols);
    for at in 0..count * rows * cols {
        let place = place(lie, false, [at / (rows * cols), at / cols % rows, at % cols]);
        between[place] = false;
        values.push(all[place]);
    }
    assert!(
        all.iter().zip(between).all(|(value, between)| !between || value.is_nan()),
        "written between rows"
    );
    values
}

/// Factors, and what is added to, on the device and beside it.
struct Inputs {
    product: Product,
    buffers: [Buffer; 3],
    /// `onto + a b`
    sums: Vec<f64>,
    onto: Vec<f64>,
}

/// The workspace of all products, which run one after the other.
fn workspace() -> Address {
    static ROOM: OnceLock<Buffer> = OnceLock::new();
    ROOM.get_or_init(|| Buffer::of(&vec![0_u8; PRODUCT_WORKSPACE])).at()
}

impl Inputs {
    fn new(product: Product, seed: u64) -> Self {
        let Product { count, rows, inner, cols, format, a, b, out, onto, .. } = product;
        let values = |seed, shape: [usize; 3]| normal(seed, shape.iter().product(), format);
        let (of_a, of_b) = (values(seed, [count, rows, inner]), values(seed + 1, [count, inner, cols]));
        let of_onto = values(seed + 2, [count, rows, cols]);
        let mut sums = vec![0.0; count * rows * cols];
        for (at, sum) in sums.iter_mut().enumerate() {
            let (i, row, col) = (at / (rows * cols), at / cols % rows, at % cols);
            let a = &of_a[(i * rows + row) * inner..][..inner];
            let b = of_b[i * inner * cols + col..].iter().step_by(cols);
            *sum = a.iter().zip(b).map(|(a, b)| a * b).sum();
            if onto.is_some() {
                *sum += of_onto[at];
            }
        }
        let buffers = [
            laid_out(&of_a, [count, rows, inner], a.rows, a.transposed),
            laid_out(&of_b, [count, inner, cols], b.rows, b.transposed),
            laid_out(&of_onto, [count, rows, cols], onto.unwrap_or(out), false),
        ];
        let buffers = buffers.map(|values| Buffer::floats(&values, format));
        Self { product, buffers, sums, onto: of_onto }
    }

    /// Room for the product: what it is added to if that is in place, else NaN.
    fn room(&self, in_place: bool) -> Buffer {
        let Product { count, rows, cols, out, format, .. } = self.product;
        let values = if in_place { self.onto.clone() } else { vec![f64::NAN; count * rows * cols] };
        Buffer::floats(&laid_out(&values, [count, rows, cols], out, false), format)
    }

    fn at(&self, out: &Buffer, in_place: bool) -> ProductAt {
        let [a, b, onto] = &self.buffers;
        let onto = match self.product.onto {
            Some(_) if in_place => out.at(),
            Some(_) => onto.at(),
            None => Address::NONE,
        };
        ProductAt { a: a.at(), b: b.at(), onto, out: out.at(), workspace: workspace() }
    }

    fn result(&self, out: &Buffer) -> Vec<f64> {
        let Product { count, rows, cols, out: lie, format, .. } = self.product;
        gathered(&out.read_floats(format), [count, rows, cols], lie)
    }

    /// By every algorithm, and last by [`product`] twice, whose bits must be the same.
    fn results(&self, in_place: bool) -> Vec<Vec<f64>> {
        let run = |launch: &dyn Fn(ProductAt) -> Result<(), CudaError>| {
            let out = self.room(in_place);
            launch(self.at(&out, in_place)).unwrap_or_else(|error| panic!("{:?}: {error}", self.product));
            self.result(&out)
        };
        let algorithms = product_algorithms(gpu(), &self.product).expect("the library answers");
        assert!(!algorithms.is_empty(), "{:?}", self.product);
        let mut results: Vec<Vec<f64>> = algorithms
            .iter()
            // SAFETY: all buffers have the values of the product.
            .map(|algorithm| run(&|at| unsafe { product_by(queue(), algorithm, at, &self.product) }))
            .collect();
        // SAFETY: as above.
        let chosen = [(); 2].map(|()| run(&|at| unsafe { product(queue(), at, &self.product) }));
        assert!(chosen[0] == chosen[1], "{:?} repeats", self.product);
        results.extend(chosen);
        results
    }

    fn tolerance(&self) -> f64 {
        match self.product {
            Product { format: Format::F32, tf32: true, .. } => 2e-3,
            Product { format: Format::F32, .. } => 1e-5,
            // The library rounds a product before it adds it: by half of the last of eight bits.
            Product { onto: Some(_), .. } => 6.0 / 512.0,
            _ => 1e-4,
        }
    }

    /// All results against what `expected` makes of the sums.
    fn check(&self, in_place: bool, expected: impl Fn(f64) -> f64) {
        let expected: Vec<f64> = self.sums.iter().map(|&sum| expected(sum)).collect();
        for (i, found) in self.results(in_place).iter().enumerate() {
            let what = format!("{:?}, in place {in_place}, algorithm {i}", self.product);
            assert_close(&what, found, &expected, self.tolerance(), self.product.format);
        }
    }
}

const TRANSPOSED: [[bool; 2]; 4] = [[false, false], [false, true], [true, false], [true, true]];

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn factors_lie_as_they_like() {
    for transposed in TRANSPOSED {
        for format in [Format::F32, Format::Bf16] {
            for (count, lie) in [(1, dense as Lie), (1, gapped), (3, dense), (3, gapped)] {
                let product = case(count, [136, 72, 200], transposed, format, lie);
                Inputs::new(product, 1).check(false, |sum| sum);
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_add_to_what_there_is() {
    for format in [Format::F32, Format::Bf16] {
        for (count, lie) in [(1, dense as Lie), (3, gapped)] {
            let product = case(count, [136, 72, 200], [false, true], format, lie);
            let added = Inputs::new(Product { onto: Some(product.out), ..product }, 3);
            added.check(true, |sum| sum);
            added.check(false, |sum| sum);
            let elsewhere = Some(gapped(136, 208, count));
            Inputs::new(Product { onto: elsewhere, ..product }, 5).check(false, |sum| sum);
        }
    }
}

/// Long sums, which algorithms may cut.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn sums_may_be_long() {
    for format in [Format::F32, Format::Bf16] {
        let product = case(1, [64, 8192, 96], [true, false], format, dense);
        Inputs::new(product, 7).check(false, |sum| sum);
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn tf32_rounds_factors() {
    let product = Product { tf32: true, ..case(1, [136, 72, 200], [false, false], Format::F32, dense) };
    Inputs::new(product, 9).check(false, |sum| sum);
}

/// Sizes that fill nothing; the library need not have them all.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn odd_sizes_have_products() {
    for transposed in TRANSPOSED {
        for format in [Format::F32, Format::Bf16] {
            for sizes in [[37, 53, 71], [1, 33, 5], [129, 1, 8], [7, 1000, 1]] {
                let product = case(1, sizes, transposed, format, dense);
                if has_product(gpu(), &product).expect("the library answers") {
                    Inputs::new(product, 11).check(false, |sum| sum);
                }
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn relu_is_part_of_a_product() {
    for format in [Format::F32, Format::Bf16] {
        for (count, cols) in [(1, 256), (1, 200), (3, 256), (3, 72)] {
            let product = case(count, [136, 72, cols], [false, false], format, dense);
            let relu = Inputs::new(Product { epilogue: Epilogue::Relu, ..product }, 13);
            if has_product(gpu(), &relu.product).expect("the library answers") {
                relu.check(false, |sum| sum.max(0.0));
            } else {
                assert!(format == Format::F32 || count > 1, "{product:?} is what a model needs");
            }
        }
    }
}

/// Large enough to be tuned, where what is added to must survive the timing.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn large_products_are_tuned() {
    for epilogue in [Epilogue::None, Epilogue::Relu] {
        let product = Product { epilogue, ..case(1, [512, 1032, 640], [false, true], Format::Bf16, dense) };
        for onto in [None, Some(product.out)] {
            let inputs = Inputs::new(Product { onto, ..product }, 21);
            let least = if epilogue == Epilogue::Relu { 0.0 } else { f64::NEG_INFINITY };
            if has_product(gpu(), &inputs.product).expect("the library answers") {
                inputs.check(onto.is_some(), |sum| sum.max(least));
            }
        }
    }
}

/// While a stream is captured, nothing is timed and nothing waited for.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_can_be_captured() {
    let inputs = Inputs::new(case(1, [104, 88, 120], [false, false], Format::Bf16, dense), 19);
    let (out, stream) = (inputs.room(false), gpu().context().new_stream().expect("a stream"));
    let at = inputs.at(&out, false);
    gpu().context().synchronize().expect("uploaded");
    stream.begin_capture(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).expect("capturing");
    let queue = Queue { gpu: gpu(), stream: Stream(stream.cu_stream()) };
    // SAFETY: all buffers have the values of the product.
    let launched = unsafe { product(queue, at, &inputs.product) };
    let graph = stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
    launched.expect("launched");
    graph.expect("captured").expect("a graph").launch().expect("launched");
    stream.synchronize().expect("no kernel failed");
    assert_close("captured", &inputs.result(&out), &inputs.sums, inputs.tolerance(), Format::Bf16);
    assert!(product_choice(gpu(), &inputs.product).expect("the library answers").is_some());
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn what_cannot_be_is_refused() {
    let fits = case(2, [16, 8, 24], [false, false], Format::Bf16, dense);
    let refused = [
        Product { inner: 0, ..fits },
        Product { out: Rows { stride: 23, ..fits.out }, ..fits },
        Product { out: Rows { step: 16 * 24 - 1, ..fits.out }, ..fits },
        Product { a: Factor { transposed: true, ..fits.a }, ..fits },
    ];
    for product in refused {
        assert!(!has_product(gpu(), &product).expect("an answer"), "{product:?}");
    }
    assert!(has_product(gpu(), &Product { rows: 0, ..fits }).expect("an answer"));
}
