//! Which clients wait for output, and how many could.
//!
//! A client whose answer is held says nothing more until it has it; one whose last answer has left
//! may ask again at any moment. While some of those that were answered lately do not wait, more
//! output for the open epoch is likely; once all wait, there is nothing to wait for. Only TCP is
//! counted, and at most [`MAX`] clients (RB-1): those beyond are as if they never asked.
//!
//! And to whom the container has said something in an epoch: those of them whose connection no
//! descriptor names have been closed with perhaps more to say than has left.

use crate::frames::wire;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Clients that are remembered.
const MAX: usize = 4096;
/// For how long a client that is not answered is expected to ask again.
const LATELY: Duration = Duration::from_millis(50);
/// Pause between two looks for those that are not.
const SWEEP: Duration = Duration::from_millis(10);

/// Clients for whom output is held in the open epoch, of those that were answered lately.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// Output for them is held.
    pub now: usize,
    /// Output for them is or was held lately.
    pub lately: usize,
}

impl Waiting {
    /// Whether nobody is left who might ask.
    pub fn all(&self) -> bool {
        self.now >= self.lately
    }
}

#[derive(Debug, Default)]
pub(super) struct Flows {
    /// The epoch, counted from the first, in which a client waited last.
    clients: HashMap<SocketAddr, u64>,
    /// The open epoch.
    open: u64,
    now: usize,
    /// When those who are not expected any more were looked for last.
    swept: Option<Instant>,
    /// Which epoch was open when, oldest first: at most one for each look that is not long ago.
    marks: Vec<(Instant, u64)>,
    /// The connections on which the container has said something, or its last, in the open epoch.
    speaking: Vec<Ends>,
    /// The same of the epoch that was sealed last.
    spoken: Vec<Ends>,
}

/// The container's side of a connection and the client's.
pub type Ends = (SocketAddr, SocketAddr);

impl Flows {
    /// A frame of the container is held in the open epoch.
    pub(super) fn held(&mut self, frame: &[u8]) {
        let Some(view) = wire::view_tcp(frame) else { return };
        let ends = (view.from, view.to);
        if view.tcp.fin() || view.tcp.rst() {
            if view.tcp.fin() && self.speaking.len() < MAX {
                self.speaking.push(ends);
            }
            let last = self.clients.remove(&view.to);
            self.now -= usize::from(last == Some(self.open));
            return;
        }
        if view.tcp.payload().is_empty() {
            return;
        }
        let full = self.clients.len() >= MAX;
        match self.clients.get_mut(&view.to) {
            Some(last) if *last == self.open => return,
            Some(last) => *last = self.open,
            None if full => return,
            None => {
                self.clients.insert(view.to, self.open);
            }
        }
        self.now += 1;
        if self.speaking.len() < MAX {
            self.speaking.push(ends);
        }
    }

    /// The open epoch was sealed.
    pub(super) fn sealed(&mut self) {
        self.open += 1;
        self.now = 0;
        self.spoken.clear();
        std::mem::swap(&mut self.speaking, &mut self.spoken);
    }

    /// On which connections the container has said something in the epoch that was sealed last; a
    /// connection may be there twice.
    pub(super) fn spoken(&self) -> &[Ends] {
        &self.spoken
    }

    /// Who waits.
    pub(super) fn waiting(&mut self, now: Instant) -> Waiting {
        if self.swept.is_none_or(|at| now - at >= SWEEP) {
            self.swept = Some(now);
            self.marks.push((now, self.open));
            // The newest mark that is old enough: who waited before it is no more expected.
            let old = self.marks.iter().rposition(|(at, _)| now - *at >= LATELY);
            if let Some(old) = old {
                let oldest = self.marks[old].1;
                self.clients.retain(|_, last| *last >= oldest);
                self.marks.drain(..old);
            }
        }
        Waiting { now: self.now, lately: self.clients.len() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frames::Mac;
    use smoltcp::wire::{TcpControl, TcpRepr, TcpSeqNumber};

    fn answer(port: u16, payload: &[u8]) -> Vec<u8> {
        segment(port, payload, TcpControl::None)
    }

    fn segment(port: u16, payload: &[u8], control: TcpControl) -> Vec<u8> {
        let repr = TcpRepr {
            src_port: 6379,
            dst_port: port,
            control,
            seq_number: TcpSeqNumber(1),
            ack_number: Some(TcpSeqNumber(1)),
            window_len: 1000,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload,
        };
        let mac = Mac::from_bytes(&[2, 0, 0, 0, 0, 1]);
        let (us, client) = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        wire::tcp((mac, mac), us, client, &repr).expect("one family")
    }

    #[test]
    fn those_who_were_answered_lately_may_ask_again() {
        let (mut flows, start) = (Flows::default(), Instant::now());
        assert!(flows.waiting(start).all(), "nobody is there");
        for port in 1..=3 {
            flows.held(&answer(port, b"+OK\r\n"));
            flows.held(&answer(port, b"+OK\r\n"));
        }
        flows.held(&answer(4, b""));
        assert_eq!(flows.waiting(start), Waiting { now: 3, lately: 3 });
        flows.sealed();
        flows.held(&answer(2, b"+OK\r\n"));
        let waiting = flows.waiting(start + Duration::from_millis(20));
        assert_eq!(waiting, Waiting { now: 1, lately: 3 });
        assert!(!waiting.all());
        let mut now = start;
        for _ in 0..20 {
            now += Duration::from_millis(10);
            flows.sealed();
            flows.held(&answer(2, b"+OK\r\n"));
            flows.waiting(now);
        }
        assert_eq!(flows.waiting(now), Waiting { now: 1, lately: 1 }, "the others have gone");
        assert!(flows.marks.len() < 10, "few are kept");
    }

    #[test]
    fn who_has_been_told_goodbye_is_not_waited_for() {
        let (mut flows, now) = (Flows::default(), Instant::now());
        flows.held(&answer(1, b"x"));
        flows.held(&answer(2, b"x"));
        flows.held(&segment(2, b"x", TcpControl::Fin));
        assert_eq!(flows.waiting(now), Waiting { now: 1, lately: 1 });
        flows.sealed();
        flows.held(&segment(1, b"", TcpControl::Rst));
        flows.held(&segment(1, b"", TcpControl::Rst));
        assert_eq!(flows.waiting(now), Waiting::default());
    }

    #[test]
    fn no_more_clients_are_remembered_than_the_bound() {
        let mut flows = Flows::default();
        for port in 1..=5000 {
            flows.held(&answer(port, b"x"));
        }
        assert_eq!(flows.waiting(Instant::now()), Waiting { now: MAX, lately: MAX });
    }

    #[test]
    fn to_whom_the_container_has_spoken_is_known_by_the_epoch() {
        let mut flows = Flows::default();
        let ports = |flows: &Flows| -> Vec<u16> {
            flows.spoken().iter().map(|(_, client)| client.port()).collect()
        };
        for port in [1, 2, 1] {
            flows.held(&answer(port, b"x"));
        }
        flows.held(&answer(3, b""));
        assert!(ports(&flows).is_empty(), "nothing is sealed");
        flows.sealed();
        assert_eq!(ports(&flows), [1, 2]);
        flows.held(&segment(4, b"", TcpControl::Fin));
        flows.held(&segment(5, b"", TcpControl::Rst));
        flows.held(&answer(2, b"x"));
        assert_eq!(ports(&flows), [1, 2], "the next epoch is open");
        flows.sealed();
        assert_eq!(ports(&flows), [4, 2]);
        flows.sealed();
        assert!(ports(&flows).is_empty());
    }
}
