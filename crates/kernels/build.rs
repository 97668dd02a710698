//! Compiles what Switchyard asks of LibTorch in C++; where LibTorch is missing, says what to do, before the
//! build of its bindings fails for a reason that does not tell.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    println!("cargo:rerun-if-changed=src/torch/settings.cpp");
    if env::var_os("CARGO_FEATURE_LIBTORCH").is_none() {
        return;
    }
    let home = env::var_os("LIBTORCH").map(PathBuf::from);
    let found = home.is_some_and(|home| home.join("lib/libtorch.so").exists());
    if !found && env::var_os("LIBTORCH_USE_PYTORCH").is_none() {
        println!(
            "cargo:error=LIBTORCH names no directory with lib/libtorch.so: run \
             `eval \"$(launch/install-libtorch.sh)\"` at the top of the repository, then build again"
        );
        return;
    }
    compile_settings();
}

/// Against the headers that LibTorch's bindings were built with, which lie beside its libraries.
fn compile_settings() {
    let Some(libraries) = env::var_os("DEP_TCH_LIBTORCH_LIB") else {
        println!("cargo:error=LibTorch's bindings do not say where LibTorch is");
        return;
    };
    let abi = env::var("LIBTORCH_CXX11_ABI").unwrap_or_else(|_| "1".to_owned());
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false)
        .include(Path::new(&libraries).with_file_name("include"))
        .define("_GLIBCXX_USE_CXX11_ABI", abi.as_str())
        .file("src/torch/settings.cpp")
        .compile("switchyard_torch");
}
