//! Products of matrices: by cuBLASLt in bfloat16 on a GPU, by LibTorch elsewhere.
//!
//! Factors are tensors as they are: cuBLASLt reads transposed views and parts of wider rows where they lie.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use switchyard_cuda::{
    Address, Epilogue, Factor, Format, PRODUCT_WORKSPACE, Product, ProductAt, Queue, Rows, has_product,
};
use tch::{Kind, Tensor};

use crate::torch::gpu::{queue, room, started, workspace};

/// `a b` of two matrices.
pub(crate) fn product(a: &Tensor, b: &Tensor) -> Tensor {
    let out = Tensor::empty([a.size()[0], b.size()[1]], (a.kind(), a.device()));
    product_into(&out, a, b);
    out
}

/// Writes `a b` of two matrices to `out`, which may be a part of wider rows.
pub(crate) fn product_into(out: &Tensor, a: &Tensor, b: &Tensor) {
    ALONE.into(&out.unsqueeze(0), &a.unsqueeze(0), &b.unsqueeze(0));
}

/// `onto + a b` of matrices.
pub(crate) fn product_onto(onto: &Tensor, a: &Tensor, b: &Tensor) -> Tensor {
    ALONE.onto(&onto.unsqueeze(0), &a.unsqueeze(0), &b.unsqueeze(0)).squeeze_dim(0)
}

/// Adds `a b` of two matrices to `sum`, which may be a part of wider rows.
pub(crate) fn add_product(sum: &Tensor, a: &Tensor, b: &Tensor) {
    ALONE.add_to(&mut sum.unsqueeze(0), &a.unsqueeze(0), &b.unsqueeze(0));
}

const ALONE: Products = Products { apart: false };

/// Products of the matrices of two stacks, `[n, rows, inner]` and `[n, inner, cols]`.
///
/// `apart` multiplies them one by one, so that the bits of a product do not depend on how many others there
/// are; then each matrix of the second stack may serve several of the first that follow each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Products {
    pub(crate) apart: bool,
}

impl Products {
    /// `a b`
    pub(crate) fn of(self, a: &Tensor, b: &Tensor) -> Tensor {
        let out = Tensor::empty([a.size()[0], a.size()[1], b.size()[2]], (a.kind(), a.device()));
        self.into(&out, a, b);
        out
    }

    /// Writes `a b` to `out`, which may be parts of wider rows.
    pub(crate) fn into(self, out: &Tensor, a: &Tensor, b: &Tensor) {
        if let Some(planned) = self.planned(a, b, Some(out), None, Epilogue::None) {
            planned.launch(out, None);
            return;
        }
        let (count, served) = (a.size()[0], a.size()[0] / b.size()[0]);
        if count > 1 && !self.apart {
            let _ = a.bmm_out(out, b);
            return;
        }
        for i in 0..count {
            let _ = a.select(0, i).mm_out(&out.select(0, i), &b.select(0, i / served));
        }
    }

    /// `onto + a b`
    pub(crate) fn onto(self, onto: &Tensor, a: &Tensor, b: &Tensor) -> Tensor {
        if let Some(planned) = self.planned(a, b, None, Some(onto), Epilogue::None) {
            let out = planned.room();
            planned.launch(&out, Some(onto));
            return out;
        }
        let mut sum = onto.to_dtype(onto.kind(), false, true);
        self.add_to(&mut sum, a, b);
        sum
    }

    /// Adds `a b` to `sum`, which may be parts of wider rows.
    pub(crate) fn add_to(self, sum: &mut Tensor, a: &Tensor, b: &Tensor) {
        if let Some(planned) = self.planned(a, b, Some(sum), Some(sum), Epilogue::None) {
            planned.launch(sum, Some(sum));
            return;
        }
        let (count, served) = (a.size()[0], a.size()[0] / b.size()[0]);
        if count > 1 && !self.apart {
            let _ = sum.baddbmm_(a, b);
            return;
        }
        for i in 0..count {
            let _ = sum.select(0, i).addmm_(&a.select(0, i), &b.select(0, i / served));
        }
    }

    /// Writes `max(a b, 0)`, 0 for NaN too, to `out`; false where no product does that at once, and nothing is written.
    pub(crate) fn relu_into(self, out: &Tensor, a: &Tensor, b: &Tensor) -> bool {
        let planned = self.planned(a, b, Some(out), None, Epilogue::Relu);
        planned.inspect(|planned| planned.launch(out, None)).is_some()
    }

