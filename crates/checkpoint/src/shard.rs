//! safetensors files: streamed out tensor by tensor, read through a memory map.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use switchyard_config::partition::Part;

use crate::block_file::BlockFile;
use crate::dtype::{READABLE, StoredDtype, decode, readable_size};
use crate::error::CheckpointError;
use crate::files::Fingerprint;
use crate::slices::paired_runs;

/// Name and shape of a tensor.
pub(crate) type Spec = (String, Vec<usize>);

/// Values converted at once while writing.
const PIECE: usize = 1 << 16;

/// Bytes from which a system call for their pages pays.
#[cfg(unix)]
const WORTH_RELEASING: usize = 1 << 19;

/// Bytes around a page that Linux may map together with it.
#[cfg(unix)]
const MAPPED_AT_ONCE: usize = 2 << 20;

/// Writes one file: the header first, then each tensor in the order announced.
pub(crate) struct ShardWriter {
    out: BlockFile,
    dtype: StoredDtype,
    /// Tensors still to be written and how many of their values.
    expected: VecDeque<(String, usize)>,
}

impl ShardWriter {
    /// Begins a file that holds `tensors`, in that order.
    pub(crate) fn create(path: &Path, tensors: &[Spec], dtype: StoredDtype) -> Result<Self, CheckpointError> {
        let mut header = serde_json::Map::new();
        // Without the format transformers refuses the file.
        header.insert("__metadata__".to_owned(), serde_json::json!({"format": "pt"}));
        let mut expected = VecDeque::new();
        let mut offset = 0;
        for (name, shape) in tensors {
            let len = shape.iter().product::<usize>();
            let end = offset + len * dtype.size();
            let entry =
                serde_json::json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [offset, end]});
            header.insert(name.clone(), entry);
            if len > 0 {
                expected.push_back((name.clone(), len));
            }
            offset = end;
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut out = BlockFile::create(path)?;
        out.write(&(header.len() as u64).to_le_bytes())?;
        out.write(&header)?;
        Ok(Self { out, dtype, expected })
    }

    /// Appends values of the next tensor, which must be `name`: all of them, or those that follow.
    pub(crate) fn write(&mut self, name: &str, values: &[f32]) -> Result<(), CheckpointError> {
        let next = self.expected.front_mut();
        let Some((_, left)) = next.filter(|(next, left)| next == name && *left >= values.len()) else {
            let (next, left) = self.expected.front().cloned().unwrap_or_default();
            let reason = format!("it has {} values; `{next}` with {left} values comes next", values.len());
            return Err(CheckpointError::refused(name, reason));
        };
        *left -= values.len();
        if *left == 0 {
            self.expected.pop_front();
        }
        if self.dtype == StoredDtype::F32 && cfg!(target_endian = "little") {
            return self.out.write(bytemuck::cast_slice(values));
        }
        let mut bytes = Vec::with_capacity(PIECE * self.dtype.size());
        for piece in values.chunks(PIECE) {
            bytes.clear();
            self.dtype.encode(piece, &mut bytes).map_err(|value| {
                let format = self.dtype.name();
                CheckpointError::refused(
                    name,
                    format!("{value:e} is infinite in {format}; store F32 instead"),
                )
            })?;
            self.out.write(&bytes)?;
        }
        Ok(())
    }

    /// Whether every tensor announced has been written.
    pub(crate) fn is_complete(&self) -> bool {
        self.expected.is_empty()
    }

    /// Waits until the file is on the disk.
    pub(crate) fn finish(mut self) -> Result<Fingerprint, CheckpointError> {
        match self.expected.pop_front() {
            Some((name, _)) => Err(CheckpointError::NoTensor { name }),
            None => self.out.finish(),
        }
    }
}

/// One open file; its header is parsed once.
#[derive(Debug)]
pub(crate) struct ShardReader {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, TensorInfo>,
    data_start: usize,
}

