//! Ends a job whose ranks wait in vain, and says for whom.
//!
//! On each rank a thread tells the first two ranks over TCP, every second or more often, what its
//! process does. They know all ranks; the others know these two. When a collective has taken longer
//! than the deadline, or a rank has vanished, rank 0 reports and ends the job; the second rank does
//! when rank 0 is the one that is missing, and any rank does when both are.
//!
//! A rank that computes for long is no trouble until somebody waits for it.

use std::io;
use std::net::{TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::activity::Activity;
use crate::watchdog::link::Link;
use crate::watchdog::message::{Card, Message, Status};
use crate::watchdog::table::{Limits, Table};

mod link;
pub(crate) mod message;
mod table;

/// The ranks that know all others: the first ones.
const HUBS: usize = 2;

/// How long a connection to a hub may take to open, by one of its addresses.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a rank that ends the job has for it before the others try.
const ENDING_GRACE: Duration = Duration::from_secs(5);

/// A rank's place among the watchdogs, before they know each other.
#[derive(Debug)]
pub(crate) struct Post {
    rank: usize,
    size: usize,
    listener: Option<TcpListener>,
}

impl Post {
    /// Listens if this rank is a hub.
    pub(crate) fn new(rank: usize, size: usize) -> io::Result<Self> {
        let listener = if rank < HUBS && size > 1 { Some(TcpListener::bind(("0.0.0.0", 0))?) } else { None };
        Ok(Self { rank, size, listener })
    }

    /// How the others reach this rank; `address` goes before what it finds out itself.
    pub(crate) fn card(&self, host: &str, address: Option<&str>) -> io::Result<Card> {
        let port =
            self.listener.as_ref().map(|listener| listener.local_addr().map(|at| at.port())).transpose()?;
        let mut addresses: Vec<String> = address.map(str::to_owned).into_iter().collect();
        addresses.push(host.to_owned());
        addresses.extend(outward_address());
        Ok(Card { host: host.to_owned(), pid: std::process::id(), addresses, port, token: token() })
    }

    /// Connects to the hubs and starts the thread. `end` is called once with the reason when the job
    /// must end.
    pub(crate) fn start(
        self,
        cards: &[Card],
        timeout: Duration,
        activity: Arc<Activity>,
        end: impl FnOnce(String) + Send + 'static,
    ) -> io::Result<Watchdog> {
        if let Some(listener) = &self.listener {
            listener.set_nonblocking(true)?;
        }
        let hubs = HUBS.min(self.size);
        let mut links = Vec::new();
        // Each hub speaks with every higher rank over one connection, which the higher one opens.
        for (hub, card) in cards.iter().enumerate().take(hubs.min(self.rank)) {
            let mut link = Link::new(connect(card, &cards[self.rank].host)?)?;
            link.send(&Message::Hello { token: card.token, rank: self.rank });
            links.push((Some(hub), link));
        }
        let (limits, own) = (Limits::new(timeout), self.rank);
        let processes = cards.iter().map(|card| (card.host.clone(), card.pid));
        let table = Table::new(own, processes, |rank| own < hubs || rank < hubs, limits, Instant::now());
        let rounds = Rounds {
            own,
            size: self.size,
            token: cards[own].token,
            listener: self.listener,
            links,
            table,
            limits,
            activity,
            judge_from: Instant::now(),
        };
        let stop = Arc::new(Stop::default());
        let thread = thread::Builder::new().name("watchdog".to_owned()).spawn({
            let stop = Arc::clone(&stop);
            move || rounds.walk(&stop, end)
        })?;
        Ok(Watchdog { stop, thread: Some(thread) })
    }
}

/// The running thread; dropping it takes leave of the other ranks.
#[derive(Debug)]
pub(crate) struct Watchdog {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Stop {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    fn ask(&self) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits for `duration`, less if asked to stop; tells whether it was.
    fn wait(&self, duration: Duration) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(asked, duration, |asked| !*asked);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.stop.ask();
        if let Some(thread) = self.thread.take() {
            // A watchdog that panicked has nothing to say any more.
            drop(thread.join());
        }
    }
}

/// What the thread owns.
struct Rounds {
    own: usize,
    size: usize,
    token: u64,
    listener: Option<TcpListener>,
    /// Connections with the rank at the other end, once it has said which it is.
    links: Vec<(Option<usize>, Link)>,
    table: Table,
    limits: Limits,
    activity: Arc<Activity>,
    /// Before then what this rank knows may be old, or another rank ends the job.
    judge_from: Instant,
}

impl Rounds {
    fn walk(mut self, stop: &Stop, end: impl FnOnce(String)) {
        let mut last = Instant::now();
        while !stop.wait(self.limits.interval) {
            let pause = last.elapsed().saturating_sub(self.limits.interval);
            last = Instant::now();
            if pause > self.limits.interval * 2 {
                // This process was stopped, perhaps with all others, perhaps alone so that they wait
                // for it: what it sees now is old.
                self.activity.forgive(pause);
                self.table.forgive(pause, last);
                self.judge_from = last + self.limits.interval * 4;
            }
            self.greet();
            self.listen();
            let status = Status::of(&self.activity, self.limits.interval);
            self.send_all(&Message::Status(status.clone()));
            self.table.heard(self.own, status, Instant::now());
            let now = Instant::now();
            if let Some(trouble) = self.table.trouble(now).filter(|_| now >= self.judge_from) {
                self.send_all(&Message::Ending);
                return end(trouble);
            }
        }
        self.send_all(&Message::Bye);
    }

    fn send_all(&mut self, message: &Message) {
        for (_, link) in &mut self.links {
            link.send(message);
        }
    }

    /// Takes the connections that other ranks open.
    fn greet(&mut self) {
        let Some(listener) = &self.listener else { return };
        while let Ok((stream, _)) = listener.accept() {
            if let Ok(link) = Link::new(stream) {
                self.links.push((None, link));
            }
        }
    }

    fn listen(&mut self) {
        let (now, own, size, token) = (Instant::now(), self.own, self.size, self.token);
        let table = &mut self.table;
        self.links.retain_mut(|(peer, link)| {
            for message in link.receive() {
                match (message, *peer) {
                    (Message::Hello { token: said, rank }, None)
                        if said == token && rank > own && rank < size =>
                    {
                        *peer = Some(rank);
                    }
                    (Message::Status(status), Some(rank)) => table.heard(rank, status, now),
                    (Message::Bye, Some(rank)) => table.finished(rank),
                    (Message::Ending, Some(rank)) => {
                        table.finished(rank);
                        self.judge_from = now + ENDING_GRACE;
                    }
                    // A stranger.
                    _ => return false,
                }
            }
            if let (Some(rank), true) = (*peer, link.is_closed()) {
                table.lost(rank, now);
            }
            !link.is_closed()
        });
    }
}

/// Opens a connection to the hub of `card` by the first of its addresses that answers.
fn connect(card: &Card, own_host: &str) -> io::Result<TcpStream> {
    let port = card.port.ok_or_else(|| io::Error::other("it does not listen"))?;
    let loopback = (card.host == own_host).then_some("127.0.0.1");
    let mut refusals = Vec::new();
    for address in loopback.into_iter().chain(card.addresses.iter().map(String::as_str)) {
        let places = match (address, port).to_socket_addrs() {
            Ok(places) => places,
            Err(error) => {
                refusals.push(format!("{address}: {error}"));
                continue;
            }
        };
        for place in places {
            match TcpStream::connect_timeout(&place, CONNECT_TIMEOUT) {
                Ok(stream) => return Ok(stream),
                Err(error) => refusals.push(format!("{place}: {error}")),
            }
        }
    }
    Err(io::Error::other(format!("cannot reach the watchdog on {}: {}", card.host, refusals.join(", "))))
}

/// This machine's address as others see it: the one that a packet to the world would carry. Nothing
/// is sent; the address asked about is reserved for documentation.
fn outward_address() -> Option<String> {
    let socket = UdpSocket::bind(("0.0.0.0", 0)).ok()?;
    socket.connect(("192.0.2.1", 9)).ok()?;
    Some(socket.local_addr().ok()?.ip().to_string())
}

/// A number that others on the network do not guess.
pub(crate) fn token() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(std::process::id())
}