    /// The product as cuBLASLt takes it; `None` where it is not for it. `out` is new if it is not given.
    fn planned<'a>(
        self,
        a: &'a Tensor,
        b: &'a Tensor,
        out: Option<&Tensor>,
        onto: Option<&Tensor>,
        epilogue: Epilogue,
    ) -> Option<Planned<'a>> {
        let all = [Some(a), Some(b), out, onto];
        let queue = queue(a).filter(|_| all.into_iter().flatten().all(|x| x.kind() == Kind::BFloat16))?;
        let [stack, rows, inner] = sizes(a)?;
        let [_, _, cols] = sizes(b)?;
        let (of_a, of_b) = (factor(a)?, factor(b)?);
        let lying = |result: &Tensor| factor(result).filter(|lies| !lies.transposed).map(|lies| lies.rows);
        let dense = Rows { stride: cols, step: rows * cols };
        let of_out = match out {
            Some(out) => lying(out)?,
            None => Some(dense).filter(|_| cols.is_multiple_of(LANES))?,
        };
        let of_onto = match onto {
            Some(onto) => Some(lying(onto)?),
            None => None,
        };
        let count = if self.apart { 1 } else { stack };
        let alone = |rows: Rows| if count == 1 { Rows { step: 0, ..rows } } else { rows };
        let product = Product {
            count,
            rows,
            inner,
            cols,
            format: Format::Bf16,
            tf32: false,
            a: Factor { rows: alone(of_a.rows), ..of_a },
            b: Factor { rows: alone(of_b.rows), ..of_b },
            out: alone(of_out),
            onto: of_onto.map(alone),
            epilogue,
        };
        started(has_product(queue.gpu, &product)).then_some(Planned { queue, product, a, b })
    }
}

/// A product that cuBLASLt computes.
struct Planned<'a> {
    queue: Queue<'static>,
    product: Product,
    a: &'a Tensor,
    b: &'a Tensor,
}

impl Planned<'_> {
    /// Room for all products of the stack.
    fn room(&self) -> Tensor {
        room(&[self.a.size()[0] as usize, self.product.rows, self.product.cols], Kind::BFloat16, self.a)
    }

    /// `out` is what was planned with, or new room.
    fn launch(&self, out: &Tensor, onto: Option<&Tensor>) {
        let Self { queue, product, a, b } = self;
        let stack = a.size()[0];
        let workspace = product_workspace(*queue, a);
        for i in (0..stack).step_by(product.count) {
            let matrix = |tensor: &Tensor| begin_of(&tensor.select(0, i * tensor.size()[0] / stack));
            let at = ProductAt {
                a: matrix(a),
                b: matrix(b),
                onto: onto.map_or(Address::NONE, matrix),
                out: matrix(out),
                workspace,
            };
            // SAFETY: the tensors have the values of `product`, which was made from them.
            started(unsafe { switchyard_cuda::product(*queue, at, product) });
        }
    }
}

/// Values of 16 bytes.
const LANES: usize = 8;

/// The sizes of a stack in which there is something to multiply.
fn sizes(stack: &Tensor) -> Option<[usize; 3]> {
    let sizes: [i64; 3] = stack.size().try_into().ok()?;
    let sizes = sizes.map(|size| size as usize);
    sizes.iter().all(|&size| size > 0).then_some(sizes)
}

/// How a stack lies, if its rows, or those of its transposes, are values side by side that begin at whole pieces
/// of 16 bytes.
fn factor(stack: &Tensor) -> Option<Factor> {
    let [count, rows, cols] = sizes(stack)?;
    let strides: [i64; 3] = stack.stride().try_into().ok()?;
    let [step, of_row, of_col] = strides.map(|stride| stride as usize);
    let (transposed, stride) = match () {
        // Where there is one row or one column, its stride says nothing.
        () if of_col == 1 || cols == 1 => (false, if rows == 1 { cols } else { of_row }),
        () if of_row == 1 || rows == 1 => (true, if cols == 1 { rows } else { of_col }),
        () => return None,
    };
    let width = if transposed { rows } else { cols };
    let begins_well = (count == 1 || step.is_multiple_of(LANES))
        && (stack.data_ptr() as usize).is_multiple_of(16)
        && stride.is_multiple_of(LANES);
    let step = if count == 1 { 0 } else { step };
    (begins_well && stride >= width).then_some(Factor { rows: Rows { stride, step }, transposed })
}

/// Where the values of a tensor begin that may be a part of wider rows.
fn begin_of(tensor: &Tensor) -> Address {
    Address(tensor.data_ptr() as u64)
}

