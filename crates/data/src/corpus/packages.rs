//! The packages that this program was built from, and where their sources lie.

use std::env;
use std::path::{Path, PathBuf};

use crate::error::DataError;

/// Lines of name, version and licence of a default build, written by the build script.
const LIST: &str = include_str!(concat!(env!("OUT_DIR"), "/packages.tsv"));
/// Why the list is empty, if it is.
const LIST_FAILURE: &str = include_str!(concat!(env!("OUT_DIR"), "/packages_failure.txt"));

/// Licences under which documentation may be used for training without asking.
const PERMISSIVE: [&str; 13] = [
    "0BSD",
    "Apache-2.0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MIT-0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// A package of the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Package<'a> {
    pub(super) name: &'a str,
    pub(super) version: &'a str,
    /// SPDX expression.
    pub(super) license: &'a str,
}

impl Package<'_> {
    /// Whether the licence allows use on permissive terms.
    pub(super) fn is_permissive(&self) -> bool {
        permits(self.license)
    }
}

/// Permissive packages of the build, sorted by name and version.
pub(super) fn embedded() -> Result<Vec<Package<'static>>, DataError> {
    if LIST.is_empty() {
        let reason = if LIST_FAILURE.is_empty() { "no dependencies were found" } else { LIST_FAILURE };
        return Err(DataError::NoPackageList { reason: reason.to_owned() });
    }
    Ok(parse(LIST).filter(Package::is_permissive).collect())
}

fn parse(list: &str) -> impl Iterator<Item = Package<'_>> {
    list.lines().filter_map(|line| {
        let mut fields = line.split('\t');
        Some(Package { name: fields.next()?, version: fields.next()?, license: fields.next()? })
    })
}

/// Evaluates an SPDX expression: `OR` and `/` need one permissive side, `AND` both.
fn permits(license: &str) -> bool {
    let flat = license.replace(['(', ')'], " ").replace('/', " OR ");
    // Without its brackets `(A OR B) AND C` reads as `A OR (B AND C)`; asking for every `AND`
    // part by itself is the strict reading of both.
    !flat.trim().is_empty()
        && flat.split(" AND ").all(|part| {
            part.split(" OR ").any(|name| {
                let name = name.trim();
                let name = name.split_once(" WITH ").map_or(name, |(base, _)| base.trim());
                PERMISSIVE.contains(&name)
            })
        })
}

/// Directories that hold unpacked packages as `NAME-VERSION` or `NAME`.
pub(super) fn source_roots() -> Vec<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let mut roots = vec![PathBuf::from("vendor")];
    if let Some(registries) = cargo_home.map(|home| home.join("registry").join("src")) {
        let mut found: Vec<PathBuf> =
            registries.read_dir().into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        found.sort_unstable();
        roots.extend(if found.is_empty() { vec![registries] } else { found });
    }
    roots
}

/// Directory of each package.
///
/// # Errors
/// [`DataError::NoPackageSources`] if any is missing: a corpus of the others would be a
/// different one on every machine.
pub(super) fn locate<'a>(
    packages: &[Package<'a>],
    roots: &[PathBuf],
) -> Result<Vec<(Package<'a>, PathBuf)>, DataError> {
    let (mut found, mut missing) = (Vec::with_capacity(packages.len()), Vec::new());
    for package in packages {
        match roots.iter().find_map(|root| directory_of(package, root)) {
            Some(directory) => found.push((*package, directory)),
            None => missing.push(package),
        }
    }
    match missing.first() {
        None => Ok(found),
        Some(first) => Err(DataError::NoPackageSources {
            total: packages.len(),
            missing: missing.len(),
            example: format!("{} {}", first.name, first.version),
            looked_in: roots.iter().map(|root| root.display().to_string()).collect::<Vec<_>>().join(", "),
        }),
    }
}

/// `NAME-VERSION`, or what `cargo vendor` writes for the only version of a package: `NAME`.
fn directory_of(package: &Package<'_>, root: &Path) -> Option<PathBuf> {
    let versioned = root.join(format!("{}-{}", package.name, package.version));
    if versioned.is_dir() {
        return Some(versioned);
    }
    let vendored = root.join(package.name);
    let manifest = std::fs::read_to_string(vendored.join("Cargo.toml")).ok()?;
    let version = format!("version = \"{}\"", package.version);
    manifest.lines().any(|line| line.trim() == version).then_some(vendored)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn licences_are_judged_by_expression() {
        for license in [
            "MIT",
            "MIT/Apache-2.0",
            "Apache-2.0 / MIT",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT",
            "(MIT OR Apache-2.0) AND Unicode-3.0",
            "MIT OR LGPL-2.1-or-later",
        ] {
            assert!(permits(license), "{license}");
        }
        for license in ["", "MPL-2.0", "GPL-3.0", "MIT AND CDLA-Permissive-2.0", "Custom", "LGPL-2.1 AND MIT"]
        {
            assert!(!permits(license), "{license}");
        }
    }

    #[test]
    fn the_build_script_listed_the_dependencies() {
        assert_eq!(LIST_FAILURE, "");
        let packages = embedded().unwrap();
        assert!(packages.is_sorted());
        assert!(packages.iter().any(|package| package.name == "serde"));
        assert!(packages.iter().all(|package| !package.name.starts_with("switchyard")));
        assert!(packages.iter().all(|package| package.is_permissive()));
    }

    #[test]
    fn missing_sources_name_the_package_and_the_mend() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("here-1.0.0")).unwrap();
        let vendored = directory.path().join("vendored");
        std::fs::create_dir(&vendored).unwrap();
        std::fs::write(vendored.join("Cargo.toml"), "[package]\nversion = \"2.0.0\"\n").unwrap();
        let here = Package { name: "here", version: "1.0.0", license: "MIT" };
        let vendored = Package { name: "vendored", version: "2.0.0", license: "MIT" };
        let gone = Package { name: "vendored", version: "2.1.0", license: "MIT" };
        let roots = [directory.path().to_owned()];
        assert_eq!(locate(&[here, vendored], &roots).unwrap().len(), 2);
        let error = locate(&[here, vendored, gone], &roots).unwrap_err().to_string();
        assert!(error.contains("1 of them are not on this machine (for example vendored 2.1.0"), "{error}");
        assert!(error.contains("cargo fetch --locked") && error.contains("data.sources"), "{error}");
    }
}
