//! Every file in `configs/` loads, and says what it seems to say.

use std::path::{Path, PathBuf};

use switchyard_config::{resolve, summarize};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

#[test]
fn every_experiment_loads_and_is_named_after_its_file() {
    let mut loaded = 0;
    for entry in std::fs::read_dir(folder()).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let resolved = resolve(&path, &[]).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(resolved.plan.name, path.file_stem().unwrap().to_str().unwrap());
        loaded += 1;
    }
    assert!(loaded >= 5, "only {loaded} experiments found");
}

#[test]
fn switch_differs_from_its_dense_baseline_in_the_model_alone() {
    let dense = resolve(&folder().join("t5-base-c4.toml"), &[]).unwrap().plan;
    let sparse = resolve(&folder().join("switch-base-8-c4.toml"), &[]).unwrap().plan;
    let keys: Vec<String> = switchyard_config::differences(&dense, &sparse)
        .into_iter()
        .map(|difference| difference.key)
        .collect();
    assert_eq!(
        keys,
        [
            "name",
            "model.num_experts",
            "model.encoder_expert_layer_every",
            "model.decoder_expert_layer_every",
            "model.init_scale"
        ]
    );
    assert_eq!(summarize(&sparse).total_parameters, 619_339_008);
}

/// The shares of the four languages in the appendix of the mT5 paper, relative to each other.
#[test]
fn mt5_mixes_languages_as_published() {
    let data = resolve(&folder().join("mt5-base-mc4.toml"), &[]).unwrap().plan.data;
    let share = |index: usize| data.sources[index].weight.powf(1.0 / data.mixture_temperature);
    for (index, published) in [(1, 3.71), (2, 3.05), (3, 0.5)] {
        let found = 5.67 * share(index) / share(0);
        assert!((found / published - 1.0).abs() < 0.03, "{}: {found}", data.sources[index].name);
    }
}
