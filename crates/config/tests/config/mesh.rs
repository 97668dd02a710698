//! Meshes that do and do not fit a run.

use switchyard_config::{MeshShape, resolve_str};

const RUN: &str = "name = \"x\"\nmodel.preset = \"tiny\"\nmodel.num_experts = 8\n\
                   data.batch_rows = 64\ndata.micro_batch_rows = 8\n";

fn mesh(sets: &[&str], ranks: usize) -> Result<MeshShape, String> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    let resolved = resolve_str(RUN, &sets).map_err(|error| error.to_string())?;
    MeshShape::of(&resolved.plan, ranks, &resolved.provenance).map_err(|error| error.to_string())
}

#[test]
fn the_data_axis_is_what_the_other_axes_leave() {
    assert_eq!(mesh(&[], 1).unwrap(), MeshShape::SOLO);
    assert_eq!(mesh(&[], 4).unwrap(), MeshShape { data: 4, expert: 1, tensor: 1 });
    let sets = ["parallel.expert_parallel_size=4", "parallel.tensor_parallel_size=2"];
    assert_eq!(mesh(&sets, 8).unwrap(), MeshShape { data: 4, expert: 4, tensor: 2 });
}

#[test]
fn sizes_that_do_not_fit_are_refused_with_the_keys() {
    let refused = |sets: &[&str], ranks, words: &[&str]| {
        let message = mesh(sets, ranks).unwrap_err();
        for word in words {
            assert!(message.contains(word), "{word}: {message}");
        }
    };
    refused(&["parallel.tensor_parallel_size=2"], 3, &["3 ranks", "parallel.tensor_parallel_size = 2"]);
    refused(&["parallel.data_parallel_size=4"], 2, &["parallel.data_parallel_size = 4", "start 4 ranks"]);
    refused(&["parallel.expert_parallel_size=4"], 2, &["parallel.expert_parallel_size = 2 fits"]);
    refused(&["parallel.expert_parallel_size=3"], 3, &["does not divide model.num_experts = 8"]);
    refused(&["parallel.tensor_parallel_size=3"], 3, &["does not divide model.num_heads"]);
    refused(&["data.batch_rows=24"], 4, &["4 data-parallel ranks", "data.batch_rows a multiple of 32"]);
    refused(&["parallel.data_parallel_size=3"], 3, &["3 data-parallel ranks"]);
    refused(&["parallel.expert_parallel_size=0"], 1, &["must be at least 1"]);
    refused(&["comm.timeout_s=0"], 1, &["comm.timeout_s = 0"]);
    let dense = ["model.num_experts=0", "model.expert_layer_every=0", "parallel.expert_parallel_size=2"];
    refused(&dense, 2, &["no experts to spread"]);
}

#[test]
fn who_insists_on_machines_gets_them_or_is_refused() {
    let check = |choice: &str, expert: usize, tensor: usize, machines: &[usize]| {
        let sets = [
            format!("comm.hierarchical_all_to_all={choice}"),
            format!("parallel.expert_parallel_size={expert}"),
            format!("parallel.tensor_parallel_size={tensor}"),
        ];
        let resolved = resolve_str(RUN, &sets).unwrap();
        let mesh = MeshShape::of(&resolved.plan, machines.len(), &resolved.provenance).unwrap();
        let checked = mesh.check_machines(&resolved.plan, machines, &resolved.provenance);
        checked.map_err(|error| error.to_string())
    };
    assert_eq!(check("always", 4, 1, &[0, 0, 1, 1]), Ok(()));
    assert_eq!(check("always", 4, 2, &[0, 0, 0, 0, 1, 1, 1, 1]), Ok(()));
    assert_eq!(check("always", 1, 1, &[0, 0]), Ok(()), "nothing travels");
    for choice in ["auto", "never"] {
        assert_eq!(check(choice, 2, 1, &[0, 1]), Ok(()));
    }
    let refused = |expert, tensor, machines: &[usize], words: &str| {
        let message = check("always", expert, tensor, machines).unwrap_err();
        assert!(message.contains(words), "{message}");
    };
    refused(4, 1, &[0, 0, 0, 1], "those of rank 0's group are on machines 0, 0, 0, 1");
    refused(2, 1, &[0, 0], "those of rank 0's group are on machines 0, 0");
    refused(8, 1, &[0, 0, 1, 1, 0, 0, 2, 2], "are on machines 0, 0, 1, 1, 0, 0, 2, 2");
    // The first group stands evenly, the second does not.
    refused(4, 1, &[0, 0, 1, 1, 1, 2, 2, 2], "those of rank 4's group are on machines 1, 2, 2, 2");
    // A machine a tensor rank: each expert group has one.
    refused(4, 2, &[0, 1, 0, 1, 0, 1, 0, 1], "those of rank 0's group are on machines 0, 0, 0, 0");
}

#[test]
fn every_expert_group_has_a_line() {
    let mesh = MeshShape { data: 4, expert: 2, tensor: 1 };
    let plan = resolve_str(RUN, &[]).unwrap().plan;
    let lines = mesh.describe(&plan.model);
    assert_eq!(lines[1..], ["experts 0 to 3 on ranks 0, 2", "experts 4 to 7 on ranks 1, 3"]);
    let mesh = MeshShape { data: 8, expert: 8, tensor: 1 };
    assert_eq!(mesh.describe(&plan.model)[1], "expert 0 on rank 0");
}
