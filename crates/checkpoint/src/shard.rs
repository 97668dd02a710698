//! safetensors files: streamed out tensor by tensor, read through a memory map.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensors};
use xxhash_rust::xxh3::Xxh3;

use crate::dtype::{READABLE, StoredDtype, decode};
use crate::error::CheckpointError;

/// Name and shape of a tensor.
pub(crate) type Spec = (String, Vec<usize>);

/// Values converted at once while writing.
const PIECE: usize = 1 << 16;

/// Writes one file: the header first, then each tensor in the order announced.
pub(crate) struct ShardWriter {
    path: PathBuf,
    out: BufWriter<Hashing>,
    dtype: StoredDtype,
    expected: VecDeque<(String, usize)>,
}

/// A file that knows its size and checksum without being read again.
struct Hashing {
    file: File,
    hash: Xxh3,
    size: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
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
            expected.push_back((name.clone(), len));
            offset = end;
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let file = File::create(path).map_err(CheckpointError::io("create", path))?;
        let hashing = Hashing { file, hash: Xxh3::new(), size: 0 };
        let mut out = BufWriter::with_capacity(1 << 20, hashing);
        out.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(&header))
            .map_err(CheckpointError::io("write", path))?;
        Ok(Self { path: path.to_owned(), out, dtype, expected })
    }

    /// Appends the values of the next tensor, which must be `name`.
    pub(crate) fn write(&mut self, name: &str, values: &[f32]) -> Result<(), CheckpointError> {
        let (next, len) = self.expected.pop_front().unwrap_or_default();
        if next != name || len != values.len() {
            let reason =
                format!("it has {} values; `{next}` with {len} values was announced next", values.len());
            return Err(CheckpointError::refused(name, reason));
        }
        if self.dtype == StoredDtype::F32 && cfg!(target_endian = "little") {
            // The bytes in memory are those of the format.
            let bytes = bytemuck::cast_slice(values);
            return self.out.write_all(bytes).map_err(CheckpointError::io("write", &self.path));
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
            self.out.write_all(&bytes).map_err(CheckpointError::io("write", &self.path))?;
        }
        Ok(())
    }

    /// Whether every tensor announced has been written.
    pub(crate) fn is_complete(&self) -> bool {
        self.expected.is_empty()
    }

    /// Syncs the file; returns its size and xxh3.
    pub(crate) fn finish(self) -> Result<(u64, String), CheckpointError> {
        let Self { path, out, mut expected, .. } = self;
        if let Some((name, _)) = expected.pop_front() {
            return Err(CheckpointError::NoTensor { name });
        }
        let Hashing { file, hash, size } =
            out.into_inner().map_err(|e| CheckpointError::io("write", &path)(e.into_error()))?;
        file.sync_all().map_err(CheckpointError::io("write", &path))?;
        Ok((size, format!("{:016x}", hash.digest())))
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

    /// Format and bytes of one tensor.
    pub(crate) fn bytes(&self, name: &str) -> Result<(Dtype, &[u8]), CheckpointError> {
        let missing = || CheckpointError::NoTensor { name: name.to_owned() };
        let info = self.tensors.get(name).ok_or_else(missing)?;
        let (start, end) = info.data_offsets;
        Ok((info.dtype, &self.map[self.data_start + start..self.data_start + end]))
    }

    /// The values of one tensor, of which parts can be read; only float32 has them in place.
    pub(crate) fn values(&self, name: &str) -> Result<StoredValues<'_>, CheckpointError> {
        match self.bytes(name)? {
            (Dtype::F32, bytes) => Ok(StoredValues::InPlace(bytes)),
            _ => self.read(name).map(StoredValues::Converted),
        }
    }

    /// Values of one tensor as float32.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let (dtype, data) = self.bytes(name)?;
        decode(dtype, data).ok_or_else(|| {
            let problem = format!("tensor `{name}` has type {dtype:?}; expected {READABLE}");
            CheckpointError::bad(&self.path, problem)
        })
    }
}

/// Values of a stored tensor, in the file or converted.
pub(crate) enum StoredValues<'a> {
    InPlace(&'a [u8]),
    Converted(Vec<f32>),
}

impl StoredValues<'_> {
    /// Copies the values at `from` to `to`, which is as long.
    pub(crate) fn copy(&self, from: Range<usize>, to: &mut [f32]) {
        match self {
            Self::Converted(values) => to.copy_from_slice(&values[from]),
            Self::InPlace(bytes) => {
                let (values, _) = bytes[4 * from.start..4 * from.end].as_chunks::<4>();
                to.iter_mut().zip(values).for_each(|(to, value)| *to = f32::from_le_bytes(*value));
            }
        }
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
        assert_eq!(reader.read("b").unwrap()[2].to_bits(), (-0.0_f32).to_bits());
        assert!(matches!(reader.read("c"), Err(CheckpointError::NoTensor { name }) if name == "c"));
    }

    #[test]
    fn the_writer_takes_what_was_announced_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let begin = || ShardWriter::create(&path, &specs(), StoredDtype::F32).unwrap();
        let refused = |name: &str, values: &[f32]| begin().write(name, values).unwrap_err().to_string();
        assert!(refused("b", &[0.0; 3]).contains("`a` with 4 values was announced"));
        assert!(refused("a", &[0.0; 3]).contains("it has 3 values"));
        let mut writer = begin();
        writer.write("a", &[0.0; 4]).unwrap();
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
