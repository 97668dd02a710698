//! What the loader hands to the trainer: plain integers on the host.

/// One batch, padded with 0. Row-major, every row of the same length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBatch {
    /// Rows.
    pub rows: usize,
    /// Encoder length.
    pub inputs_length: usize,
    /// Decoder length.
    pub targets_length: usize,
    /// Encoder ids, `[rows, inputs_length]`.
    pub input_ids: Vec<i32>,
    /// Target ids, `[rows, targets_length]`; loss is taken where they are not 0.
    pub target_ids: Vec<i32>,
    /// Number of the first row within its global batch: the key of per-row randomness.
    pub first_row: u32,
}

/// Which micro-batches of a global batch one of several readers takes: every `of`-th, from `index` on.
///
/// So the micro-batches themselves do not depend on the number of readers, only who takes which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// This reader.
    pub index: usize,
    /// Readers.
    pub of: usize,
    /// Rows of a micro-batch.
    pub micro_batch_rows: usize,
}

impl Share {
    /// All micro-batches.
    pub fn whole(micro_batch_rows: usize) -> Self {
        Self { index: 0, of: 1, micro_batch_rows }
    }

    /// First rows of this reader's micro-batches in a batch of `rows`.
    pub fn starts(self, rows: usize) -> impl Iterator<Item = usize> {
        (0..rows).step_by(self.micro_batch_rows).skip(self.index).step_by(self.of)
    }
}

impl HostBatch {
    /// The micro-batches of this batch that `share` takes; the last may be short.
    pub fn micro_batches(&self, share: Share) -> Vec<Self> {
        let starts = share.starts(self.rows);
        starts.map(|start| self.slice(start, share.micro_batch_rows.min(self.rows - start))).collect()
    }

    /// Tokens of inputs and targets that are not padding.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.iter().chain(&self.target_ids).filter(|&&id| id != 0).count()
    }

    /// Decoder inputs: targets shifted right, the first id 0. `[rows, targets_length]`
    pub fn decoder_input_ids(&self) -> Vec<i32> {
        let mut ids = vec![0; self.target_ids.len()];
        for (from, to) in self.target_ids.chunks(self.targets_length).zip(ids.chunks_mut(self.targets_length))
        {
            to[1..].copy_from_slice(&from[..self.targets_length - 1]);
        }
        ids
    }

    /// Targets that count in the loss.
    pub fn num_targets(&self) -> usize {
        self.target_ids.iter().filter(|&&id| id != 0).count()
    }

    /// This batch with rows of padding behind it, up to a multiple of `rows`; 0 adds none.
    pub fn padded(mut self, rows: usize) -> Self {
        if rows > 0 {
            self.rows = self.rows.next_multiple_of(rows);
            self.input_ids.resize(self.rows * self.inputs_length, 0);
            self.target_ids.resize(self.rows * self.targets_length, 0);
        }
        self
    }

    /// Rows `[start, start + rows)` of this batch.
    pub fn slice(&self, start: usize, rows: usize) -> Self {
        let cut = |ids: &[i32], length: usize| ids[start * length..(start + rows) * length].to_vec();
        Self {
            rows,
            inputs_length: self.inputs_length,
            targets_length: self.targets_length,
            input_ids: cut(&self.input_ids, self.inputs_length),
            target_ids: cut(&self.target_ids, self.targets_length),
            first_row: self.first_row + start as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_vectors::{i32_list, section};

    #[test]
    fn padding_fills_whole_groups() {
        let batch = HostBatch {
            rows: 3,
            inputs_length: 2,
            targets_length: 1,
            input_ids: vec![5; 6],
            target_ids: vec![6; 3],
            first_row: 0,
        };
        assert_eq!(batch.clone().padded(0), batch);
        let padded = batch.clone().padded(4);
        assert_eq!((padded.rows, padded.num_targets()), (4, 3));
        assert_eq!((&padded.input_ids[6..], &padded.target_ids[3..]), (&[0, 0][..], &[0][..]));
        assert_eq!(padded.slice(0, 3), batch);
    }

    #[test]
    fn decoder_inputs_equal_the_vectors() {
        let cases = section("autoregressive");
        let unpacked = cases.as_array().expect("a list").iter().filter(|case| case["segment_ids"].is_null());
        let mut checked = 0;
        for case in unpacked {
            let target_ids = i32_list(&case["targets"]);
            let batch = HostBatch {
                rows: 1,
                inputs_length: 0,
                targets_length: target_ids.len(),
                input_ids: Vec::new(),
                target_ids,
                first_row: 0,
            };
            assert_eq!(batch.decoder_input_ids(), i32_list(&case["decoder_inputs"]));
            checked += 1;
        }
        assert_eq!(checked, 1);
    }
}
