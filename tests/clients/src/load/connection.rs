//! One connection of the load: fills its share of the data, then sends and checks.
//!
//! Invariants: requests are judged in the order they were sent; nothing is sent again; what it
//! holds is bounded by [`MAX_WAITING`] requests and [`MAX_UNSENT`] bytes, beyond which sending
//! falls behind its schedule (and the latencies, counted from when a request was due, show it).

use super::LoadConfig;
use super::ledger::{Asked, Judgement, Ledger, Story, describe_answer};
use super::pace::Pacer;
use super::stats::{Batch, Shared};
use crate::protocol::{Answer, Dialogue, Protocol, ProtocolError};
use bytes::Buf as _;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

/// Requests that an open loop keeps in flight on one connection.
const MAX_WAITING: usize = 65_536;
/// Bytes of requests that wait for the socket to take them.
const MAX_UNSENT: usize = 1 << 20;
/// Room made before each read.
const READ_ROOM: usize = 32 << 10;
/// Bytes in one request of populate that sets many keys, and how many requests are in flight then.
const FIRST_BYTES: usize = 64 << 10;
const FIRST_WINDOW: usize = 4;
/// Requests in flight in populate where each sets one key.
const SINGLE_WINDOW: usize = 64;

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("closed by the server")]
    Closed,
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("no reply within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
}

/// A TCP connection with what is said over it.
#[derive(Debug)]
pub(super) struct Wire {
    stream: TcpStream,
    pub(super) dialogue: Dialogue,
}

impl Wire {
    pub(super) async fn connect(
        target: SocketAddr,
        protocol: Protocol,
        limit: Duration,
    ) -> io::Result<Self> {
        let stream = timeout(limit, TcpStream::connect(target)).await??;
        stream.set_nodelay(true)?;
        Ok(Self { stream, dialogue: Dialogue::new(protocol) })
    }

    /// Sends all requests that were put.
    pub(super) async fn send(&mut self, limit: Duration) -> Result<(), Broken> {
        let sent = timeout(limit, self.stream.write_all(&self.dialogue.out)).await;
        self.dialogue.out.clear();
        Ok(sent.map_err(|_| Broken::Silent(limit))??)
    }

    /// Receives one reply.
    pub(super) async fn reply(&mut self, limit: Duration) -> Result<Answer, Broken> {
        loop {
            if let Some(answer) = self.dialogue.answer()? {
                return Ok(answer);
            }
            self.dialogue.buffer_mut().reserve(READ_ROOM);
            let read = timeout(limit, self.stream.read_buf(self.dialogue.buffer_mut())).await;
            if read.map_err(|_| Broken::Silent(limit))?? == 0 {
                return Err(Broken::Closed);
            }
        }
    }

