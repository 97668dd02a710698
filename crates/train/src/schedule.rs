//! The learning rate of a step.

use switchyard_config::plan::{ScheduleKind, SchedulePlan};

/// Factor on the learning rate at `step`, counted from 1.
pub fn factor(schedule: &SchedulePlan, step: u64) -> f64 {
    let (now, warmup) = (step as f64, schedule.warmup_steps as f64);
    if schedule.kind == ScheduleKind::InverseSqrt {
        return 1.0 / now.max(warmup).max(1.0).sqrt();
    }
    if now < warmup {
        return now / warmup;
    }
    let decay_steps = (schedule.total_steps as f64 - warmup).max(1.0);
    let done = ((now - warmup) / decay_steps).min(1.0);
    let left = match schedule.kind {
        ScheduleKind::Linear => 1.0 - done,
        ScheduleKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
        ScheduleKind::Constant | ScheduleKind::InverseSqrt => 1.0,
    };
    schedule.final_fraction + (1.0 - schedule.final_fraction) * left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(kind: ScheduleKind) -> SchedulePlan {
        SchedulePlan { kind, warmup_steps: 10, total_steps: 110, final_fraction: 0.1 }
    }

    #[test]
    fn shapes() {
        let at = |kind, step| factor(&schedule(kind), step);
        assert_eq!(at(ScheduleKind::InverseSqrt, 1), 1.0 / 10_f64.sqrt());
        assert_eq!(at(ScheduleKind::InverseSqrt, 100), 0.1);
        for kind in [ScheduleKind::Linear, ScheduleKind::Cosine, ScheduleKind::Constant] {
            assert_eq!(at(kind, 5), 0.5);
            assert_eq!(at(kind, 10), 1.0);
        }
        assert!((at(ScheduleKind::Linear, 60) - 0.55).abs() < 1e-12);
        assert!((at(ScheduleKind::Cosine, 60) - 0.55).abs() < 1e-12);
        assert!((at(ScheduleKind::Cosine, 200) - 0.1).abs() < 1e-12);
        assert_eq!(at(ScheduleKind::Constant, 200), 1.0);
    }
}
