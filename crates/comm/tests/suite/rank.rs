//! One rank of the jobs that `tests/under_mpirun.rs` and `tests/over_tcp.rs` start: `switchyard-comm-rank SCENARIO [RANK]`.
#![allow(clippy::print_stderr, reason = "what a rank prints is what the tests look at")]

use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use switchyard_comm::{BufferMut, Choice, Communicator, Launch, ReduceOp, StartOptions, World, abort, start};

#[path = "mod.rs"]
mod suite;

const TIMEOUT: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let scenario = arguments.first().map_or("suite", String::as_str);
    let chosen: usize = arguments.get(1).map_or(1, |rank| rank.parse().expect("a rank"));
    let launch =
        Launch::detect(Choice::Automatic, |name| std::env::var(name).ok()).expect("the launcher makes sense");
    let timeout = if scenario == "suite" { Duration::from_secs(120) } else { TIMEOUT };
    let options = StartOptions {
        timeout: Some(timeout),
        address: None,
        report: Box::new(|reason| eprintln!("report: {reason}")),
    };
    let world = match start(&launch, options) {
        Ok(world) => world,
        Err(error) => {
            eprintln!("start: {error}");
            return ExitCode::from(2);
        }
    };
    let is_chosen = world.communicator().rank() == chosen;
    match scenario {
        "suite" => whole_suite(&world),
        "panic" => {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                hook(info);
                abort(41);
            }));
            steps(&world, || assert!(!is_chosen, "as planned"));
        }
        "abort" => steps(&world, || {
            if is_chosen {
                thread::spawn(|| abort(75));
                thread::sleep(Duration::from_secs(60));
            }
        }),
        "stop" => steps(&world, || {
            if is_chosen {
                signal("STOP")
            }
        }),
        "kill" => steps(&world, || {
            if is_chosen {
                signal("KILL")
            }
        }),
        "busy" => steps(&world, || {
            if is_chosen {
                thread::sleep(TIMEOUT * 10)
            }
        }),
        "patient" => steps(&world, || thread::sleep(TIMEOUT * 2)),
        "short-pause" => steps(&world, || {
            if is_chosen {
                thread::sleep(TIMEOUT * 2 / 3)
            }
        }),
        "elsewhere" => elsewhere(&world, is_chosen),
        "device" => steps(&world, || match is_chosen {
            true => thread::sleep(TIMEOUT * 10),
            false => world.communicator().wait_for("a step", &mut || false).expect("it ends before"),
        }),
        // A rank is lost while the others wait for a device whose driver would also keep a program from ending.
        "driver" => {
            // SAFETY: the function can be called at any time.
            assert_eq!(unsafe { libc::atexit(driver) }, 0);
            steps(&world, || match is_chosen {
                true => signal("KILL"),
                false => world.communicator().wait_for("a step", &mut || false).expect("it ends before"),
            });
        }
        "return-early" if is_chosen => std::process::exit(75),
        "return-early" => steps(&world, || {}),
        other => panic!("no scenario {other}"),
    }
    world.finish().expect("all ranks leave");
    ExitCode::SUCCESS
}

fn whole_suite(world: &World) {
    let comm = world.communicator();
    suite::all_operations(&**comm);
    for broken in [
        suite::disagreement_in_operation,
        suite::disagreement_in_length,
        suite::disagreement_in_counts,
        suite::wrong_buffer,
    ] {
        broken(&*comm.split(0, "part").expect("all come"));
    }
    assert_eq!((world.local_rank(), world.local_size()), (comm.rank(), comm.size()));
    assert_eq!(comm.machines(), vec![0; comm.size()]);
    match world.backend() {
        "tcp" => assert_eq!(world.library(), "none"),
        backend => {
            assert_eq!((backend, world.library().contains("MPI")), ("mpi", true), "{}", world.library())
        }
    }
}

/// Three steps with a sum at the end of each; `event` happens in the second.
fn steps(world: &World, event: impl Fn()) {
    for step in 16..19 {
        world.activity().at(&format!("step {step}"));
        if step == 17 {
            event();
        }
        let comm = world.communicator();
        comm.all_reduce(BufferMut::F32(&mut [1.0; 100]), ReduceOp::Sum).expect("all ranks come");
    }
}

/// One rank waits in a group of its own making while the others wait in the world.
fn elsewhere(world: &World, is_chosen: bool) {
    let comm = world.communicator();
    let pair = comm.split(comm.rank() / 2, "pair").expect("all come");
    let group: &dyn Communicator = if is_chosen { &*pair } else { &**comm };
    group.barrier().expect("it ends before");
}

/// Waits for a device that does not answer.
extern "C" fn driver() {
    loop {
        thread::park();
    }
}

fn signal(name: &str) {
    let pid = std::process::id().to_string();
    Command::new("kill").args([&format!("-{name}"), &pid]).status().expect("kill exists");
}