/// Workspace of all products on a stream, which run one after the other.
fn product_workspace(queue: Queue<'_>, like: &Tensor) -> Address {
    static ROOMS: Mutex<Option<HashMap<(tch::Device, usize), Tensor>>> = Mutex::new(None);
    let mut rooms = ROOMS.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (like.device(), queue.stream.0.addr());
    begin_of(rooms.get_or_insert_default().entry(key).or_insert_with(|| workspace(PRODUCT_WORKSPACE, like)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: [i64; 3]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, tch::Device::Cpu))
    }

    #[test]
    fn products_one_by_one_are_those_of_the_stack() {
        let near = |a: &Tensor, b: &Tensor| a.allclose(b, 1e-5, 1e-5, false);
        for (count, weights) in [(6, 6), (6, 3), (1, 1)] {
            let (a, b) = (random([count, 4, 5]), random([weights, 7, 5]));
            let repeated = b.repeat_interleave_self_int(count / weights, 0, None).transpose(1, 2);
            let apart = Products { apart: true };
            let product = apart.of(&a, &b.transpose(1, 2));
            assert!(near(&product, &a.bmm(&repeated)));
            let batched = Products { apart: false }.of(&a, &repeated);
            assert!(near(&product, &batched));
            for products in [apart, Products { apart: false }] {
                let mut sum = product.ones_like();
                assert!(near(&products.onto(&sum, &a, &repeated), &(&product + 1.0)));
                products.add_to(&mut sum, &a, &repeated);
                assert!(near(&sum, &(&product + 1.0)));
            }
        }
    }

    /// Where the operations are tested.
    fn device() -> tch::Device {
        let on_gpu = std::env::var("SWITCHYARD_TEST_DEVICE").is_ok_and(|name| name.starts_with("cuda"));
        if on_gpu { tch::Device::Cuda(0) } else { tch::Device::Cpu }
    }

    #[test]
    fn products_of_parts_of_wider_rows() {
        for (kind, off) in [(Kind::Float, 1e-5), (Kind::BFloat16, 2e-2)] {
            let wide = |shape: [i64; 2]| Tensor::randn(shape, (Kind::Float, device())).to_kind(kind);
            let (a, b) = (wide([40, 72]).narrow(1, 16, 24), wide([32, 48]).narrow(1, 8, 24).tr());
            let expected = a.to_kind(Kind::Double).matmul(&b.to_kind(Kind::Double));
            let near = |found: &Tensor, expected: &Tensor| {
                let error = (found.to_kind(Kind::Double) - expected).abs().max().double_value(&[]);
                assert!(error <= off * expected.abs().max().double_value(&[]), "{kind:?} is off by {error}");
            };
            near(&product(&a, &b), &expected);
            let all = wide([40, 64]).ones_like();
            let part = all.narrow(1, 8, 32);
            product_into(&part, &a, &b);
            near(&part, &expected);
            add_product(&part, &a, &b);
            near(&part, &(&expected * 2.0));
            let around = all.sum(Kind::Double) - part.sum(Kind::Double);
            assert_eq!(around.double_value(&[]), 40.0 * 32.0, "written beside the part");
        }
    }

    #[test]
    fn views_are_read_where_they_lie() {
        let all = random([4, 24, 48]);
        if !(all.data_ptr() as usize).is_multiple_of(16) {
            return;
        }
        let lies = |stride, step, transposed| Some(Factor { rows: Rows { stride, step }, transposed });
        assert_eq!(factor(&all), lies(48, 1152, false));
        assert_eq!(factor(&all.transpose(1, 2)), lies(48, 1152, true));
        assert_eq!(factor(&all.narrow(2, 16, 8)), lies(48, 1152, false));
        assert_eq!(factor(&all.narrow(2, 16, 8).transpose(1, 2)), lies(48, 1152, true));
        assert_eq!(factor(&all.narrow(0, 1, 1)), lies(48, 0, false));
        assert_eq!(factor(&all.narrow(1, 3, 1).narrow(2, 0, 16)), lies(16, 1152, false));
        assert_eq!(factor(&all.narrow(2, 3, 8)), None, "begins between pieces");
        assert_eq!(factor(&all.narrow(1, 0, 0)), None, "nothing");
        assert_eq!(factor(&all.transpose(0, 2)), None, "no side lies side by side");
        assert_eq!(factor(&random([2, 24, 20])), None, "rows begin between pieces");
    }
}
