//! The primary's end of a connection.

use super::pki::{HostRole, Identity, certificate_name};
use super::pulse::Session;
use super::quic;
use crate::protocol::LinkId;
use crate::wire::codec::{Decoder, Frame, WireError, decode_datagram, encode};
use crate::wire::message::{Bye, Heartbeat, Hello, Message, RefuseCode, Role, Welcome};
use crate::wire::pulse::End;
use crate::{Epoch, Generation};
use bytes::Bytes;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, RecvStream, SendStream, VarInt};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

/// Checkpoint frames (of at most 256 KiB) that wait to be sent; then [`PrimaryLink::send`] blocks.
pub const FRAMES: usize = 32;

/// Input records that wait to be sent; then [`PrimaryLink::input`] drops.
pub const INPUTS: usize = 4096;

/// How long a goodbye or a refusal may take to arrive.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// Pause before another attempt to shake hands begins, and how many there are at most. The first one
/// to fail ends them all: it has waited for [`quic::IDLE`], or was told why.
const ANEW: Duration = Duration::from_millis(100);
const ATTEMPTS: usize = 16;

/// Bytes taken from a stream at a time.
const PIECE: usize = 256 << 10;

/// Application error codes with which a connection is closed.
pub(super) const CLOSE_DONE: VarInt = VarInt::from_u32(0);
pub(super) const CLOSE_WRONG_PEER: VarInt = VarInt::from_u32(1);
pub(super) const CLOSE_PROTOCOL: VarInt = VarInt::from_u32(2);
pub(super) const CLOSE_REFUSED: VarInt = VarInt::from_u32(3);

/// Why there is no connection, or none any longer.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The local address cannot be used.
    #[error("UDP socket on {address}: cannot be opened; is the address this host's, and free?")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
    /// The certificates do not fit together.
    #[error("TLS settings: {reason}; issue certificate and key again")]
    Tls {
        /// The library's reason.
        reason: String,
    },
    /// The peer could not be reached, or one of the two does not trust the other.
    #[error("connection with {peer}: {reason}")]
    Connection {
        /// The peer.
        peer: SocketAddr,
        /// What happened.
        reason: String,
    },
    /// The peer is trusted but is not the one that the topology names.
    #[error("the peer is not '{expected}': {reason}")]
    WrongPeer {
        /// The name in its certificate should have been this.
        expected: String,
        /// What it is instead.
        reason: String,
    },
    /// The backup does not take the container.
    #[error("the backup refuses ({code:?}): {text}")]
    Refused {
        /// Why.
        code: RefuseCode,
        /// Why, in words.
        text: String,
        /// The newest generation that it knows.
        newest: Generation,
    },
    /// What arrived is no valid message.
    #[error("message of the peer: {0}")]
    Wire(#[from] WireError),
    /// What a checkpoint says of volumes could not be written down.
    #[error("the backup cannot keep the files of epoch {epoch}: {reason}")]
    Files {
        /// The epoch.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// A valid message at the wrong time.
    #[error("the peer sent {got} where {expected} was expected")]
    Unexpected {
        /// What came.
        got: String,
        /// What should have come.
        expected: &'static str,
    },
}

impl LinkError {
    /// What the reason of a connection begins with that the other side has closed; what it said follows.
    pub const CLOSED: &str = "the peer closed it: ";

    pub(super) fn tls(e: impl ToString) -> Self {
        Self::Tls { reason: e.to_string() }
    }

    pub(super) fn connection(peer: SocketAddr, e: &ConnectionError) -> Self {
        Self::Connection { peer, reason: explain(e) }
    }
}

/// A connection error in words, with what to do where that is known.
fn explain(e: &ConnectionError) -> String {
    // TLS alerts travel as QUIC error 0x100 + alert.
    let alert = match e {
        ConnectionError::TransportError(e) => u64::from(e.code),
        ConnectionError::ConnectionClosed(c) => u64::from(c.error_code),
        _ => 0,
    };
    let who =
        if matches!(e, ConnectionError::ConnectionClosed(_)) { "the peer" } else { "this side" };
    match (alert, e) {
        (0x130, _) => format!(
            "{who} does not trust the other's certificate authority; issue both from one ({e})"
        ),
        (0x100..0x200, _) => format!("{who} ended the TLS handshake: {e}"),
        (_, ConnectionError::ApplicationClosed(c)) => {
            format!("{}{}", LinkError::CLOSED, String::from_utf8_lossy(&c.reason))
        }
        (_, ConnectionError::TimedOut) => "nothing was heard; is the peer up?".into(),
        _ => e.to_string(),
    }
}

/// What a primary learns from its connection.
#[derive(Clone, Debug)]
pub enum PrimaryEvent {
    /// An acknowledgement, unchecked: give it to the ledger.
    Ack {
        /// As in the message.
        generation: Generation,
        /// As in the message.
        epoch: Epoch,
        /// As in the message.
        digest: u64,
    },
    /// A heartbeat of the backup.
    Heartbeat {
        /// Generation that the backup knows.
        generation: Generation,
        /// Last epoch that it holds.
        epoch: Epoch,
        /// Its contents.
        beat: Heartbeat,
    },
    /// The backup leaves.
    Bye {
        /// Why.
        bye: Bye,
        /// The newest generation that it knows.
        newest: Generation,
    },
    /// The connection is over. Comes once, and last but for events already on their way.
    Lost(String),
}

/// Where and as whom to connect.
#[derive(Clone, Debug)]
pub struct PrimaryConfig {
    /// Local address; port 0 for any.
    pub bind: SocketAddr,
    /// Address of the backup.
    pub peer: SocketAddr,
    /// Name of the backup's host in the topology.
    pub peer_host: String,
    /// This host's certificates.
    pub identity: Identity,
    /// Generation of this primary.
    pub generation: Generation,
    /// What it says first.
    pub hello: Hello,
}

enum Out {
    Frame(Bytes),
    Frames(Vec<Bytes>),
    Last(Bytes, oneshot::Sender<()>),
}

/// A connection to a backup that said welcome. Dropping it closes the connection.
pub struct PrimaryLink {
    connection: Connection,
    endpoint: Endpoint,
    generation: Generation,
    frames: mpsc::Sender<Out>,
    inputs: mpsc::Sender<Bytes>,
}

/// The connection is over; the reason came as [`PrimaryEvent::Lost`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the connection to the backup is over")]
pub struct Closed;

/// What became of an input record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logged {
    /// It is on its way.
    Queued,
    /// It was dropped: the queue is full, the record too long or the connection over. Peers
    /// send again what a failover then forgets.
    Dropped,
}

