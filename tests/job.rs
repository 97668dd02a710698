//! Processes that a test starts: none outlives its test, and none is waited for without end.

use std::io::Read;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest time that anything here may take: far more than it does, so that only a hang exceeds it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// How long processes may go on after the one that started them.
const GRACE: Duration = Duration::from_secs(10);

/// The variable by which a job's processes are known, whoever started them and whoever lives on.
const MARK: &str = "SWITCHYARD_TEST_JOB";

/// A program under way with all that it starts, which end with this value, also when a test fails.
pub(crate) struct Job {
    child: Child,
    said: Option<[JoinHandle<Vec<u8>>; 2]>,
    mark: Vec<u8>,
}

impl Job {
    pub(crate) fn start(mut command: Command) -> Self {
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let mark = format!("{}-{}", std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed));
        command.env(MARK, &mark).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let said = [collect(child.stdout.take()), collect(child.stderr.take())];
        Self { child, said: Some(said), mark: format!("{MARK}={mark}").into_bytes() }
    }

    /// The process that was started: the program, mpirun, or the script that starts it.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its processes that run now, with their environments.
    pub(crate) fn processes(&self) -> Vec<(u32, Vec<Vec<u8>>)> {
        let listing = std::fs::read_dir("/proc").expect("Linux").flatten();
        let pids = listing.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let environment = |pid| {
            // Those that have ended have none.
            let text = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let variables: Vec<_> = text.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect();
            variables.contains(&self.mark).then_some((pid, variables))
        };
        pids.filter_map(environment).collect()
    }

    /// Sends `signal` to the process that was started.
    pub(crate) fn signal(&self, signal: &str) {
        send(signal, self.pid());
    }

    /// Waits for the end, with what was said. Panics when it does not come, or when processes go on that
    /// no launcher's crash explains.
    pub(crate) fn ended(mut self) -> Output {
        let came = self.comes_to_an_end();
        let left = self.left_behind();
        self.kill_all();
        let said = self.said.take().expect("not ended before");
        let [out, err] = said.map(|said| said.join().expect("no panic"));
        let output = Output { status: self.child.wait().expect("a child"), stdout: out, stderr: err };
        let orderly = output.status.code().is_some();
        assert!(!orderly || left.is_empty(), "{left:?} outlived their job\n{}", stderr(&output));
        assert!(came || announced(&output).is_some(), "no end\n{}", stderr(&output));
        output
    }

    fn comes_to_an_end(&mut self) -> bool {
        let started = Instant::now();
        while self.is_running() {
            if started.elapsed() > PATIENCE {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }

    /// Whether the process that was started goes on.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Processes that still run when those that end have had time to.
    fn left_behind(&self) -> Vec<u32> {
        let started = Instant::now();
        loop {
            let left: Vec<u32> = self.processes().into_iter().map(|(pid, _)| pid).collect();
            if left.is_empty() || started.elapsed() > GRACE {
                return left;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends them all, also those that are started meanwhile.
    fn kill_all(&self) {
        loop {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            for (pid, _) in left {
                // One that has ended meanwhile needs no signal.
                drop(Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status());
            }
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill_all();
        // It has been sent a signal that nothing survives.
        drop(self.child.wait());
    }
}

/// Reads all that comes: whoever holds the other end can neither be stopped by a full pipe nor keep the
/// test waiting once it is gone.
fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    let mut pipe = pipe.expect("piped");
    std::thread::spawn(move || {
        let mut said = Vec::new();
        // What was read before an error is what there is.
        drop(pipe.read_to_end(&mut said));
        said
    })
}

/// Exit code of a job. mpirun 4.1 itself crashes or hangs now and then while it cleans up after an abort;
/// then the code that it has printed counts.
pub(crate) fn exit_code(output: &Output) -> Option<i32> {
    output.status.code().or_else(|| announced(output))
}

fn announced(output: &Output) -> Option<i32> {
    stderr(output).split_once("with errorcode ")?.1.split('.').next()?.trim().parse().ok()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn send(signal: &str, pid: u32) {
    let sent = Command::new("kill").args([signal, &pid.to_string()]).status().expect("kill runs");
    assert!(sent.success(), "{signal} to {pid}");
}
