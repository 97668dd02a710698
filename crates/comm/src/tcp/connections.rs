//! A connection between every two ranks of a group, and exchanges over them.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::buffer::Element;
use crate::transport::{Fault, Parts, Transport};

/// Bytes to a rank up to which the system takes them without waiting for the other side.
const SMALL: usize = 8 << 10;

/// How long the ranks of a new group may take to connect.
const PATIENCE: Duration = Duration::from_secs(60);

/// One rank's connections with the others of a group.
#[derive(Debug)]
pub(crate) struct Connections {
    node: Arc<Node>,
    /// The group's ranks by their numbers in the job.
    members: Vec<usize>,
    /// This rank's place among them.
    rank: usize,
    /// By place; `None` for this rank itself.
    streams: Vec<Option<TcpStream>>,
}

/// What all groups of a process share.
#[derive(Debug)]
pub(crate) struct Node {
    /// This rank in the job.
    pub(crate) rank: usize,
    /// Where the ranks listen, by rank.
    pub(crate) addresses: Vec<SocketAddr>,
    pub(crate) listener: TcpListener,
    /// What callers must know: strangers on the network do not.
    pub(crate) token: u64,
    /// Callers of groups that this rank has not come to yet.
    pub(crate) early: Mutex<Vec<(Hello, TcpStream)>>,
}

/// The first words on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hello {
    pub(crate) token: u64,
    /// The group that the connection is for.
    pub(crate) group: u64,
    /// The caller's rank in the job.
    pub(crate) rank: u64,
}

impl Hello {
    fn send(self, stream: &mut TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.write_all(bytemuck::bytes_of(&[self.token, self.group, self.rank].map(u64::to_le)))
    }

    fn receive(stream: &mut TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let mut words = [0_u64; 3];
        stream.read_exact(bytemuck::bytes_of_mut(&mut words))?;
        let [token, group, rank] = words.map(u64::from_le);
        Ok(Self { token, group, rank })
    }
}

impl Connections {
    /// Connects the ranks `members` of the job for group `group`: a rank calls the lower ones and is
    /// called by the higher ones.
    pub(crate) fn open(node: Arc<Node>, members: Vec<usize>, group: u64) -> io::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        let rank = members.iter().position(|&member| member == node.rank).ok_or_else(|| {
            io::Error::other(format!("rank {} is not one of the group that it opens", node.rank))
        })?;
        let mut streams: Vec<Option<TcpStream>> = members.iter().map(|_| None).collect();
        let hello = Hello { token: node.token, group, rank: node.rank as u64 };
        for (stream, &member) in streams.iter_mut().zip(&members).take(rank) {
            let mut called = TcpStream::connect_timeout(&node.addresses[member], PATIENCE)?;
            hello.send(&mut called)?;
            *stream = Some(called);
        }
        for (at, &member) in members.iter().enumerate().skip(rank + 1) {
            streams[at] = Some(node.await_call(group, member, deadline)?);
        }
        Ok(Self { node, members, rank, streams })
    }

    /// Ranks in the order in which this one turns to them, so that no two wait for a third.
    fn peers(&self, forwards: bool) -> impl Iterator<Item = usize> + '_ {
        let size = self.members.len();
        (1..size).map(move |step| (self.rank + if forwards { step } else { size - step }) % size)
    }

    /// The connection with another rank.
    fn with(&self, peer: usize) -> &TcpStream {
        self.streams[peer].as_ref().expect("every rank but this one has a connection")
    }

    fn lost(&self, peer: usize, error: &io::Error) -> Fault {
        format!("rank {} is lost: {error}", self.members[peer])
    }

    fn send(&self, peer: usize, bytes: &[u8]) -> Result<(), Fault> {
        self.with(peer).write_all(bytes).map_err(|error| self.lost(peer, &error))
    }

    fn receive(&self, peer: usize, bytes: &mut [u8]) -> Result<(), Fault> {
        self.with(peer).read_exact(bytes).map_err(|error| {
            if error.kind() == io::ErrorKind::UnexpectedEof {
                return format!("rank {} has ended", self.members[peer]);
            }
            self.lost(peer, &error)
        })
    }

    /// Sends every rank what `sent` says and receives its part of `to`, both at the same time.
    fn exchange<'a, T: Element>(
        &self,
        sent: impl Fn(usize) -> &'a [T] + Sync,
        to: &mut [T],
        receives: &Parts,
    ) -> Result<(), Fault> {
        receives.check(self.size(), to.len());
        let parts: Vec<_> = receives.iter().map(|(place, count)| place..place + count).collect();
        to[parts[self.rank].clone()].copy_from_slice(sent(self.rank));
        let bytes = |peer| bytemuck::cast_slice(sent(peer));
        let send_all = || self.peers(true).try_for_each(|peer| self.send(peer, bytes(peer)));
        let mut receive_all = || {
            let mut receive =
                |peer: usize| self.receive(peer, bytemuck::cast_slice_mut(&mut to[parts[peer].clone()]));
            self.peers(false).try_for_each(&mut receive)
        };
        if self.peers(true).all(|peer| bytes(peer).len() <= SMALL) {
            send_all()?;
            return receive_all();
        }
        thread::scope(|scope| {
            let sending = scope.spawn(send_all);
            let received = receive_all();
            let sent = sending.join().unwrap_or_else(|_| Err("the sending thread panicked".to_owned()));
            received.and(sent)
        })
    }
}

