//! Every test of the repository, those under mpirun included.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use clap::Args;

use crate::say;

/// What building and running under MPI needs, by the names of Debian and Ubuntu.
const PACKAGES: [&str; 3] = ["libopenmpi-dev", "openmpi-bin", "libclang-dev"];

/// Features of a build that runs under mpirun.
pub(crate) const FEATURES: &str = "switchyard-cli/mpi,switchyard-comm/nccl";

/// What to test.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Leave out MPI: nothing but Rust and a C++ compiler is needed then.
    #[arg(long)]
    without_mpi: bool,
    /// Test the operations, the model and training on LibTorch's CPU device instead, and that all CUDA sources
    /// compile; LibTorch is installed into target/libtorch unless LIBTORCH names one.
    #[arg(long)]
    libtorch: bool,
    /// Arguments for `cargo test`, such as the name of a test.
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// What is built for tests on LibTorch besides.
const WITH_LIBTORCH: &str = "switchyard-kernels/libtorch";

/// Runs the tests; installs what MPI needs where that is allowed.
pub(crate) fn run(root: &Path, options: &Options) -> anyhow::Result<()> {
    let mut features = Vec::new();
    if !options.without_mpi {
        prepare()?;
        features.push(FEATURES);
    }
    if options.libtorch {
        features.push(WITH_LIBTORCH);
        return on_libtorch(root, &features.join(","), &options.arguments);
    }
    let mut command = tests(root, &features.join(","));
    pass(command.args(&options.arguments))
}

/// Tests of the whole workspace: builds that select less would not share what they compile.
fn tests(root: &Path, features: &str) -> Command {
    let mut command = Command::new("cargo");
    command.args(["test", "--release", "--features", features]).current_dir(root);
    command
}

fn pass(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().context("cannot start cargo")?;
    ensure!(status.success(), "some tests failed");
    Ok(())
}

/// The tests that have a device to choose, on LibTorch's CPU device, and those of the CUDA sources.
fn on_libtorch(root: &Path, features: &str, arguments: &[String]) -> anyhow::Result<()> {
    let home = libtorch(root)?;
    let others = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let of_torch = [home.join("lib"), home.join("../nvidia/cu13/lib")];
    let libraries = env::join_paths(of_torch.into_iter().chain(env::split_paths(&others)))?;
    let tests = || {
        let mut command = tests(root, features);
        command.env("LIBTORCH", &home).env("LD_LIBRARY_PATH", &libraries);
        command.env("SWITCHYARD_TEST_DEVICE", "libtorch");
        command
    };
    pass(tests().args(["--test", "compile", "--", "--ignored"]))?;
    pass(tests().args(["--lib", "--test", "model", "--test", "train"]).args(arguments))
}

/// The LibTorch that LIBTORCH names, else one that launch/install-libtorch.sh installs.
fn libtorch(root: &Path) -> anyhow::Result<PathBuf> {
    if let Some(home) = env::var_os("LIBTORCH") {
        return Ok(home.into());
    }
    let script = root.join("launch/install-libtorch.sh");
    let installed = Command::new(&script).stderr(Stdio::inherit()).output();
    let installed = installed.with_context(|| format!("cannot start {}", script.display()))?;
    ensure!(installed.status.success(), "{} failed", script.display());
    Ok(root.join("target/libtorch/torch"))
}

/// Makes sure that Open MPI and libclang are there.
fn prepare() -> anyhow::Result<()> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    let install = format!("apt-get install -y {}", PACKAGES.join(" "));
    say(format_args!("the tests under mpirun need {}", missing.join(" and ")));
    let Some(prefix) = administrator() else {
        bail!(
            "run `sudo {install}` (on other systems: Open MPI with its headers, and libclang), then this again; \
             or leave MPI out with `cargo xtask test --without-mpi`"
        );
    };
    say(format_args!("==> {prefix}{install}"));
    let script = format!("{prefix}apt-get update -qq && {prefix}{install} -qq");
    let status = Command::new("sh").args(["-c", &script]).status().context("cannot start sh")?;
    ensure!(status.success(), "`{script}` failed; install {} by hand", missing.join(" and "));
    Ok(())
}

/// What is not there, in words.
fn missing() -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !(starts("mpicc", "--version") && starts("mpirun", "--version")) {
        missing.push("Open MPI (mpicc and mpirun)");
    }
    if !has_libclang() {
        missing.push("libclang");
    }
    missing
}

/// How this user may install packages: as root, through sudo without a password, or not at all.
fn administrator() -> Option<&'static str> {
    if !starts("apt-get", "--version") {
        return None;
    }
    let id = Command::new("id").arg("-u").output().ok()?;
    if id.stdout.trim_ascii() == b"0" {
        return Some("");
    }
    let sudo = Command::new("sudo").args(["-n", "true"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    sudo.is_ok_and(|status| status.success()).then_some("sudo ")
}

fn starts(program: &str, argument: &str) -> bool {
    let status = Command::new(program).arg(argument).stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

/// Whether bindgen will find libclang: where it is told to look, or where systems keep it.
fn has_libclang() -> bool {
    if std::env::var_os("LIBCLANG_PATH").is_some() {
        return true;
    }
    let holds = |directory: &Path| {
        let files = std::fs::read_dir(directory).into_iter().flatten().flatten();
        files.into_iter().any(|file| file.file_name().to_string_lossy().starts_with("libclang"))
    };
    let versions = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    let of_llvm = versions.map(|entry| entry.path().join("lib"));
    let fixed = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/local/lib"];
    fixed.map(PathBuf::from).into_iter().chain(of_llvm).any(|directory| holds(&directory))
}