    /// Sends what the socket takes without waiting.
    fn send_some(&mut self) -> Result<(), Broken> {
        while !self.dialogue.out.is_empty() {
            match self.stream.try_write(&self.dialogue.out) {
                Ok(len) => self.dialogue.out.advance(len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Receives what is there without waiting.
    fn receive_some(&mut self) -> Result<(), Broken> {
        self.dialogue.buffer_mut().reserve(READ_ROOM);
        match self.stream.try_read_buf(self.dialogue.buffer_mut()) {
            Ok(0) => Err(Broken::Closed),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// One connection with the history of its keys.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) number: usize,
    pub(super) wire: Wire,
    pub(super) ledger: Ledger,
    pub(super) shared: Arc<Shared>,
    pub(super) config: Arc<LoadConfig>,
    pub(super) broken: bool,
}

/// The state of a connection under load.
struct Flow {
    rng: fastrand::Rng,
    pace: Option<Pacer>,
    /// Requests in flight, with when each was due.
    waiting: VecDeque<(Asked, Duration)>,
    /// When the last reply came, or waiting began.
    last: Duration,
    begun: Duration,
    batch: Batch,
}

impl Connection {
    /// Loads the first version of all its keys.
    pub(super) async fn populate(&mut self) {
        if let Err(why) = self.try_populate().await {
            self.broken = true;
            let who = format!("connection {}, in populate,", self.number);
            self.shared.broke(0, self.shared.now(), Duration::ZERO, &who, &why.to_string());
        }
    }

    async fn try_populate(&mut self) -> Result<(), Broken> {
        let limit = self.config.reply_timeout;
        for counter in 0..self.ledger.resets() {
            self.ledger.put_reset(counter, &mut self.wire.dialogue);
            self.wire.send(limit).await?;
            let answer = self.wire.reply(limit).await?;
            self.tell(&self.ledger.judge_reset(&answer));
        }
        let protocol = self.config.protocol;
        let (each, window_len) = match protocol.sets_many() {
            true => (FIRST_BYTES, FIRST_WINDOW),
            false => (1, protocol.window(SINGLE_WINDOW, self.config.pipeline)),
        };
        let mut from = 0;
        while from < self.ledger.keys() {
            let mut window = Vec::with_capacity(window_len);
            while window.len() < window_len && from < self.ledger.keys() {
                let keys = self.ledger.put_first(from, each, &mut self.wire.dialogue);
                from = keys.end;
                window.push(keys);
            }
            let bytes = self.wire.dialogue.out.len();
            self.wire.send(limit).await?;
            for keys in window {
                let reply = self.wire.reply(limit).await?;
                let judgement = self.ledger.judge_first(keys, &reply);
                self.tell(&judgement);
            }
            self.shared.populated(bytes);
        }
        Ok(())
    }

    /// Sends requests and checks replies until the load is stopped and all is answered.
    pub(super) async fn load(&mut self, pace: Option<Pacer>) {
        if self.broken {
            return;
        }
        let begun = self.shared.begun();
        let rng = fastrand::Rng::with_seed(self.config.seed ^ ((self.number as u64 + 1) << 32));
        let (waiting, batch) = (VecDeque::new(), Batch::default());
        let mut flow = Flow { rng, pace, waiting, last: begun, begun, batch };
        if let Err(why) = self.drive(&mut flow).await {
            self.broken = true;
            let now = self.shared.now();
            let gap = now.saturating_sub(flow.last);
            self.shared.broke(flow.waiting.len(), now, gap, &self.name(), &why.to_string());
        }
    }

    async fn drive(&mut self, flow: &mut Flow) -> Result<(), Broken> {
        let limit = self.config.reply_timeout;
        let mut stop = self.shared.stopped();
        let patience = sleep(limit);
        tokio::pin!(patience);
        let mut answered = false;
        loop {
            let stopping = *stop.borrow();
            if !stopping {
                self.fill(flow);
            }
            self.wire.send_some()?;
            if std::mem::take(&mut answered) {
                tokio::task::yield_now().await;
            }
            if stopping && flow.waiting.is_empty() {
                return Ok(());
            }
            let schedule = flow.pace.as_ref().filter(|_| !stopping && self.has_room(flow));
            let now = self.shared.now().saturating_sub(flow.begun);
            tokio::select! {
                ready = self.wire.stream.readable() => {
                    ready?;
                    self.wire.receive_some()?;
                    self.check(flow)?;
                    // A server that answers at once must not keep the others waiting here.
                    answered = true;
                }
                ready = self.wire.stream.writable(), if !self.wire.dialogue.out.is_empty() => ready?,
                due = wait_due(schedule, now) => due?,
                _ = stop.changed(), if !stopping => {}
                () = &mut patience => {
                    // The oldest request has waited since it was due or since the last reply.
                    let now = self.shared.now();
                    let since = flow.waiting.front().map_or(now, |(_, due)| flow.last.max(*due));
                    let waited = now.saturating_sub(since);
                    if waited >= limit {
                        return Err(Broken::Silent(limit));
                    }
                    patience.as_mut().reset(Instant::now() + (limit - waited));
                }
            }
        }
    }

    fn has_room(&self, flow: &Flow) -> bool {
        flow.waiting.len() < MAX_WAITING && self.wire.dialogue.out.len() < MAX_UNSENT
    }

    /// Makes the requests that are due (open loop) or that fit into the pipeline (closed loop).
    fn fill(&mut self, flow: &mut Flow) {
        let now = self.shared.now();
        let before = flow.waiting.len();
        while self.has_room(flow) {
            let due = match &mut flow.pace {
                Some(pace) => pace.due(now.saturating_sub(flow.begun)).map(|due| due + flow.begun),
                None => (flow.waiting.len() < self.config.pipeline).then_some(now),
            };
            let Some(due) = due else { break };
            let reads = self.config.read_ratio;
            let asked = self.ledger.ask(&mut flow.rng, reads, &mut self.wire.dialogue);
            flow.waiting.push_back((asked, due));
        }
        let made = flow.waiting.len() - before;
        if made > 0 {
            if before == 0 {
                flow.last = now;
            }
            self.shared.sent(made as u64, now);
        }
    }

    /// Judges the replies that are there.
    fn check(&mut self, flow: &mut Flow) -> Result<(), Broken> {
        let now = self.shared.now();
        let result = self.check_each(flow, now);
        if !flow.batch.latencies.is_empty() {
            self.shared.received(&flow.batch, now, now.saturating_sub(flow.last));
            flow.last = now;
            flow.batch.latencies.clear();
            (flow.batch.acknowledged, flow.batch.reads) = (0, 0);
        }
        result
    }

    fn check_each(&mut self, flow: &mut Flow, now: Duration) -> Result<(), Broken> {
        loop {
            let answer = match self.wire.dialogue.answer() {
                Ok(Some(answer)) => answer,
                Ok(None) => return Ok(()),
                Err(error) => {
                    let (command, expected) = ("any".into(), "an answer".into());
                    let story = Story { command, expected, got: error.to_string() };
                    self.shared.failed(0, true, &self.name(), &story);
                    return Err(error.into());
                }
            };
            let Some((asked, due)) = flow.waiting.pop_front() else {
                let (command, expected) = ("none".into(), "no reply".into());
                let story = Story { command, expected, got: describe_answer(&answer) };
                self.shared.failed(0, true, &self.name(), &story);
                continue;
            };
            let judgement = self.ledger.judge(asked, &answer);
            flow.batch.latencies.push(now.saturating_sub(due));
            flow.batch.acknowledged += u64::from(judgement.acknowledged);
            flow.batch.reads += u64::from(matches!(asked, Asked::Get { .. }));
            self.tell(&judgement);
        }
    }

    fn tell(&self, judgement: &Judgement) {
        if let Some(story) = &judgement.story {
            self.shared.failed(judgement.lost, judgement.wrong, &self.name(), story);
        }
    }

    fn name(&self) -> String {
        format!("connection {}", self.number)
    }
}

/// Waits until the schedule has a request due; for ever without a schedule.
async fn wait_due(schedule: Option<&Pacer>, now: Duration) -> io::Result<()> {
    match schedule {
        Some(schedule) => schedule.wait(now).await,
        None => std::future::pending().await,
    }
}
