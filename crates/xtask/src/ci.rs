//! The checks that a change must pass. `.ci/run` prepares a machine and calls this.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};

use crate::say;
use crate::test::FEATURES;

/// The line of README.md above the command that runs every test.
const TEST_HEADING: &str = "Run every test:";

/// One check: its name, environment and command line.
struct Step {
    name: &'static str,
    environment: &'static [(&'static str, &'static str)],
    command: String,
}

/// Runs all checks, also after one has failed, then fails if any did.
pub(crate) fn run(root: &Path) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    let mut failed = Vec::new();
    for step in steps(root)? {
        say(format_args!("\n==> {}: {}", step.name, step.command));
        let started = Instant::now();
        let passed = shell(root, &step)?;
        let seconds = started.elapsed().as_secs();
        let verdict = if passed { "passed" } else { "FAILED" };
        lines.push(format!("{verdict}  {:>2} min {:02} s  {}", seconds / 60, seconds % 60, step.name));
        if !passed {
            failed.push(step.name);
        }
    }
    say("");
    lines.iter().for_each(say);
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// The checks, the quickest first. All of them select the whole workspace and the release profile, so
/// that they share what is built; clippy and rustdoc share the metadata of dependencies.
fn steps(root: &Path) -> anyhow::Result<Vec<Step>> {
    let readme = fs::read_to_string(root.join("README.md")).context("cannot read README.md")?;
    let step = |name, command: &str| Step { name, environment: &[], command: command.to_owned() };
    let mut steps = vec![
        step("format", "cargo fmt --all --check"),
        step("generated pages", "cargo xtask docs --check"),
        step("tests", test_command(&readme)?),
        step("long tests", "cargo xtask test -- fifty_kills -- --ignored"),
        step("tests on LibTorch", "cargo xtask test --libtorch"),
        step("clippy", "cargo clippy --release --all-targets -- -D warnings"),
        step(
            "clippy with MPI",
            &format!("cargo clippy --release --all-targets --features {FEATURES} -- -D warnings"),
        ),
        Step {
            environment: &[("RUSTDOCFLAGS", "-D warnings")],
            ..step("documentation", "cargo doc --release --no-deps")
        },
    ];
    if has_cargo_deny() {
        steps.push(step("licences and sources", "cargo deny --log-level error check licenses bans sources"));
    } else {
        say("cargo-deny is not installed: licences and sources of dependencies are not checked");
    }
    Ok(steps)
}

/// The first command of the first fenced block after [`TEST_HEADING`].
fn test_command(readme: &str) -> anyhow::Result<&str> {
    let mut lines = readme.lines().skip_while(|line| line.trim() != TEST_HEADING).skip(1);
    let fence = lines.find(|line| !line.trim().is_empty());
    match (fence, lines.next()) {
        (Some(fence), Some(command)) if fence.starts_with("```") && !command.trim().is_empty() => {
            Ok(command.trim())
        }
        _ => bail!("README.md has no code block after the line `{TEST_HEADING}`"),
    }
}

fn has_cargo_deny() -> bool {
    Command::new("cargo")
        .args(["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs `step` as a reader of the README would: in a shell, at the top of the repository.
fn shell(root: &Path, step: &Step) -> anyhow::Result<bool> {
    let status = Command::new("sh")
        .args(["-c", &step.command])
        .envs(step.environment.iter().copied())
        .current_dir(root)
        .status()
        .with_context(|| format!("cannot start `{}`", step.command))?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_command_is_the_readmes() {
        let readme = "# X\n\nRun every test:\n\n```sh\ncargo test --release\n```\n\n```sh\nother\n```\n";
        assert_eq!(test_command(readme).unwrap(), "cargo test --release");
        for broken in ["# X\n", "Run every test:\n\ncargo test\n", "Run every test:\n```sh\n\n```\n"] {
            assert!(test_command(broken).unwrap_err().to_string().contains("Run every test:"), "{broken}");
        }
        assert!(test_command(include_str!("../../../README.md")).unwrap().starts_with("cargo xtask test"));
    }
}
