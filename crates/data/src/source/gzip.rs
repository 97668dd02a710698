//! Gzip files of any number of members.
//!
//! flate2's own multi-member reader fails on the zero padding that tape and block tools append;
//! `gzip` itself accepts it, and so does this.

use std::io::{self, BufRead, Read};
use std::path::Path;
use std::sync::Arc;

use flate2::bufread::GzDecoder;

/// Decompressed bytes of all members, one after another.
pub(super) struct GzipMembers<R> {
    file: Arc<Path>,
    state: State<R>,
}

enum State<R> {
    Inside(Box<GzDecoder<R>>),
    Between(R),
    Finished,
}

impl<R: BufRead> GzipMembers<R> {
    /// Reads `input`, which starts with a member; `file` is its name in warnings.
    pub(super) fn new(input: R, file: Arc<Path>) -> Self {
        Self { file, state: State::Inside(Box::new(GzDecoder::new(input))) }
    }

    /// Decides from the bytes behind a member whether another one follows.
    fn after_member(&self, mut input: R) -> io::Result<State<R>> {
        match input.fill_buf()?.first() {
            None => Ok(State::Finished),
            Some(0x1f) => Ok(State::Inside(Box::new(GzDecoder::new(input)))),
            Some(_) => {
                if !only_zeros(input)? {
                    tracing::warn!(file = %self.file.display(), "bytes behind the last gzip member are ignored");
                }
                Ok(State::Finished)
            }
        }
    }
}

impl<R: BufRead> Read for GzipMembers<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            match std::mem::replace(&mut self.state, State::Finished) {
                State::Finished => return Ok(0),
                State::Between(input) => self.state = self.after_member(input)?,
                State::Inside(mut member) => match member.read(buffer) {
                    Ok(0) => self.state = State::Between(member.into_inner()),
                    result => {
                        let over = result.as_ref().is_err_and(|e| e.kind() != io::ErrorKind::Interrupted);
                        if !over {
                            self.state = State::Inside(member);
                        }
                        return result;
                    }
                },
            }
        }
    }
}

fn only_zeros(mut input: impl BufRead) -> io::Result<bool> {
    loop {
        let bytes = input.fill_buf()?;
        if bytes.is_empty() {
            return Ok(true);
        }
        if bytes.iter().any(|&byte| byte != 0) {
            return Ok(false);
        }
        let length = bytes.len();
        input.consume(length);
    }
}
