//! Ten recorded losses: a change of numbers must be meant.

use super::{batch, small_plan, solo, step};

/// Total losses of ten steps on one generated batch, with dropout, jitter and drops.
const LOSSES: [f64; 10] =
    [4.53367, 4.48894, 4.29516, 4.24250, 4.15762, 4.06038, 3.82640, 3.93571, 3.78897, 3.73133];

#[test]
fn ten_steps_give_the_recorded_losses() {
    let plan =
        small_plan(&["trainer.dropout_rate=0.1", "trainer.expert_dropout=0.1", "data.micro_batch_rows=4"]);
    let batch = batch(&plan, 1);
    let mut learner = solo(&plan);
    let steps: Vec<_> = (0..10).map(|number| step(&mut learner, &plan, &batch, number)).collect();
    assert!(steps[0].moe.iter().any(|(_, layer)| layer.dropped > 0));
    let found: Vec<f64> = steps.iter().map(|step| step.total_loss).collect();
    let near = found.iter().zip(LOSSES).all(|(a, b)| (a - b).abs() < 1e-4);
    assert!(near, "{found:.5?}");
}