impl Node {
    /// The call of rank `member` for `group`; other calls are kept until this rank comes to their groups.
    fn await_call(&self, group: u64, member: usize, deadline: Instant) -> io::Result<TcpStream> {
        let awaited = Hello { token: self.token, group, rank: member as u64 };
        let mut early = self.early.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(at) = early.iter().position(|(hello, _)| *hello == awaited) {
                return Ok(early.swap_remove(at).1);
            }
            let mut stream = accept(&self.listener, deadline)?;
            // A stranger may say nothing, or what makes no sense; it is hung up on.
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            if let Ok(hello) = Hello::receive(&mut stream)
                && hello.token == self.token
            {
                stream.set_read_timeout(None)?;
                early.push((hello, stream));
            }
        }
    }
}

/// The next caller, if one comes before `deadline`.
pub(crate) fn accept(listener: &TcpListener, deadline: Instant) -> io::Result<TcpStream> {
    listener.set_nonblocking(true)?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if Instant::now() > deadline {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the other ranks did not call"));
                }
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

impl Transport for Connections {
    const LIMIT: usize = usize::MAX;

    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.members.len()
    }

    fn broadcast<T: Element>(&self, buffer: &mut [T], root: usize) -> Result<(), Fault> {
        if self.rank != root {
            return self.receive(root, bytemuck::cast_slice_mut(buffer));
        }
        let bytes = bytemuck::cast_slice(buffer);
        self.peers(true).try_for_each(|peer| self.send(peer, bytes))
    }

    fn all_gather<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        let parts = Parts::equal(to.len(), self.size());
        self.all_gather_v(from, to, &parts)
    }

    fn all_gather_v<T: Element>(&self, from: &[T], to: &mut [T], parts: &Parts) -> Result<(), Fault> {
        self.exchange(|_| from, to, parts)
    }

    fn all_to_all<T: Element>(&self, from: &[T], to: &mut [T]) -> Result<(), Fault> {
        let parts = Parts::equal(from.len(), self.size());
        self.all_to_all_v((from, &parts), (to, &parts))
    }

    fn all_to_all_v<T: Element>(
        &self,
        (from, sends): (&[T], &Parts),
        (to, receives): (&mut [T], &Parts),
    ) -> Result<(), Fault> {
        sends.check(self.size(), from.len());
        let parts: Vec<_> = sends.iter().map(|(place, count)| &from[place..place + count]).collect();
        self.exchange(|peer| parts[peer], to, receives)
    }

    fn split(&self, colors: &[usize], id: u64) -> Result<Self, Fault> {
        let own = colors[self.rank];
        let members = self.members.iter().zip(colors).filter(|&(_, &color)| color == own);
        let members = members.map(|(&member, _)| member).collect();
        Self::open(Arc::clone(&self.node), members, id).map_err(|error| format!("no new group: {error}"))
    }
}
