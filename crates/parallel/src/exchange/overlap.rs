//! What goes on while something travels between devices: the order of the buckets, and the streams.

use std::sync::Arc;

use switchyard_comm::{CommError, DeviceCommunicator};
use switchyard_kernels::{DeviceMark, DeviceValues, GradientMarks, SideKind, SideWork};

use super::on_devices::Cargo;
use super::{Bucket, Lane};

/// What goes on while gradients and values travel between devices.
#[derive(Debug, Clone, Copy)]
pub enum Overlap<'a> {
    /// Nothing.
    Nothing,
    /// Those of the next bucket are brought together, new values are made, and those of the one before are taken in.
    Exchanges,
    /// For gradients, the rest of the backward pass, which has been asked for and leaves these marks: each bucket
    /// travels when it has all of it. For values, as [`Exchanges`](Self::Exchanges).
    BackwardPass(&'a GradientMarks),
}

impl Overlap<'_> {
    /// Lets what `pack` makes of each turn travel; `land` takes in what has arrived. `then` does what may go on while
    /// the last travels.
    pub(super) fn travel<'a, 'd>(
        self,
        turns: &'a [Turn<'a>],
        any: &DeviceValues,
        devices: impl Fn(&Turn<'a>) -> &'d dyn DeviceCommunicator,
        pack: impl Fn(&Turn<'a>) -> Cargo<'a>,
        then: impl FnOnce(),
        land: impl Fn(&Turn<'a>, Cargo<'a>),
    ) -> Result<(), CommError> {
        if matches!(self, Self::Nothing) {
            for turn in turns {
                let cargo = pack(turn);
                cargo.travel(devices(turn), any)?;
                land(turn, cargo);
            }
            then();
            return Ok(());
        }
        let mut under_way: Option<(&Turn<'a>, Cargo<'a>, DeviceMark)> = None;
        // What travels keeps its memory until the work that comes next has waited for it.
        let arrive = |(turn, cargo, there): (&Turn<'a>, Cargo<'a>, DeviceMark)| {
            there.holds(any);
            land(turn, cargo);
        };
        for turn in turns {
            let cargo = pack(turn);
            let side = SideWork::behind(&any.mark(), any, SideKind::Exchange);
            let travelled = cargo.travel(devices(turn), any);
            let there = side.leave();
            if travelled.is_err() {
                there.holds(any);
                return travelled;
            }
            under_way.replace((turn, cargo, there)).into_iter().for_each(&arrive);
        }
        then();
        under_way.into_iter().for_each(arrive);
        Ok(())
    }
}

/// A bucket of one of several lanes.
pub(super) struct Turn<'a> {
    /// Which of all buckets it is.
    pub(super) number: usize,
    pub(super) lane: usize,
    pub(super) bucket: &'a Bucket,
    /// What the backward pass comes past when it has all gradients of the bucket, where it left marks.
    pub(super) behind: Option<Arc<DeviceMark>>,
}

/// All buckets, in the order in which a backward pass that left marks has their gradients, the last mark being its
/// end. Every rank has the same order: what a bucket has on any of them counts.
pub(super) fn turns<'a>(
    lanes: &[&'a Lane],
    marked: Option<(&GradientMarks, Arc<DeviceMark>)>,
) -> Vec<Turn<'a>> {
    let buckets =
        |(lane, of_lane): (usize, &&'a Lane)| of_lane.buckets.iter().map(move |bucket| (lane, bucket));
    let all = lanes.iter().enumerate().flat_map(buckets).enumerate();
    let Some((marks, end)) = marked else {
        return all.map(|(number, (lane, bucket))| Turn { number, lane, bucket, behind: None }).collect();
    };
    let mut numbered: Vec<_> = all
        .map(|(index, (lane, bucket))| {
            let number = |(name, block): (&String, &Option<usize>)| marks.number(name, (*block)?);
            // No parameter may be without.
            let last =
                bucket.parameters.iter().map(number).try_fold(0, |last, number| Some(last.max(number?)));
            let behind = last.map_or_else(|| Arc::clone(&end), |number| marks.mark(number));
            (last.unwrap_or(usize::MAX), Turn { number: index, lane, bucket, behind: Some(behind) })
        })
        .collect();
    numbered.sort_by_key(|(number, _)| *number);
    numbered.into_iter().map(|(_, turn)| turn).collect()
}
