//! `switchyard verify`: a model's numbers beside recorded ones.

use anyhow::Context;
use burn::tensor::Device;
use safetensors::{Dtype, SafeTensors};
use switchyard_train::verify::{Array, Arrays, Tolerances, verify};

use super::model_directory::LoadedModel;
use super::output;
use crate::Outcome;
use crate::args::VerifyArguments;

pub(crate) fn run(arguments: &VerifyArguments, device: &Device) -> anyhow::Result<Outcome> {
    let fixture = read_arrays(&arguments.fixture)?;
    let loaded = LoadedModel::open(&arguments.model, device)?;
    let tolerances = Tolerances { absolute: arguments.tolerance, loss: arguments.loss_tolerance };
    let result = verify(&loaded.model, &loaded.config, &loaded.routing, &fixture, tolerances)
        .with_context(|| format!("cannot use {}", arguments.fixture.display()))?;
    anyhow::ensure!(
        !result.compared.is_empty(),
        "{} holds no expected array that can be computed",
        arguments.fixture.display()
    );
    let passed = result.compared.iter().all(|c| c.passed());
    if arguments.json {
        let compared: Vec<_> = result
            .compared
            .iter()
            .map(|c| {
                serde_json::json!({"name": c.name, "difference": c.difference, "tolerance": c.tolerance, "passed": c.passed()})
            })
            .collect();
        output::json(&serde_json::json!({
            "passed": passed, "compared": compared, "not_compared": result.not_compared,
        }))?;
    } else {
        for c in &result.compared {
            let verdict = if c.passed() { "ok  " } else { "FAIL" };
            output::line(format!(
                "{verdict} {:<40} {:.3e} (allowed {:.1e})",
                c.name, c.difference, c.tolerance
            ))?;
        }
        if !result.not_compared.is_empty() {
            output::line(format!("not compared: {}", result.not_compared.join(", ")))?;
        }
        output::line(format!(
            "{} of {} arrays within tolerance",
            result.compared.iter().filter(|c| c.passed()).count(),
            result.compared.len()
        ))?;
    }
    Ok(if passed { Outcome::Done } else { Outcome::Failed })
}

/// Every array of a safetensors file as numbers.
fn read_arrays(path: &std::path::Path) -> anyhow::Result<Arrays> {
    let bytes = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    let file = SafeTensors::deserialize(&bytes)
        .with_context(|| format!("{} is not a safetensors file", path.display()))?;
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let (values, discrete) = numbers(view.dtype(), view.data())
                .with_context(|| format!("{}: array `{name}` has type {:?}", path.display(), view.dtype()))?;
            Ok((name, Array { shape: view.shape().to_vec(), values, discrete }))
        })
        .collect()
}

/// Values of little-endian data and whether they are whole numbers; `None` for other types.
fn numbers(dtype: Dtype, data: &[u8]) -> Option<(Vec<f64>, bool)> {
    let eight = |c: &[u8]| [c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]];
    let four = |c: &[u8]| [c[0], c[1], c[2], c[3]];
    Some(match dtype {
        Dtype::F32 => (data.chunks_exact(4).map(|c| f64::from(f32::from_le_bytes(four(c)))).collect(), false),
        Dtype::F64 => (data.chunks_exact(8).map(|c| f64::from_le_bytes(eight(c))).collect(), false),
        Dtype::I64 => (data.chunks_exact(8).map(|c| i64::from_le_bytes(eight(c)) as f64).collect(), true),
        Dtype::I32 => (data.chunks_exact(4).map(|c| f64::from(i32::from_le_bytes(four(c)))).collect(), true),
        Dtype::U8 | Dtype::BOOL => (data.iter().map(|&b| f64::from(b)).collect(), true),
        _ => return None,
    })
}
