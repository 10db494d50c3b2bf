//! The streams of CRI's Exec and Attach: the subprotocol `v4.channel.k8s.io` over a websocket (RFC 6455), as much of it as is needed.
//!
//! kubelet speaks SPDY to the same server; what reaches the shim is the same. Half-closing stdin is what this subprotocol cannot do.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    time::Duration,
};

/// Stdin of the process.
pub(crate) const STDIN: u8 = 0;
/// Stdout, or the terminal.
pub(crate) const STDOUT: u8 = 1;
/// Stderr.
pub(crate) const STDERR: u8 = 2;
/// A `metav1.Status` at the end.
pub(crate) const STATUS: u8 = 3;
/// `{"Width":…,"Height":…}`.
pub(crate) const RESIZE: u8 = 4;

/// An open stream. Blocking, with a bound of thirty seconds for each read.
pub(crate) struct Stream(TcpStream);

impl Stream {
    /// Opens the URL that Exec or Attach answered.
    pub(crate) fn open(url: &str) -> io::Result<Self> {
        let rest = url
            .strip_prefix("http://")
            .ok_or_else(|| io::Error::other(format!("not http: {url}")))?;
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut tcp = TcpStream::connect(host)?;
        tcp.set_read_timeout(Some(Duration::from_secs(30)))?;
        write!(
            tcp,
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\nOrigin: http://{host}\r\n\r\n"
        )?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            tcp.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        if !head.starts_with(b"HTTP/1.1 101") {
            return Err(io::Error::other(format!(
                "no websocket: {}",
                String::from_utf8_lossy(&head)
            )));
        }
        Ok(Self(tcp))
    }

    /// Sends `bytes` on a channel.
    pub(crate) fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        let length = bytes.len() + 1;
        let mut frame = vec![0x82];
        match length {
            0..=125 => frame.push(0x80 | length as u8),
            126..=65535 => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
            _ => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        // A mask of zeros changes nothing, and is a mask.
        frame.extend([0, 0, 0, 0, channel]);
        frame.extend(bytes);
        self.0.write_all(&frame)
    }

    /// The next bytes and their channel; `None` at the end.
    pub(crate) fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        loop {
            let mut head = [0; 2];
            if let Err(e) = self.0.read_exact(&mut head) {
                return if e.kind() == io::ErrorKind::UnexpectedEof {
                    Ok(None)
                } else {
                    Err(e)
                };
            }
            let length = match head[1] & 0x7f {
                126 => {
                    let mut bytes = [0; 2];
                    self.0.read_exact(&mut bytes)?;
                    u16::from_be_bytes(bytes) as usize
                }
                127 => {
                    let mut bytes = [0; 8];
                    self.0.read_exact(&mut bytes)?;
                    usize::try_from(u64::from_be_bytes(bytes)).map_err(io::Error::other)?
                }
                length => length as usize,
            };
            let mut payload = vec![0; length];
            self.0.read_exact(&mut payload)?;
            match head[0] & 0x0f {
                8 => return Ok(None),
                1 | 2 if payload.len() > 1 => return Ok(Some((payload[0], payload.split_off(1)))),
                // Empty frames open the channels; pings need no answer here.
                _ => {}
            }
        }
    }

    /// Reads until `text` came on `channel`; gives everything that came on it.
    pub(crate) fn until(&mut self, channel: u8, text: &str) -> io::Result<String> {
        let mut seen = String::new();
        while !seen.contains(text) {
            match self.receive()? {
                Some((from, bytes)) if from == channel => seen.push_str(&String::from_utf8_lossy(&bytes)),
                Some(_) => {}
                None => return Err(io::Error::other(format!("ended without {text:?}: {seen:?}"))),
            }
        }
        Ok(seen)
    }
}
