//! Every parameter count of the model family, from names alone.

use switchyard_config::presets::default_init_scale;
use switchyard_config::{Activation, Initialization, PresetError, preset, preset_names};

/// Counts of transformers 4.57.6 on the meta device, or of the same formula where it cannot hold the model.
const COUNTS: &[(&str, u64)] = &[
    ("t5-small", 60_506_624),
    ("t5-base", 222_903_552),
    ("t5-large", 737_668_096),
    ("t5-xl", 2_851_598_336),
    ("t5-xxl", 11_307_321_344),
    ("t5-v1.1-small", 76_961_152),
    ("t5-v1.1-base", 247_577_856),
    ("t5-v1.1-large", 783_150_080),
    ("t5-v1.1-xl", 2_849_757_184),
    ("t5-v1.1-xxl", 11_135_332_352),
    ("mt5-small", 300_176_768),
    ("mt5-base", 582_401_280),
    ("mt5-large", 1_229_581_312),
    ("mt5-xl", 3_742_619_648),
    ("mt5-xxl", 12_921_057_280),
    ("t5-efficient-tiny", 15_570_688),
    ("t5-efficient-mini", 31_220_480),
    ("t5-efficient-small", 60_506_624),
    ("t5-efficient-base", 222_903_552),
    ("t5-efficient-large", 737_668_096),
    ("t5-efficient-xl", 2_851_598_336),
    ("t5-efficient-xxl", 11_307_321_344),
    ("t5-efficient-tiny-nl32", 66_986_752),
    ("t5-efficient-base-el4", 166_268_160),
    ("t5-efficient-small-dl12", 85_681_664),
    ("t5-efficient-base-ff12000", 552_025_344),
    ("t5-efficient-base-kv128", 307_838_208),
    ("t5-efficient-base-nh24", 307_838_976),
    ("t5-efficient-small-dm2000", 236_352_512),
    ("switch-base-8", 619_339_008),
    ("switch-base-16", 1_072_397_568),
    ("switch-base-32", 1_978_514_688),
    ("switch-base-64", 3_790_748_928),
    ("switch-base-128", 7_415_217_408),
    ("switch-base-256", 14_664_154_368),
    ("switch-large-128", 26_309_291_008),
    ("switch-xxl-128", 394_543_476_736),
    ("switch-c-2048", 1_571_308_972_448),
    ("switch-base-128-paper", 7_415_217_408),
    ("switch-large-128-paper", 27_120_888_832),
];

#[test]
fn parameter_counts_of_the_whole_family() {
    let counted: Vec<(&str, u64)> =
        COUNTS.iter().map(|(name, _)| (*name, preset(name).unwrap().num_parameters())).collect();
    assert_eq!(counted, COUNTS);
}

#[test]
fn every_named_preset_resolves_and_is_counted() {
    for name in preset_names() {
        assert!(preset(&name).is_ok(), "{name}");
        assert!(name == "tiny" || COUNTS.iter().any(|(counted, _)| *counted == name), "{name} has no count");
    }
}

#[test]
fn recipes_differ_as_published() {
    let switch = preset("switch-base-8").unwrap();
    assert_eq!((switch.activation, switch.gated), (Activation::Relu, false));
    assert!(switch.tie_word_embeddings && switch.scale_decoder_outputs);
    assert_eq!((switch.init, switch.init_scale), (Initialization::Paper, 0.1));
    let mt5 = preset("mt5-small").unwrap();
    assert_eq!((mt5.activation, mt5.gated), (Activation::GeluTanh, true));
    assert!(!mt5.tie_word_embeddings && !mt5.scale_decoder_outputs);
    assert_eq!(mt5.init_scale, 1.0);
    assert_eq!(default_init_scale(Initialization::Hf, 8), 1.0);
}

#[test]
fn efficient_names_are_parsed_in_any_combination() {
    let model = preset("t5-efficient-large-nl36-dl2-ff1000-dm640-kv16-nh20").unwrap();
    let sizes =
        (model.num_layers, model.num_decoder_layers, model.d_ff, model.d_model, model.d_kv, model.num_heads);
    assert_eq!(sizes, (36, 2, 1000, 640, 16, 20));
}

#[test]
fn faulty_names_are_refused_with_the_part() {
    let message = |name| preset(name).unwrap_err().to_string();
    assert_eq!(message("switch-bsae-8"), "unknown preset `switch-bsae-8`; did you mean `switch-base-8`?");
    let unlike = message("llama");
    assert!(
        unlike.starts_with("unknown preset `llama`; names are `tiny` and those of the families "),
        "{unlike}"
    );
    let families: Vec<&str> = unlike.split('`').filter(|word| word.ends_with('-')).collect();
    for name in preset_names() {
        let known = name == "tiny" || families.iter().any(|family| name.starts_with(family));
        assert!(known, "{name} is of no family in: {unlike}");
    }
    for name in ["t5-efficient-tiny-sh", "t5-efficient-base-nl4-skv"] {
        assert!(matches!(preset(name), Err(PresetError::NoDefinition { .. })), "{name}");
    }
    for part in ["nl0", "nl", "zz4", "nl4-nl4", "el99999999999999999999", ""] {
        let name = format!("t5-efficient-base-{part}");
        assert!(matches!(preset(&name), Err(PresetError::BadPart { .. })), "{name}");
    }
    assert!(matches!(preset("t5-efficient-huge-nl4"), Err(PresetError::Unknown { .. })));
}