impl PrimaryLink {
    /// Connects, presents the container and waits for the answer. `events` is called from the
    /// connection's tasks and must not block.
    pub async fn connect(
        config: PrimaryConfig,
        events: impl Fn(PrimaryEvent) + Send + Sync + 'static,
    ) -> Result<(Self, Welcome), LinkError> {
        let peer = config.peer;
        let endpoint = quic::endpoint(config.bind, None)?;
        let client = quic::client(&config.identity, peer)?;
        let name = certificate_name(&config.peer_host, HostRole::Host);
        let connection = shake_hands(&endpoint, &client, peer, &name).await?;
        let (mut send, recv) =
            connection.open_bi().await.map_err(|e| LinkError::connection(peer, &e))?;
        let input = connection.open_uni().await.map_err(|e| LinkError::connection(peer, &e))?;
        let _ = input.set_priority(10);
        let hello = encode(config.generation, Epoch::NONE, &Message::Hello(config.hello))?;
        let mut reader = FrameReader::new(recv);
        let welcome = async {
            send.write_chunk(hello).await.map_err(|e| broken(&connection, e))?;
            welcome(&connection, &mut reader).await
        }
        .await?;

        let (frames, frames_out) = mpsc::channel(FRAMES);
        let (inputs, inputs_out) = mpsc::channel(INPUTS);
        let events: Arc<dyn Fn(PrimaryEvent) + Send + Sync> = Arc::new(events);
        let reason = Arc::new(OnceLock::new());
        tokio::spawn(write_frames(send, frames_out));
        tokio::spawn(write_inputs(input, inputs_out));
        tokio::spawn(read_answers(connection.clone(), reader, events.clone(), reason.clone()));
        tokio::spawn(read_beats(connection.clone(), events, reason));
        let generation = config.generation;
        Ok((Self { connection, endpoint, generation, frames, inputs }, welcome))
    }

    /// Asks the other side, as one that runs nothing, who runs the container: the code of its
    /// refusal is the answer, with the newest generation that it knows. The hello in `config` must
    /// be of the role [`Role::Backup`] or [`Role::Bereft`].
    pub async fn inquire(config: PrimaryConfig) -> Result<(RefuseCode, Generation), LinkError> {
        match Self::connect(config, |_| {}).await {
            Err(LinkError::Refused { code, newest, .. }) => Ok((code, newest)),
            Err(other) => Err(other),
            Ok(_) => Err(LinkError::Unexpected {
                got: "a welcome".into(),
                expected: "an answer to a question",
            }),
        }
    }

    /// Hands over a frame of a checkpoint; blocks while [`FRAMES`] wait. Not for async code.
    pub fn send(&self, frame: Bytes) -> Result<(), Closed> {
        self.frames.blocking_send(Out::Frame(frame)).map_err(|_| Closed)
    }

    /// As [`PrimaryLink::send`], for several frames that count as one and leave together.
    pub fn send_all(&self, frames: Vec<Bytes>) -> Result<(), Closed> {
        self.frames.blocking_send(Out::Frames(frames)).map_err(|_| Closed)
    }

