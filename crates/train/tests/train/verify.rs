//! What `verify` refuses, and what it does not let pass.

use switchyard_config::plan::{RouterKind, RoutingSemantics};
use switchyard_kernels::test_device;
use switchyard_model::SwitchTransformer;
use switchyard_train::verify::{Array, Arrays, Comparison, FixtureError, Tolerances, verify};

use super::fixture::Fixture;

/// A model with 96 ids and its fixture: 3 rows, 16 inputs, 10 targets, 12 greedy steps.
fn switch() -> (Fixture, SwitchTransformer) {
    let fixture = Fixture::open("switch_step2_drop");
    let model = fixture.model(&test_device());
    (fixture, model)
}

fn compare(
    fixture: &Fixture,
    model: &SwitchTransformer,
    arrays: &Arrays,
) -> Result<Vec<Comparison>, FixtureError> {
    let (config, routing) = (fixture.directory.model(), fixture.directory.routing());
    verify(model, config, routing, arrays, Tolerances::default()).map(|result| result.compared)
}

/// Names of the arrays that differ too much.
fn failed(fixture: &Fixture, model: &SwitchTransformer, arrays: &Arrays) -> Vec<String> {
    let compared = compare(fixture, model, arrays).unwrap();
    compared.into_iter().filter(|array| !array.passed()).map(|array| array.name).collect()
}

#[test]
fn a_wrong_weight_or_id_does_not_pass() {
    let (fixture, mut model) = switch();
    let name = "decoder.block.3.moe.experts.wo";
    let mut weights = model.parameter(name).unwrap();
    weights.iter_mut().for_each(|w| *w *= 1.01);
    model.set_parameter(name, weights).unwrap();
    let names = failed(&fixture, &model, &fixture.arrays);
    assert!(names.iter().any(|name| name == "logits"), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with("encoder")), "{names:?}");

    let model = fixture.model(&test_device());
    let mut changed = fixture.arrays.clone();
    changed.get_mut("greedy_ids").unwrap().values[3] += 1.0;
    assert_eq!(failed(&fixture, &model, &changed), ["greedy_ids"]);
}

/// A change of one array that makes the fixture unusable.
struct Malformed {
    array: &'static str,
    change: fn(&mut Array),
    problem: &'static str,
}

const fn malformed(array: &'static str, change: fn(&mut Array), problem: &'static str) -> Malformed {
    Malformed { array, change, problem }
}

/// Drops the last row.
fn fewer_rows(array: &mut Array) {
    array.shape[0] -= 1;
    array.values.truncate(array.shape.iter().product());
}

fn flat(array: &mut Array) {
    array.shape = vec![array.values.len()];
}

/// One column instead of what was there.
fn one_column(array: &mut Array) {
    array.shape[1] = 1;
    array.values.truncate(array.shape[0]);
}

fn empty(array: &mut Array) {
    array.shape[1] = 0;
    array.values.clear();
}

fn first(array: &mut Array, value: f64) {
    array.values[0] = value;
}

const MALFORMED: &[Malformed] = &[
    malformed("input_ids", flat, "has shape [48]; expected [rows, length]"),
    malformed("input_ids", empty, "has shape [3, 0]; expected at least one value"),
    malformed("input_ids", |a| a.values.truncate(5), "has shape [3, 16] and 5 values"),
    malformed("input_ids", |a| a.shape = vec![usize::MAX, 2], "and 48 values"),
    malformed("input_ids", |a| first(a, -1.0), "holds -1 in row 0, column 0; expected ids"),
    malformed("input_ids", |a| first(a, -100.0), "holds -100 in row 0, column 0; expected ids"),
    malformed("input_ids", |a| a.values[17] = 96.0, "holds 96 in row 1, column 1; expected ids"),
    malformed("input_ids", |a| first(a, 1.5), "holds 1.5"),
    malformed("input_ids", |a| first(a, f64::NAN), "holds NaN"),
    malformed("input_ids", |a| first(a, f64::INFINITY), "holds inf"),
    malformed("attention_mask", fewer_rows, "has shape [2, 16]; expected [3, 16], as input_ids has"),
    malformed("attention_mask", flat, "has shape [48]"),
    malformed("attention_mask", |a| first(a, 2.0), "holds 2 in row 0, column 0; expected 0 or 1"),
    malformed("attention_mask", |a| first(a, f64::NAN), "holds NaN"),
    malformed("labels", fewer_rows, "has 2 rows and input_ids has 3"),
    malformed("labels", flat, "has shape [30]"),
    malformed("labels", |a| first(a, 96.0), "holds 96 in row 0, column 0; expected -100 or ids"),
    malformed("labels", |a| first(a, -1.0), "holds -1"),
    malformed("labels", |a| first(a, 0.5), "holds 0.5"),
    malformed("labels", |a| first(a, f64::NEG_INFINITY), "holds -inf"),
    malformed("labels", |a| a.values.fill(-100.0), "holds nothing but -100"),
    malformed("alt_attention_mask", fewer_rows, "has shape [2, 16]; expected [3, 16], as input_ids has"),
    malformed("alt_attention_mask", one_column, "has shape [3, 1]"),
    malformed("alt_attention_mask", |a| first(a, 0.5), "holds 0.5"),
    malformed("decoder_attention_mask", one_column, "has shape [3, 1]; expected [3, 10], as labels has"),
    malformed("decoder_attention_mask", flat, "has shape [30]"),
    malformed("decoder_attention_mask", |a| first(a, -1.0), "holds -1"),
    malformed("greedy_ids", flat, "has shape [39]; expected [rows, length]"),
    malformed("greedy_ids", one_column, "has shape [3, 1]; expected the start token"),
    malformed("greedy_ids", empty, "has shape [3, 0]"),
    malformed("greedy_ids", fewer_rows, "has 2 rows and input_ids has 3"),
    malformed("greedy_ids", |a| a.values.truncate(20), "has shape [3, 13] and 20 values"),
    malformed("greedy_ids", |a| first(a, f64::NAN), "holds NaN"),
    malformed("greedy_ids", |a| first(a, 96.0), "holds 96"),
    malformed("greedy_nocache_ids", flat, "has shape [39]"),
    malformed("greedy_nocache_ids", one_column, "has shape [3, 1]"),
    malformed("greedy_nocache_ids", fewer_rows, "has 2 rows and input_ids has 3"),
];

