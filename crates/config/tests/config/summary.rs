//! The figures of `switchyard check`, against sums done by hand.

use switchyard_config::{Summary, resolve_str, summarize};

fn summary(preset: &str, sets: &[&str]) -> Summary {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    summarize(&resolve_str(&format!("name = \"x\"\nmodel.preset = \"{preset}\"\n"), &sets).unwrap().plan)
}

#[test]
fn one_expert_of_switch_base_is_active() {
    let routers = 12 * 768 * 8;
    let found = summary("switch-base-8", &[]);
    assert_eq!(found.total_parameters, 619_339_008);
    assert_eq!(found.active_parameters, 222_903_552 + routers, "T5-Base and the routers");
    let top2 = summary("switch-base-8", &["routing.router=top2"]);
    assert_eq!(top2.active_parameters - found.active_parameters, 12 * 2 * 768 * 3072);
    let all = summary("switch-base-8", &["routing.router=expert_choice", "routing.capacity_factor=8"]);
    assert_eq!(all.active_parameters, all.total_parameters);
}

#[test]
fn capacity_follows_the_groups() {
    let found = summary("switch-base-8", &[]);
    let [encoder, decoder] = found.stacks.as_slice() else { panic!("two sparse stacks") };
    assert_eq!((encoder.stack, encoder.tokens_per_group), ("encoder", 64 * 512));
    assert_eq!((encoder.expert_capacity, encoder.eval_expert_capacity), (5120, 8192));
    assert_eq!(encoder.sparse_layers, [1, 3, 5, 7, 9, 11]);
    assert_eq!((decoder.tokens_per_group, decoder.expert_capacity), (64 * 114, 1140));
    let grouped = summary("switch-base-8", &["routing.group_rows=1"]);
    assert_eq!(grouped.stacks[1].expert_capacity, 18, "114 * 1.25 / 8 = 17.8, rounded up");
    let hf = summary("switch-base-8", &["routing.semantics=hf"]);
    assert_eq!((hf.stacks[1].tokens_per_group, hf.stacks[1].expert_capacity), (114, 64));
    assert!(summary("t5-small", &[]).stacks.is_empty());
}

/// Factors that no machine can serve must not overflow what is shown of them.
#[test]
fn capacity_ends_at_the_tokens_of_a_group() {
    for rounding in ["ceil", "floor", "multiple_of_8"] {
        let rounding = format!("routing.capacity_rounding={rounding}");
        let found = summary("switch-base-8", &["routing.capacity_factor=1e300", &rounding]);
        assert_eq!(found.stacks[0].expert_capacity, 64 * 512);
    }
    let choice = summary("switch-base-8", &["routing.router=expert_choice", "routing.capacity_factor=1e300"]);
    assert_eq!(choice.active_parameters, choice.total_parameters);
}

#[test]
fn tokens_and_memory_of_a_step() {
    let found = summary("t5-small", &["optimizer.kind=adamw"]);
    assert_eq!((found.tokens_per_step, found.micro_batches_per_step), (2048 * 626, 32));
    assert_eq!(found.memory.parameter_bytes, 4 * 60_506_624);
    assert_eq!(found.memory.total_bytes(), 16 * 60_506_624);
    let hand = [
        "model.d_model=4",
        "model.d_ff=8",
        "model.d_kv=2",
        "model.num_heads=3",
        "model.expert_layer_every=2",
        "model.num_layers=2",
        "model.num_decoder_layers=1",
        "model.num_experts=2",
        "model.vocab_size=16",
    ];
    // Embedding; per stack bucket table and final norm; attention: norm, three [4, 6], one [6, 4];
    // dense layer: norm, [4, 8], [8, 4]; sparse layer: norm, router [4, 2], two experts.
    let attention = 4 + 4 * 10;
    let feed_forward = 4 + 2 * 12;
    let sparse = 4 + 6 + 2 * 2 * 12;
    let expected = 20 + 2 * (35 + 4) + 4 * attention + 2 * feed_forward + sparse;
    assert_eq!(summary("t5-small", &hand).memory.optimizer_bytes, 4 * expected);
}
