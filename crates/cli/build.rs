//! Tells the program where LibTorch is, so that it starts without LD_LIBRARY_PATH.

use std::env;
use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-env-changed=LIBTORCH");
    let home = env::var_os("LIBTORCH").map(PathBuf::from);
    let (Some(home), Some(_)) = (home, env::var_os("CARGO_FEATURE_LIBTORCH")) else { return };
    // The old kind of entry also serves libraries that load others by name, as NVRTC does.
    println!("cargo:rustc-link-arg=-Wl,--disable-new-dtags");
    let beside = home.parent().map(|packages| packages.join("nvidia/cu13/lib"));
    for directory in [Some(home.join("lib")), beside].into_iter().flatten() {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", directory.display());
    }
}
