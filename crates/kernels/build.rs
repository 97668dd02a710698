//! Says what to do where LibTorch is missing, before the build of its bindings fails for a reason that does
//! not tell.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    println!("cargo:rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
    if env::var_os("CARGO_FEATURE_LIBTORCH").is_none() || env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        return;
    }
    let found = env::var_os("LIBTORCH").is_some_and(|home| Path::new(&home).join("lib/libtorch.so").exists());
    if !found {
        println!(
            "cargo:error=LIBTORCH names no directory with lib/libtorch.so: run \
             `eval \"$(launch/install-libtorch.sh)\"` at the top of the repository, then build again"
        );
    }
}
