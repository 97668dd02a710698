//! How ranks that know only where rank 0 is find each other.
//!
//! Every rank listens on a port of its own and tells rank 0, which tells all where everybody is.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::launcher::Meeting;
use crate::tcp::connections::{Connections, Node, accept};
use crate::watchdog::token;

/// How long ranks wait for each other at the start: machines of a cluster do not start together.
const PATIENCE: Duration = Duration::from_secs(300);

/// Bytes of a message at most; more comes from no rank.
const LONGEST: u64 = 1 << 20;

/// Between two calls at a door that does not open yet.
const PAUSE: Duration = Duration::from_millis(100);

/// What a rank tells rank 0.
#[derive(Debug, Serialize, Deserialize)]
struct Arrival {
    rank: usize,
    size: usize,
    /// Where it listens.
    port: u16,
}

/// What rank 0 answers.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// Where everybody is, and what to say there.
    Welcome { addresses: Vec<SocketAddr>, token: u64 },
    /// Why the ranks are not of one job.
    Refused(String),
}

/// Connects all ranks of the job.
pub(crate) fn meet(meeting: &Meeting) -> io::Result<Connections> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    let (addresses, token) = if meeting.rank == 0 { host(meeting, port)? } else { arrive(meeting, port)? };
    let early = Mutex::new(Vec::new());
    let node = Arc::new(Node { rank: meeting.rank, addresses, listener, token, early });
    Connections::open(node, (0..meeting.size).collect(), 1)
}

/// Rank 0 waits for all others and tells them where everybody is.
fn host(meeting: &Meeting, port: u16) -> io::Result<(Vec<SocketAddr>, u64)> {
    let door = TcpListener::bind((Ipv4Addr::UNSPECIFIED, meeting.port)).map_err(|error| {
        io::Error::new(error.kind(), format!("rank 0 cannot listen on port {}: {error}", meeting.port))
    })?;
    let deadline = Instant::now() + PATIENCE;
    let mut guests: Vec<Option<(TcpStream, SocketAddr)>> = (0..meeting.size).map(|_| None).collect();
    while let Some(missing) = guests.iter().skip(1).position(Option::is_none) {
        let mut stream = accept(&door, deadline)
            .map_err(|error| io::Error::new(error.kind(), format!("rank {}: {error}", missing + 1)))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let from = stream.peer_addr()?.ip();
        // Strangers call too; they are hung up on.
        let Ok(arrival) = hear::<Arrival>(&stream) else { continue };
        let known = arrival.rank == 0 || arrival.rank >= meeting.size || guests[arrival.rank].is_some();
        if arrival.size != meeting.size || known {
            let reason = format!(
                "rank {} of {} called a job of {} ranks, where that place is taken or does not exist",
                arrival.rank, arrival.size, meeting.size
            );
            tell(&mut stream, &Answer::Refused(reason.clone()))?;
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        guests[arrival.rank] = Some((stream, SocketAddr::new(from, arrival.port)));
    }
    let token = token();
    let own = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    let others = guests.iter().flatten().map(|(_, address)| *address);
    let addresses: Vec<SocketAddr> = std::iter::once(own).chain(others).collect();
    for (stream, _) in guests.iter_mut().flatten() {
        // What is on this machine is reached by the way that the guest has come.
        let here = stream.local_addr()?.ip();
        let seen = |address: &SocketAddr| {
            if address.ip().is_loopback() { SocketAddr::new(here, address.port()) } else { *address }
        };
        let addresses = addresses.iter().map(seen).collect();
        tell(stream, &Answer::Welcome { addresses, token })?;
    }
    Ok((addresses, token))
}

/// Any other rank calls rank 0 until it answers.
fn arrive(meeting: &Meeting, port: u16) -> io::Result<(Vec<SocketAddr>, u64)> {
    let deadline = Instant::now() + PATIENCE;
    let mut stream = loop {
        match call(meeting) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() > deadline => {
                let told = format!("cannot reach rank 0 at {}:{}: {error}", meeting.address, meeting.port);
                return Err(io::Error::new(error.kind(), told));
            }
            Err(_) => thread::sleep(PAUSE),
        }
    };
    tell(&mut stream, &Arrival { rank: meeting.rank, size: meeting.size, port })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    match hear(&stream)? {
        Answer::Welcome { addresses, token } if addresses.len() == meeting.size => Ok((addresses, token)),
        Answer::Welcome { addresses, .. } => {
            Err(io::Error::other(format!("rank 0 tells of {} ranks, not {}", addresses.len(), meeting.size)))
        }
        Answer::Refused(reason) => Err(io::Error::new(io::ErrorKind::InvalidInput, reason)),
    }
}

/// A connection with rank 0's machine, by the first of its addresses that answers.
fn call(meeting: &Meeting) -> io::Result<TcpStream> {
    let mut last = io::Error::other("the name has no address");
    for address in (meeting.address.as_str(), meeting.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, Duration::from_secs(5)) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn tell(stream: &mut TcpStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn hear<T: DeserializeOwned>(stream: &TcpStream) -> io::Result<T> {
    let mut line = String::new();
    if BufReader::new(stream.take(LONGEST)).read_line(&mut line)? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other side has hung up"));
    }
    Ok(serde_json::from_str(&line)?)
}
