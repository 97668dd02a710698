//! Rows of tables, and gradients of tables against float64.

use switchyard_cuda::{Address, Format, LookedUp, Table, embedding, embedding_backward, embedding_workspace};
use switchyard_random::Philox;

use crate::support::{Buffer, assert_close, normal, queue};

/// Ids below `rows`: many rows once or never, `frequent` of a hundred at id 3.
fn ids(seed: u64, tokens: usize, rows: usize, frequent: u32) -> Vec<i32> {
    let mut words = Philox::new(seed).stream([0, 0, 0]);
    let mut id = || if words.below(100) < frequent { 3 % rows as u32 } else { words.below(rows as u32) };
    (0..tokens).map(|_| id() as i32).collect()
}

/// The row of `id`, if the table has it.
fn here(table: &Table, id: i32) -> Option<usize> {
    usize::try_from(id).ok().filter(|&row| row < table.rows)
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rows_are_looked_up() {
    for format in [Format::F32, Format::Bf16] {
        for (rows, width, tokens) in
            [(1, 8, 1), (50, 768, 203), (30, 1032, 77), (100, 64, 0), (1000, 24, 999)]
        {
            let sizes = Table { rows, width, format };
            let mut ids = ids(1, tokens, 2 * rows, 10);
            ids.iter_mut().step_by(9).for_each(|id| *id = -1);
            let table = normal(2, rows * width, format);
            let value = |token: usize, column: usize| {
                here(&sizes, ids[token]).map_or(0.0, |row| table[row * width + column])
            };
            let expected: Vec<f64> = (0..tokens * width).map(|i| value(i / width, i % width)).collect();
            let (at, ids) = (Buffer::floats(&table, format), Buffer::of(&ids));
            let out = Buffer::poisoned(tokens * width, format);
            // SAFETY: all buffers have the values of `sizes`.
            unsafe { embedding(queue(), [at.at(), ids.at(), out.at()], tokens, sizes) }.unwrap();
            assert_eq!(out.read_floats(format), expected, "{sizes:?} {tokens}");
        }
    }
}

/// Tables, tokens of both lists and how frequent one id is, of a hundred.
const CASES: [(Table, [usize; 2], u32); 11] = [
    (table(10, 8), [0, 0], 0),
    (table(10, 8), [1, 0], 0),
    (table(128, 64), [0, 100], 0),
    (table(1, 40), [300, 77], 100),
    (table(500, 24), [64, 64], 100),
    (table(1000, 768), [1500, 700], 10),
    (table(1000, 264), [5000, 3000], 30),
    (table(32_128, 8), [32_768, 7296], 10),
    (table(32_128, 16), [2000, 2049], 3),
    (table(70_000, 8), [9000, 10], 20),
    (table(262_144, 8), [4096, 0], 50),
];

const fn table(rows: usize, width: usize) -> Table {
    Table { rows, width, format: Format::F32 }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn gradients_of_all_occurrences_meet_in_the_table() {
    for format in [Format::F32, Format::Bf16] {
        for (case, (sizes, tokens, frequent)) in CASES.into_iter().enumerate() {
            let sizes = Table { format, ..sizes };
            let Table { rows, width, .. } = sizes;
            // Of a part of a table some ids stand in another part.
            let total = if case % 2 == 0 { rows + rows / 3 } else { rows };
            let ids = [(1, tokens[0]), (2, tokens[1])].map(|(seed, n)| ids(seed, n, total, frequent));
            let gradients = [(3, tokens[0]), (4, tokens[1])].map(|(seed, n)| normal(seed, n * width, format));
            let before = normal(5, rows * width, format);
            let mut sums = vec![0.0; rows * width];
            for (ids, gradients) in ids.iter().zip(&gradients) {
                for (&id, gradient) in ids.iter().zip(gradients.chunks(width)) {
                    let Some(row) = here(&sizes, id) else { continue };
                    for (sum, value) in sums[row * width..][..width].iter_mut().zip(gradient) {
                        *sum += value;
                    }
                }
            }
            let ids_at = [Buffer::of(&ids[0]), Buffer::of(&ids[1])];
            let gradients_at = gradients.map(|values| Buffer::floats(&values, format));
            let looked_up = |list: usize| LookedUp {
                ids: ids_at[list].at(),
                gradient: gradients_at[list].at(),
                tokens: tokens[list],
            };
            let mut lists = [looked_up(0), looked_up(1)];
            if tokens[1] == 0 {
                lists[1] = LookedUp::NONE;
            }
            let workspace = Buffer::of(&vec![0xFF_u8; embedding_workspace(&sizes, tokens[0] + tokens[1])]);
            let run = |gradient: Address, onto: bool| {
                // SAFETY: all buffers have the values of `sizes`.
                unsafe { embedding_backward(queue(), lists, gradient, workspace.at(), sizes, onto) }.unwrap();
                workspace.read::<u8>();
            };
            let what = format!("{sizes:?} {tokens:?}");
            let tolerance = if format == Format::F32 { 1e-4 } else { 1e-3 };
            let out = Buffer::poisoned(rows * width, format);
            run(out.at(), false);
            let found = out.read_floats(format);
            assert_close(&what, &found, &sums, tolerance, format);
            run(out.at(), false);
            assert_eq!(out.read_floats(format), found, "a second time, {what}");

            let out = Buffer::floats(&before, format);
            run(out.at(), true);
            let expected: Vec<f64> = sums.iter().zip(&before).map(|(sum, before)| sum + before).collect();
            let found = out.read_floats(format);
            assert_close(&format!("{what} onto"), &found, &expected, tolerance, format);
            for (i, (&found, &before)) in found.iter().zip(&before).enumerate() {
                assert!(sums[i] != 0.0 || found == before, "{what}: value {i} was touched");
            }
        }
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_rows_sum_depends_on_its_own_tokens_alone() {
    let (tokens, width, format) = (700, 16, Format::F32);
    let gradients = normal(1, tokens * width, format);
    let at = Buffer::floats(&gradients, format);
    // Every other token is one of row 5; what stands between moves its list about.
    let row = |others: &dyn Fn(usize) -> i32| {
        let ids: Vec<i32> = (0..tokens).map(|i| if i % 2 == 0 { 5 } else { others(i) }).collect();
        let sizes = Table { rows: 64, width, format };
        let ids = Buffer::of(&ids);
        let workspace = Buffer::of(&vec![0xFF_u8; embedding_workspace(&sizes, tokens)]);
        let out = Buffer::poisoned(64 * width, format);
        let lists = [LookedUp { ids: ids.at(), gradient: at.at(), tokens }, LookedUp::NONE];
        // SAFETY: all buffers have the values of `sizes`.
        unsafe { embedding_backward(queue(), lists, out.at(), workspace.at(), sizes, false) }.unwrap();
        out.read_floats(format)[5 * width..][..width].to_vec()
    };
    let expected = row(&|_| 63);
    assert_eq!(row(&|_| 0), expected);
    assert_eq!(row(&|i| (i % 64) as i32 & !1), expected);
    assert_eq!(row(&|_| -1), expected);
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_table_with_too_many_rows_is_an_error_that_says_what_would_do() {
    let sizes = Table { rows: 300_000, width: 8, format: Format::F32 };
    let lists = [LookedUp::NONE; 2];
    // SAFETY: nothing is started.
    let error = unsafe { embedding_backward(queue(), lists, Address::NONE, Address::NONE, sizes, false) }
        .unwrap_err();
    assert!(error.to_string().contains("262144"), "{error}");
}
