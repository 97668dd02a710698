//! A connection between the watchdogs of two ranks that never makes either wait.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;

use crate::watchdog::message::Message;

/// Bytes of a message at most; more comes from no rank.
const LONGEST: usize = 1 << 20;

/// Messages as lines over TCP.
#[derive(Debug)]
pub(crate) struct Link {
    stream: TcpStream,
    unsent: Vec<u8>,
    unread: Vec<u8>,
    /// The connection is gone, or the other side speaks nonsense.
    closed: bool,
}

impl Link {
    pub(crate) fn new(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, unsent: Vec::new(), unread: Vec::new(), closed: false })
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Sends a message, or as much of it as the connection takes now. While the peer reads nothing,
    /// newer messages are left out.
    pub(crate) fn send(&mut self, message: &Message) {
        if self.unsent.is_empty() {
            serde_json::to_writer(&mut self.unsent, message).expect("messages have a JSON form");
            self.unsent.push(b'\n');
        }
        while !self.unsent.is_empty() && !self.closed {
            match self.stream.write(&self.unsent) {
                Ok(0) => self.closed = true,
                Ok(sent) => drop(self.unsent.drain(..sent)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.closed = true,
            }
        }
    }

    /// The messages that have come.
    pub(crate) fn receive(&mut self) -> Vec<Message> {
        let mut block = [0; 4096];
        while !self.closed {
            match self.stream.read(&mut block) {
                Ok(0) => self.closed = true,
                Ok(read) => self.unread.extend_from_slice(&block[..read]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.closed = true,
            }
            if self.unread.len() > LONGEST {
                self.closed = true;
            }
        }
        let Some(end) = self.unread.iter().rposition(|&byte| byte == b'\n') else { return Vec::new() };
        let lines: Vec<u8> = self.unread.drain(..=end).collect();
        let mut messages = Vec::new();
        for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(message) => messages.push(message),
                Err(_) => {
                    self.closed = true;
                    break;
                }
            }
        }
        messages
    }
}
