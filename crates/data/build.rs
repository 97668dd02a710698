//! Embeds the list of registry packages that a default build of `switchyard-cli` consists of.
//!
//! The sample corpus is made from their documentation. `cargo tree` is asked, because it needs
//! nothing beyond what the build itself downloaded: `Cargo.lock` also lists the packages of other
//! platforms, and `cargo metadata` wants those that only tests depend on.

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
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let (list, failure) = match package_list(&manifest_dir) {
        Ok(list) => (list, String::new()),
        Err(reason) => {
            // Whoever asks for the corpus is told why there is none. A file that does not exist
            // makes cargo try again with the next build, which may have downloaded what lacked.
            println!("cargo::warning=built without the list for the sample corpus: {reason}");
            println!("cargo::rerun-if-changed={}", out.join("never").display());
            (String::new(), reason)
        }
    };
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
