//! Embeds the list of registry packages that a default build of `switchyard-cli` consists of.
//!
//! The sample corpus is made from their documentation. `cargo tree` is asked rather than
//! `Cargo.lock`, which also lists packages of other platforms and features that no build of this
//! machine downloads.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Package whose dependencies are listed.
const ROOT: &str = "switchyard-cli";

fn main() -> Result<(), Box<dyn Error>> {
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    watch(&manifest_dir);
    // A failure is embedded too: it only matters to whoever asks for the corpus.
    let (list, failure) = match package_list(&manifest_dir) {
        Ok(list) => (list, String::new()),
        Err(reason) => (String::new(), reason),
    };
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("packages.tsv"), list)?;
    fs::write(out.join("packages_failure.txt"), failure)?;
    Ok(())
}

/// Reruns when the lock or any manifest of the workspace changes.
fn watch(manifest_dir: &Path) {
    println!("cargo::rerun-if-changed=build.rs");
    let root = manifest_dir.join("../..");
    let members = manifest_dir.join("..").read_dir().into_iter().flatten().flatten();
    let manifests = members.map(|member| member.path().join("Cargo.toml"));
    for file in [root.join("Cargo.lock"), root.join("Cargo.toml")].into_iter().chain(manifests) {
        if file.is_file() {
            println!("cargo::rerun-if-changed={}", file.display());
        }
    }
}

/// Lines of name, version and licence, separated by tabs and sorted.
fn package_list(manifest_dir: &Path) -> Result<String, String> {
    let target = env::var("TARGET").map_err(|error| error.to_string())?;
    let cargo = env::var_os("CARGO").ok_or("CARGO is not set")?;
    let output = Command::new(cargo)
        .args(["tree", "--offline", "--locked", "--package", ROOT, "--edges", "normal,build"])
        .args(["--target", &target, "--prefix", "none", "--format", "{p}\t{l}"])
        .current_dir(manifest_dir)
        .output()
        .map_err(|error| format!("cargo tree did not start: {error}"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        let message: Vec<&str> = message.split_whitespace().collect();
        return Err(format!("cargo tree: {}", message.join(" ")));
    }
    let tree = String::from_utf8_lossy(&output.stdout);
    let mut packages: Vec<String> = tree.lines().filter_map(registry_package).collect();
    packages.sort_unstable();
    packages.dedup();
    Ok(packages.concat())
}

/// A line of the tree as one of the list; `None` for packages by path or git.
fn registry_package(line: &str) -> Option<String> {
    let (package, license) = line.trim_end_matches(" (*)").split_once('\t')?;
    let mut words = package.split(' ');
    let (name, version) = (words.next()?, words.next()?.strip_prefix('v')?);
    let from_registry = words.all(|word| word == "(proc-macro)");
    from_registry.then(|| format!("{name}\t{version}\t{license}\n"))
}
