//! CUDA C++ to machine code, once for each source and architecture.

use std::ffi::{CString, c_char};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::{result, sys};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::CudaError;
use crate::source::{COMMON, Source};

/// Directory of compiled kernels: `$SWITCHYARD_CACHE_DIR`, else `$XDG_CACHE_HOME/switchyard`, else
/// `~/.cache/switchyard`, each with `cuda` behind it; `None` where none of them is set.
pub fn cache_directory() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("SWITCHYARD_CACHE_DIR")
        .or_else(|| set("XDG_CACHE_HOME").map(|directory| directory.join("switchyard")))
        .or_else(|| set("HOME").map(|home| home.join(".cache/switchyard")))?;
    Some(base.join("cuda"))
}

/// Compiles kernels for one architecture and keeps them.
#[derive(Debug, Clone)]
pub struct Compiler {
    architecture: String,
    kept_in: Option<PathBuf>,
}

impl Compiler {
    /// For devices of `architecture`, such as `sm_80` or `sm_90a`, keeping machine code in `kept_in`.
    pub fn new(architecture: impl Into<String>, kept_in: Option<PathBuf>) -> Self {
        Self { architecture: architecture.into(), kept_in }
    }

    /// Whether NVRTC can be loaded, without which only kernels that were kept can be used.
    pub fn is_there() -> bool {
        load_nvrtc().is_ok()
    }

    /// Machine code of `source`: what an earlier call kept, else compiled now.
    ///
    /// # Errors
    /// [`CudaError::NoCompiler`], [`CudaError::Compile`], or [`CudaError::Cache`] when it cannot be kept.
    pub fn compile(&self, source: &Source) -> Result<Vec<u8>, CudaError> {
        let Some(directory) = &self.kept_in else { return self.compile_now(source) };
        let path = directory.join(self.file_name(source));
        if let Ok(code) = std::fs::read(&path) {
            return Ok(code);
        }
        let code = self.compile_now(source)?;
        keep(&path, &code).map_err(|source| CudaError::Cache { path, source })?;
        Ok(code)
    }

    /// Another text, architecture or set of options is another file, so nothing stale is ever read.
    fn file_name(&self, source: &Source) -> String {
        let text = format!("{}\0{}\0{COMMON}\0{}", self.architecture, OPTIONS.join(" "), source.text);
        format!("{}-{}-{:032x}.cubin", source.name, self.architecture, xxh3_128(text.as_bytes()))
    }

    fn compile_now(&self, source: &Source) -> Result<Vec<u8>, CudaError> {
        load_nvrtc()?;
        let failed = |log: String| CudaError::Compile {
            source_name: source.name,
            architecture: self.architecture.clone(),
            log,
        };
        let text = format!("{COMMON}\n#line 1 \"kernels/{}.cu\"\n{}", source.name, source.text);
        let text = CString::new(text).map_err(|_| failed("the source holds a NUL byte".into()))?;
        let code = |error: result::NvrtcError| failed(format!("{error}"));
        let mut program = result::create_program(&text, None).map(Program).map_err(code)?;
        let options: Vec<String> = OPTIONS
            .iter()
            .map(|option| (*option).to_owned())
            .chain([format!("--gpu-architecture={}", self.architecture)])
            .collect();
        // SAFETY: the program is alive until `Program` is dropped.
        if unsafe { result::compile_program(program.0, &options) }.is_err() {
            return Err(failed(program.log()));
        }
        program.code().map_err(code)
    }
}

/// `--use_fast_math` would let the compiler replace divisions and flush subnormals; kernels choose fast
/// forms themselves where they may.
const OPTIONS: [&str; 3] =
    ["--std=c++17", "--device-as-default-execution-space", "--extra-device-vectorization"];

/// Makes NVRTC known to the process under the name by which bindings look for it.
fn load_nvrtc() -> Result<(), CudaError> {
    static LOADED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: only looks whether a library can be loaded; NVRTC's initialisers have no requirements.
    let loaded = *LOADED.get_or_init(|| unsafe { sys::is_culib_present() });
    if loaded { Ok(()) } else { Err(CudaError::NoCompiler) }
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn log(&mut self) -> String {
        // SAFETY: the program is alive.
        match unsafe { result::get_program_log(self.0) } {
            Ok(bytes) => text_of(&bytes),
            Err(error) => format!("{error}"),
        }
    }

    fn code(&mut self) -> Result<Vec<u8>, result::NvrtcError> {
        let mut len = 0;
        // SAFETY: the program is alive and compiled for real machine code, `len` is one `usize`.
        unsafe { sys::nvrtcGetCUBINSize(self.0, ptr::from_mut(&mut len)) }.result()?;
        let mut code = vec![0_u8; len];
        // SAFETY: as above, and `code` has room for as many bytes as were asked for.
        unsafe { sys::nvrtcGetCUBIN(self.0, code.as_mut_ptr().cast::<c_char>()) }.result()?;
        Ok(code)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by `create_program` and destroyed once. An error leaves nothing to be done.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn text_of(bytes: &[c_char]) -> String {
    let bytes: Vec<u8> =
        bytes.iter().map(|&byte| byte.cast_unsigned()).take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).trim_end().to_owned()
}

/// Writes under another name first, so that a reader never finds half a file.
fn keep(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let mut draft = tempfile::NamedTempFile::new_in(directory)?;
    draft.write_all(code)?;
    draft.persist(path)?;
    Ok(())
}
