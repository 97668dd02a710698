//! Jobs that must not begin: nothing is written, one rank says why.

use super::{EXPERTS, SHARED, ends_with, job, mpirun_each};
use crate::support::{Place, for_many_ranks};

#[test]
fn ranks_with_another_experiment_are_refused_before_anything_happens() {
    let place = Place::with_experiment();
    let same = "train run.toml --set data.micro_batch_rows=2";
    let refused = |other: &str, difference: &str| {
        let other = format!("{same} --set {other}");
        let said = ends_with(mpirun_each(&place, &[("-n 2", same), ("-n 1", &other), ("-n 1", same)]), 1);
        assert!(said.contains(difference), "{said}");
        assert_eq!(said.matches("would not train the same").count(), 1, "said once: {said}");
        assert_eq!(said.matches(" on rank 0, ").count(), 1, "nothing else differs: {said}");
        assert!(!place.path("runs").exists() && !place.path("cache").exists());
    };
    refused("optimizer.learning_rate=0.5", "optimizer.learning_rate = 0.02 on rank 0, 0.5 on rank 2");
    refused("seed=4", "seed = 3 on rank 0, 4 on rank 2");
}

#[test]
fn an_experiment_that_one_rank_cannot_read_is_refused_by_all() {
    let place = Place::with_experiment();
    let parts = [("-n 1", "train run.toml"), ("-n 1", "train missing.toml")];
    let said = ends_with(mpirun_each(&place, &parts), 1);
    assert_eq!(said.matches("missing.toml").count(), 1, "said once: {said}");
    assert!(!place.path("runs").exists());
}

#[test]
fn copies_that_do_not_know_of_each_other_are_refused() {
    let place = Place::with_experiment();
    let announced = [
        [("RANK", "0"), ("WORLD_SIZE", "4")],
        [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "4")],
    ];
    for variables in announced {
        let mut command = place.command("train run.toml");
        for_many_ranks(&mut command, &place);
        command.envs(variables);
        let said = ends_with(command, 1);
        assert!(said.contains("4 ranks") && said.contains("the MPI library sees 1"), "{said}");
        assert!(said.contains("start") && said.contains("mpirun"), "tells the mend: {said}");
        assert!(!place.path("runs").exists() && !place.path("cache").exists());
    }
    let mut command = place.command("train run.toml --max-steps 1 --launcher none");
    command.envs(announced[0]);
    ends_with(command, 0);
}

#[test]
fn sizes_that_do_not_fit_are_refused_once() {
    let place = Place::with_experiment();
    let refused = |ranks, sets: &str, words: &[&str]| {
        let said = job(&place, ranks, &format!("train run.toml {sets}"), 1);
        for word in words {
            assert_eq!(said.matches(word).count(), 1, "{word}: {said}");
        }
        assert_eq!(said.matches("error:").count(), 1, "{said}");
    };
    let shared = "--set data.micro_batch_rows=2";
    refused(3, shared, &["which 3 data-parallel ranks cannot share evenly"]);
    let three = format!("{shared} --set parallel.expert_parallel_size=2");
    refused(3, &three, &["expert_parallel_size = 2 does not divide the 3 data-parallel ranks"]);
    refused(2, EXPERTS, &["does not divide the 2 data-parallel ranks"]);
    refused(4, "--set parallel.expert_parallel_size=3", &["does not divide model.num_experts = 4"]);
    refused(3, "--set parallel.tensor_parallel_size=2", &["3 ranks cannot be cut into groups"]);
    let four = format!("{shared} --set parallel.data_parallel_size=4");
    refused(2, &four, &["is not the job's 2 ranks"]);
    let always = format!("{shared} {EXPERTS} --set comm.hierarchical_all_to_all=always");
    refused(4, &always, &["needs the ranks of an expert group on several machines"]);
    refused(2, "--set model.num_expert=4", &["unknown key `model.num_expert`"]);
    assert!(!place.path("runs").exists());
}

#[test]
fn an_existing_run_is_refused_once() {
    let place = Place::with_experiment();
    job(&place, 2, &format!("{SHARED} --run-dir run --max-steps 2"), 0);
    let said = job(&place, 2, &format!("{SHARED} --run-dir run"), 1);
    assert_eq!(said.matches("exists already").count(), 1, "{said}");
    assert!(said.contains("--resume auto"), "{said}");
}
