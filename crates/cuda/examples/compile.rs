//! Compiles all kernels ahead, for machines that shall not: `compile ARCHITECTURE DIRECTORY`, where architecture is
//! `sm_80` or `sm_90a`. Where the program runs, `SWITCHYARD_CACHE_DIR` names the directory above `cuda`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;

use switchyard_cuda::{Compiler, SOURCES};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [architecture, directory] = &arguments[..] else {
        eprintln!("usage: compile ARCHITECTURE DIRECTORY, such as `compile sm_90a cache/cuda`");
        return ExitCode::FAILURE;
    };
    let compiler = Compiler::new(architecture, Some(PathBuf::from(directory)));
    for source in SOURCES.iter().filter(|source| source.is_for(architecture)) {
        if let Err(error) = compiler.compile(source) {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
        println!("{}", source.name);
    }
    ExitCode::SUCCESS
}