#[test]
fn malformed_inputs_are_refused() {
    let (fixture, model) = switch();
    for Malformed { array, change, problem } in MALFORMED {
        let mut arrays = fixture.arrays.clone();
        change(arrays.get_mut(*array).unwrap());
        let error = compare(&fixture, &model, &arrays).expect_err(problem);
        let FixtureError::BadInput { name, problem: found } = &error else { panic!("{error}") };
        assert_eq!(name, array, "{found}");
        assert!(found.contains(problem), "{array}: {problem:?} is not in {found:?}");
    }
    for name in ["input_ids", "attention_mask", "labels"] {
        let mut arrays = fixture.arrays.clone();
        arrays.remove(name);
        assert_eq!(compare(&fixture, &model, &arrays), Err(FixtureError::MissingInput { name }));
    }
}

#[test]
fn expected_arrays_of_a_wrong_shape_do_not_pass() {
    let (fixture, model) = switch();
    let mut arrays = fixture.arrays.clone();
    let change = |arrays: &mut Arrays, name: &str, change: fn(&mut Array)| {
        change(arrays.get_mut(name).unwrap());
    };
    change(&mut arrays, "logits", flat);
    change(&mut arrays, "token_loss", |a| a.values.truncate(3));
    change(&mut arrays, "encoder_expert_kept", fewer_rows);
    change(&mut arrays, "greedy_logits", |a| a.values.truncate(100));
    let expected = ["encoder_expert_kept", "greedy_logits", "logits", "token_loss"];
    assert_eq!(failed(&fixture, &model, &arrays), expected);
    for other in [fewer_rows, flat, one_column] {
        let mut arrays = fixture.arrays.clone();
        change(&mut arrays, "greedy_logits", other);
        assert_eq!(failed(&fixture, &model, &arrays), ["greedy_logits"]);
    }
}

#[test]
fn an_expected_number_that_is_none_does_not_pass() {
    let (fixture, model) = switch();
    for number in [f64::NAN, f64::INFINITY] {
        let mut arrays = fixture.arrays.clone();
        let expected = ["encoder_expert_choice", "greedy_logits", "logits", "loss"];
        for name in expected {
            first(arrays.get_mut(name).unwrap(), number);
        }
        let compared = compare(&fixture, &model, &arrays).unwrap();
        let infinite = compared.iter().filter(|c| c.difference == f64::INFINITY);
        assert_eq!(infinite.map(|c| &c.name).collect::<Vec<_>>(), expected);
    }
    let compared =
        Comparison { name: "loss".to_owned(), difference: f64::INFINITY, tolerance: f64::INFINITY };
    assert!(!compared.passed(), "whatever is allowed");
}

#[test]
fn a_model_that_computes_nan_does_not_pass() {
    let (fixture, mut model) = switch();
    let mut weights = model.parameter("shared.embedding").unwrap();
    weights.fill(f32::NAN);
    model.set_parameter("shared.embedding", weights).unwrap();
    // Even an implementation that found the same.
    let mut arrays = fixture.arrays.clone();
    arrays.get_mut("logits").unwrap().values.fill(f64::NAN);
    // Distances between tokens depend on no embedding.
    let unharmed = |name: &str| name.ends_with("position_bias") || name.starts_with("rel_bucket");
    for compared in compare(&fixture, &model, &arrays).unwrap() {
        if arrays[&compared.name].discrete || unharmed(&compared.name) {
            continue;
        }
        assert_eq!(compared.difference, f64::INFINITY, "{}", compared.name);
        assert!(!compared.passed());
    }
}

/// A run may route in ways that transformers does not know: its numbers differ, which is all.
#[test]
fn other_routers_are_compared() {
    let (fixture, model) = switch();
    for router in [RouterKind::Top1, RouterKind::Top2, RouterKind::ExpertChoice] {
        let mut routing = fixture.directory.routing().clone();
        (routing.router, routing.semantics) = (router, RoutingSemantics::Paper);
        let config = fixture.directory.model();
        let result = verify(&model, config, &routing, &fixture.arrays, Tolerances::default()).unwrap();
        let names: Vec<_> = result.compared.iter().map(|c| c.name.as_str()).collect();
        assert!(names.contains(&"encoder_expert_kept") && names.contains(&"loss"), "{names:?}");
        let passed = |name: &str| result.compared.iter().any(|c| c.name == name && c.passed());
        assert!(passed("rel_bucket_encoder") && !passed("encoder_expert_kept"), "{router:?}");
    }
}

#[test]
fn decoding_without_a_cache_is_compared_alone() {
    let (fixture, model) = switch();
    let mut arrays = fixture.arrays.clone();
    arrays.remove("greedy_ids");
    let config = fixture.directory.model();
    let result = verify(&model, config, fixture.directory.routing(), &arrays, Tolerances::default()).unwrap();
    assert!(result.compared.iter().any(|c| c.name == "greedy_nocache_ids" && c.passed()));
    assert!(result.not_compared.iter().any(|name| name == "greedy_logits"));
}