    /// As [`PrimaryLink::send`], for async code.
    pub async fn send_async(&self, frame: Bytes) -> Result<(), Closed> {
        self.frames.send(Out::Frame(frame)).await.map_err(|_| Closed)
    }

    /// Hands over something that came in while `epoch` was open. Never blocks.
    pub fn input(&self, epoch: Epoch, bytes: Bytes) -> Logged {
        let queued = encode(self.generation, epoch, &Message::Input(bytes))
            .is_ok_and(|frame| self.inputs.try_send(frame).is_ok());
        if queued { Logged::Queued } else { Logged::Dropped }
    }

    /// Sends a sign of life. One that cannot leave at once is dropped.
    pub fn heartbeat(&self, epoch: Epoch, progress: u64) {
        let beat = Heartbeat { role: Role::Primary, progress };
        send_beat(&self.connection, self.generation, epoch, beat);
    }

    /// Says goodbye behind everything sent so far, waits (at most one second) until it has
    /// arrived, and closes. That nobody confirmed it is an error: the backup may not know.
    pub async fn bye(self, bye: Bye, last: Epoch) -> Result<(), LinkError> {
        let result = self.say_bye(bye, last).await;
        self.close_well();
        result
    }

    /// As [`PrimaryLink::bye`], but input records can still be sent afterwards, for whoever goes on
    /// with the container; end it with [`PrimaryLink::close_well`]. Further checkpoints cannot.
    pub async fn say_bye(&self, bye: Bye, last: Epoch) -> Result<(), LinkError> {
        let frame = encode(self.generation, last, &Message::Bye(bye))?;
        let (done, arrived) = oneshot::channel();
        let heard = self.frames.send(Out::Last(frame, done)).await.is_ok()
            && matches!(tokio::time::timeout(FAREWELL, arrived).await, Ok(Ok(())));
        let unheard = || broken(&self.connection, "the goodbye was not confirmed in time");
        if heard { Ok(()) } else { Err(unheard()) }
    }

    /// Closes, and lets the peer know. Must be called on a tokio runtime.
    pub fn close_well(&self) {
        self.connection.close(CLOSE_DONE, b"goodbye");
        // The peer need not be waited for: it has what it needs, or never will.
        let endpoint = self.endpoint.clone();
        tokio::spawn(async move { tokio::time::timeout(FAREWELL, endpoint.wait_idle()).await });
    }

    /// The pulses of this connection, whose peer expects them on `port`.
    pub fn pulses(&self, link: LinkId, port: u16) -> Result<Session, LinkError> {
        Session::of(&self.connection, link, End::Caller, port)
    }

    /// Smoothed round-trip time.
    pub fn rtt(&self) -> Duration {
        self.connection.rtt()
    }

    /// How much was received so far, in authenticated QUIC frames: it grows while the backup's
    /// transport lives, also when all else that it says is held up behind a large checkpoint.
    pub fn received(&self) -> u64 {
        frames_received(&self.connection)
    }

    /// Counters of the transport: bytes, datagrams, losses, MTU.
    pub fn stats(&self) -> quinn::ConnectionStats {
        self.connection.stats()
    }

    /// Closes at once; what was not sent yet is lost.
    pub fn close(&self, reason: &str) {
        self.connection.close(CLOSE_DONE, reason.as_bytes());
    }
}

/// Shakes hands with a peer that may not be there yet: a transport that is not answered asks ever
/// more seldom, so another attempt begins beside those under way every [`ANEW`]. The first one that
/// is answered counts; the others are given up before they have said anything.
async fn shake_hands(
    endpoint: &Endpoint,
    client: &ClientConfig,
    peer: SocketAddr,
    name: &str,
) -> Result<Connection, LinkError> {
    let mut attempts = JoinSet::new();
    let mut begun = 0;
    loop {
        if begun < ATTEMPTS {
            let attempt = endpoint
                .connect_with(client.clone(), peer, name)
                .map_err(|e| LinkError::Connection { peer, reason: e.to_string() })?;
            attempts.spawn(attempt);
            begun += 1;
        }
        tokio::select! {
            Some(Ok(end)) = attempts.join_next() => {
                return end.map_err(|e| LinkError::connection(peer, &e));
            }
            () = tokio::time::sleep(ANEW) => {}
        }
    }
}

impl Drop for PrimaryLink {
    fn drop(&mut self) {
        self.connection.close(CLOSE_DONE, b"the primary let go");
    }
}

/// The reason for which a stream broke is that of its connection, if that is over.
pub(super) fn broken(connection: &Connection, e: impl ToString) -> LinkError {
    let peer = connection.remote_address();
    match connection.close_reason() {
        Some(e) => LinkError::connection(peer, &e),
        None => LinkError::Connection { peer, reason: e.to_string() },
    }
}