impl ShardReader {
    /// Maps a file and checks that its header describes exactly the bytes that follow.
    pub(crate) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let file = File::open(path).map_err(CheckpointError::io("read", path))?;
        // SAFETY: the map is only read. A file that another program shrinks meanwhile ends this
        // process with SIGBUS; checkpoints are renamed into place and never written again.
        let map = unsafe { Mmap::map(&file) }.map_err(CheckpointError::io("read", path))?;
        let (header_len, header) = SafeTensors::read_metadata(&map).map_err(|error| {
            let size = map.len();
            let problem =
                format!("not a whole safetensors file ({error}; {size} bytes); fetch or write it again");
            CheckpointError::bad(path, problem)
        })?;
        let tensors = header.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        Ok(Self { path: path.to_owned(), map, tensors, data_start: 8 + header_len })
    }

    /// Every tensor: name, shape, format and place.
    pub(crate) fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    fn info(&self, name: &str) -> Result<&TensorInfo, CheckpointError> {
        self.tensors.get(name).ok_or_else(|| CheckpointError::NoTensor { name: name.to_owned() })
    }

    /// Format and bytes of one tensor.
    pub(crate) fn bytes(&self, name: &str) -> Result<(Dtype, &[u8]), CheckpointError> {
        let info = self.info(name)?;
        let (start, end) = info.data_offsets;
        Ok((info.dtype, &self.map[self.data_start + start..self.data_start + end]))
    }

    /// Values of one tensor as float32.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        self.read_part(name, &Part::whole(&self.info(name)?.shape))
    }

    /// Values of a part of one tensor as float32.
    pub(crate) fn read_part(&self, name: &str, part: &Part) -> Result<Vec<f32>, CheckpointError> {
        let mut values = vec![0.0; part.num_elements()];
        self.copy_part(name, part, &Part::whole(&part.shape), &part.shape, &mut values)?;
        Ok(values)
    }

    /// Copies the part `from` of one tensor to the part `to`, of the same shape, of `out`, a tensor of
    /// `out_shape`. Both must lie within their tensors.
    pub(crate) fn copy_part(
        &self,
        name: &str,
        from: &Part,
        to: &Part,
        out_shape: &[usize],
        out: &mut [f32],
    ) -> Result<(), CheckpointError> {
        let shape = &self.info(name)?.shape;
        let (dtype, data) = self.bytes(name)?;
        let size = readable_size(dtype).ok_or_else(|| {
            let problem = format!("tensor `{name}` has type {dtype:?}; expected {READABLE}");
            CheckpointError::bad(&self.path, problem)
        })?;
        let mut touched = 0..0;
        paired_runs(from.runs(shape), to.runs(out_shape), |from, to| {
            let bytes = from.start * size..from.end * size;
            decode(dtype, &data[bytes.clone()], &mut out[to]);
            touched = if touched.is_empty() { bytes } else { touched.start..bytes.end };
        });
        self.release(name, touched)
    }

    /// Lets go of the mapped pages of some bytes of a tensor: a model that is read part by part would
    /// else count as held by this process once it has passed. The system keeps them cached.
    #[cfg(unix)]
    fn release(&self, name: &str, bytes: Range<usize>) -> Result<(), CheckpointError> {
        if bytes.len() < WORTH_RELEASING {
            return Ok(());
        }
        let tensor = self.data_start + self.info(name)?.data_offsets.0;
        let start = (tensor + bytes.start) / MAPPED_AT_ONCE * MAPPED_AT_ONCE;
        let end = (tensor + bytes.end).next_multiple_of(MAPPED_AT_ONCE).min(self.map.len());
        // SAFETY: the map is shared and never written, so that a page that is read again is the file's.
        let released =
            unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        released.map_err(CheckpointError::io("read", &self.path))
    }

    #[cfg(not(unix))]
    fn release(&self, _name: &str, _bytes: Range<usize>) -> Result<(), CheckpointError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs() -> Vec<Spec> {
        vec![("a".to_owned(), vec![2, 2]), ("b".to_owned(), vec![3])]
    }

    fn written(dir: &Path) -> PathBuf {
        let path = dir.join("x.safetensors");
        let mut writer = ShardWriter::create(&path, &specs(), StoredDtype::F32).unwrap();
        writer.write("a", &[1.0, 2.0, 3.0, 4.0]).unwrap();
        writer.write("b", &[5.0, f32::MIN_POSITIVE, -0.0]).unwrap();
        assert!(writer.is_complete());
        writer.finish().unwrap();
        path
    }

    /// Whether the file is refused as damaged, the file named.
    fn refused(path: &Path) -> bool {
        let message = ShardReader::open(path).unwrap_err().to_string();
        message.contains("x.safetensors") && message.contains("not a whole safetensors file")
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let reader = ShardReader::open(&written(dir.path())).unwrap();
        assert_eq!(reader.tensors().keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(reader.tensors()["a"].shape, [2, 2]);
        assert_eq!(reader.read("a").unwrap(), [1.0, 2.0, 3.0, 4.0]);
        let column = Part { start: vec![0, 1], shape: vec![2, 1] };
        assert_eq!(reader.read_part("a", &column).unwrap(), [2.0, 4.0]);
        assert_eq!(reader.read("b").unwrap()[2].to_bits(), (-0.0_f32).to_bits());
        assert!(matches!(reader.read("c"), Err(CheckpointError::NoTensor { name }) if name == "c"));
    }

    #[test]
    fn the_writer_takes_what_was_announced_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let begin = || ShardWriter::create(&path, &specs(), StoredDtype::F32).unwrap();
        let refused = |name: &str, values: &[f32]| begin().write(name, values).unwrap_err().to_string();
        assert!(refused("b", &[0.0; 3]).contains("`a` with 4 values comes next"));
        assert!(refused("a", &[0.0; 5]).contains("it has 5 values"));
        let mut writer = begin();
        writer.write("a", &[0.0; 3]).unwrap();
        let message = writer.write("a", &[0.0; 2]).unwrap_err().to_string();
        assert!(message.contains("`a` with 1 values comes next"), "{message}");
        writer.write("a", &[0.0]).unwrap();
        assert!(matches!(writer.finish(), Err(CheckpointError::NoTensor { name }) if name == "b"));
        let mut writer = ShardWriter::create(&path, &specs(), StoredDtype::F16).unwrap();
        let message = writer.write("a", &[0.0, 1e6, 0.0, 0.0]).unwrap_err().to_string();
        assert_eq!(message, "tensor `a` was refused: 1e6 is infinite in F16; store F32 instead");
    }

    #[test]
    fn truncated_and_absurd_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = written(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for len in [0, 4, 8, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..len]).unwrap();
            assert!(refused(&path), "{len} bytes");
        }
        std::fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
        assert!(refused(&path), "trailing byte");
        for header_len in [u64::MAX, u64::MAX - 7, 1 << 40, 99_000_000] {
            let mut absurd = whole.clone();
            absurd[..8].copy_from_slice(&header_len.to_le_bytes());
            std::fs::write(&path, absurd).unwrap();
            assert!(refused(&path), "header of {header_len}");
        }
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let overlapping = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        let too_large = r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#;
        let overflowing = r#""a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}"#;
        let negative = r#""a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#;
        let unknown = r#""a":{"dtype":"Q3","shape":[1],"data_offsets":[0,4]}"#;
        for header in [overlapping, too_large, overflowing, negative, unknown, "\u{0}"] {
            let header = format!("{{{header}}}");
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0; 4]].concat();
            std::fs::write(&path, bytes).unwrap();
            assert!(refused(&path), "{header}");
        }
    }
}
