//! [`crate::project`] and its relatives.

use crate::projection::{Add, Project, ProjectOnto};
use crate::torch::composed::composed_operation;

composed_operation!(Project, 2, 1, true, |_, [x, a]| [x.matmul(a)]);
composed_operation!(Project, 3, 2, true, |_, [x, a, b]| [x.matmul(a), x.matmul(b)]);
composed_operation!(Project, 4, 3, true, |_, [x, a, b, c]| [x.matmul(a), x.matmul(b), x.matmul(c)]);
composed_operation!(ProjectOnto, 3, 1, false, |_, [x, weight, residual]| [residual.addmm(x, weight)]);
composed_operation!(Add, 2, 1, false, |_, [a, b]| [a + b]);
