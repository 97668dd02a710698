//! Says what to do where LibTorch is missing, before the build of its bindings fails for a reason that does
//! not tell, and builds what is written in C++.

fn main() {
    #[cfg(feature = "libtorch")]
    libtorch::build();
}

#[cfg(feature = "libtorch")]
mod libtorch {
    use std::env;
    use std::path::PathBuf;
    use std::process::Command;

    const SOURCES: [&str; 2] = ["src/torch/graph.cpp", "src/torch/settings.cpp"];

    pub(super) fn build() {
        println!("cargo:rerun-if-env-changed=LIBTORCH");
        println!("cargo:rerun-if-env-changed=LIBTORCH_USE_PYTORCH");
        for source in SOURCES {
            println!("cargo:rerun-if-changed={source}");
        }
        let home = if env::var_os("LIBTORCH_USE_PYTORCH").is_some() { of_python() } else { of_environment() };
        let Some(home) = home else {
            println!(
                "cargo:error=LIBTORCH names no directory with lib/libtorch.so: run \
                 `eval \"$(launch/install-libtorch.sh)\"` at the top of the repository, then build again"
            );
            return;
        };
        cc::Build::new()
            .cpp(true)
            .std("c++17")
            .include(home.join("include"))
            .warnings(false)
            .files(SOURCES)
            .compile("switchyard_torch");
    }

    fn of_environment() -> Option<PathBuf> {
        let home = PathBuf::from(env::var_os("LIBTORCH")?);
        home.join("lib/libtorch.so").exists().then_some(home)
    }

    fn of_python() -> Option<PathBuf> {
        let ask = ["-c", "import pathlib, torch; print(pathlib.Path(torch.__file__).parent)"];
        let said = Command::new("python3").args(ask).output().ok()?;
        let home = PathBuf::from(String::from_utf8(said.stdout).ok()?.trim());
        home.join("include").exists().then_some(home)
    }
}