async fn welcome(connection: &Connection, reader: &mut FrameReader) -> Result<Welcome, LinkError> {
    let expected = "an answer to its hello";
    let frame = reader
        .next(connection)
        .await?
        .ok_or(LinkError::Unexpected { got: "the end of the stream".into(), expected })?;
    match frame.message {
        Message::Welcome(w) => Ok(w),
        Message::Refuse(r) => {
            let newest = frame.generation;
            Err(LinkError::Refused { code: r.code, text: r.text, newest })
        }
        other => Err(LinkError::Unexpected { got: format!("{:?}", other.kind()), expected }),
    }
}

/// Authenticated QUIC frames of the kinds that only a peer which works sends.
pub(super) fn frames_received(connection: &Connection) -> u64 {
    let f = connection.stats().frame_rx;
    f.acks + f.stream + f.datagram + f.ping
}

pub(super) fn send_beat(
    connection: &Connection,
    generation: Generation,
    epoch: Epoch,
    beat: Heartbeat,
) {
    if let Ok(frame) = encode(generation, epoch, &Message::Heartbeat(beat)) {
        let _ = connection.send_datagram(frame);
    }
}

/// A receive stream cut into frames.
pub(super) struct FrameReader {
    stream: RecvStream,
    decoder: Decoder,
}

impl FrameReader {
    pub(super) fn new(stream: RecvStream) -> Self {
        Self { stream, decoder: Decoder::default() }
    }

    /// The next frame; `None` at the end of the stream.
    pub(super) async fn next(
        &mut self,
        connection: &Connection,
    ) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next()? {
                return Ok(Some(frame));
            }
            match self.stream.read_chunk(PIECE, true).await {
                Ok(Some(chunk)) => self.decoder.feed(&chunk.bytes),
                Ok(None) => {
                    self.decoder.finish()?;
                    return Ok(None);
                }
                Err(e) => return Err(broken(connection, e)),
            }
        }
    }
}

async fn write_frames(mut stream: SendStream, mut frames: mpsc::Receiver<Out>) {
    while let Some(out) = frames.recv().await {
        let (mut frames, last) = match out {
            Out::Frame(frame) => (vec![frame], None),
            Out::Frames(frames) => (frames, None),
            Out::Last(frame, done) => (vec![frame], Some(done)),
        };
        if stream.write_all_chunks(&mut frames).await.is_err() {
            return;
        }
        if let Some(done) = last {
            // Without a code: the peer has all of it.
            if stream.finish().is_ok() && matches!(stream.stopped().await, Ok(None)) {
                let _ = done.send(());
            }
            return;
        }
    }
    let _ = stream.finish();
}

async fn write_inputs(mut stream: SendStream, mut inputs: mpsc::Receiver<Bytes>) {
    let mut frames = Vec::new();
    while inputs.recv_many(&mut frames, INPUTS).await > 0 {
        if stream.write_all_chunks(&mut frames).await.is_err() {
            return;
        }
        frames.clear();
    }
    let _ = stream.finish();
}

type Events = Arc<dyn Fn(PrimaryEvent) + Send + Sync>;

/// Closes the connection over what the peer did, and notes the reason for the last event.
fn give_up(connection: &Connection, reason: &OnceLock<String>, e: &LinkError) {
    let text = e.to_string();
    connection.close(CLOSE_PROTOCOL, text.as_bytes());
    let _ = reason.set(text);
}

async fn read_answers(
    connection: Connection,
    mut reader: FrameReader,
    events: Events,
    reason: Arc<OnceLock<String>>,
) {
    loop {
        let frame = match reader.next(&connection).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return,
            Err(e) => return give_up(&connection, &reason, &e),
        };
        let Frame { generation, epoch, message, .. } = frame;
        match message {
            Message::Ack { digest } => events(PrimaryEvent::Ack { generation, epoch, digest }),
            Message::Bye(bye) => events(PrimaryEvent::Bye { bye, newest: generation }),
            other => {
                let got = format!("{:?}", other.kind());
                let e = LinkError::Unexpected { got, expected: "an acknowledgement" };
                return give_up(&connection, &reason, &e);
            }
        }
    }
}

async fn read_beats(connection: Connection, events: Events, reason: Arc<OnceLock<String>>) {
    let end = loop {
        let datagram = match connection.read_datagram().await {
            Ok(d) => d,
            Err(e) => break e,
        };
        // Datagrams that are damaged or of a kind not known here are as good as lost.
        if let Ok(Frame { generation, epoch, message: Message::Heartbeat(beat), .. }) =
            decode_datagram(&datagram)
        {
            events(PrimaryEvent::Heartbeat { generation, epoch, beat });
        }
    };
    let why = reason.get().cloned().unwrap_or_else(|| explain(&end));
    events(PrimaryEvent::Lost(why));
}
