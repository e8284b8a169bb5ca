//! The backup's end: accepts connections, assembles checkpoints, acknowledges.

use super::admission::{Admission, Event};
use super::link::{
    CLOSE_DONE, CLOSE_PROTOCOL, CLOSE_REFUSED, CLOSE_WRONG_PEER, FAREWELL, FrameReader, LinkError,
    broken, frames_received, send_beat,
};
use super::pki::{HostRole, Identity, certificate_name};
use super::pulse;
use super::quic;
use crate::protocol::LinkId;
use crate::wire::codec::{Frame, decode_datagram, encode};
use crate::wire::message::{Heartbeat, Message, Role};
use crate::wire::pulse::End;
use crate::wire::{Assembly, Checkpoint, Limits, Progress, Receipt};
use crate::{Epoch, Generation};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Connection, Endpoint, Incoming, SendStream};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::block_in_place;

/// Bytes of a chunk, and pages of a checkpoint, that take long to decode and to fold in (above
/// 0.1 ms): then another thread takes over the runtime's part meanwhile.
const LONG_CHUNK: usize = 64 << 10;
const LONG_FOLD: usize = 128;
/// So many edits take as long as a page.
const EDITS_OF_A_PAGE: usize = 8;

/// How long a peer may take from its first datagram to its hello.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// Whom to accept, and where.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    /// Local address.
    pub bind: SocketAddr,
    /// Name of the primary's host in the topology.
    pub peer_host: String,
    /// This host's certificates.
    pub identity: Identity,
    /// Memory bounds of each connection.
    pub limits: Limits,
}

/// A bound backup. Call [`BackupEndpoint::serve`] to accept connections.
pub struct BackupEndpoint {
    endpoint: Endpoint,
    crypto: Arc<QuicServerConfig>,
    peer_name: String,
    limits: Limits,
    next: AtomicU64,
    links: Mutex<HashMap<LinkId, Connection>>,
}

impl BackupEndpoint {
    /// Binds the local address; must be called on a tokio runtime.
    pub fn bind(config: BackupConfig) -> Result<Arc<Self>, LinkError> {
        let crypto = quic::server(&config.identity)?;
        let server = quinn::ServerConfig::with_crypto(crypto.clone());
        Ok(Arc::new(Self {
            endpoint: quic::endpoint(config.bind, Some(server))?,
            crypto,
            peer_name: certificate_name(&config.peer_host, HostRole::Host),
            limits: config.limits,
            next: AtomicU64::new(1),
            links: Mutex::default(),
        }))
    }

    /// The local address, with the port that was chosen.
    pub fn local_addr(&self) -> Result<SocketAddr, LinkError> {
        self.endpoint.local_addr().map_err(|source| LinkError::Bind {
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            source,
        })
    }

    /// Accepts connections until [`BackupEndpoint::shut_down`]. The runtime must have several
    /// threads. Complete checkpoints go to
    /// `checkpoints`, whose capacity bounds how many wait unapplied before acknowledgements do.
    pub async fn serve(
        self: Arc<Self>,
        admission: Arc<dyn Admission>,
        checkpoints: mpsc::Sender<Arc<Checkpoint>>,
    ) {
        while let Some(incoming) = self.endpoint.accept().await {
            let serving = Session {
                shared: self.clone(),
                admission: admission.clone(),
                checkpoints: checkpoints.clone(),
            };
            tokio::spawn(serving.run(incoming));
        }
    }

    /// Sends a sign of life on all connections.
    pub fn heartbeat(&self, generation: Generation, epoch: Epoch, progress: u64) {
        let beat = Heartbeat { role: Role::Backup, progress };
        for connection in self.links().values() {
            send_beat(connection, generation, epoch, beat);
        }
    }

    /// How much each admitted connection has received so far, in authenticated QUIC frames: it
    /// grows while the peer's transport lives, also in the middle of a large message.
    pub fn received(&self) -> Vec<(LinkId, u64)> {
        self.links().iter().map(|(link, c)| (*link, frames_received(c))).collect()
    }

    /// Closes a connection.
    pub fn close(&self, link: LinkId, reason: &str) {
        if let Some(connection) = self.links().remove(&link) {
            connection.close(CLOSE_DONE, reason.as_bytes());
        }
    }

    /// Closes all connections and accepts no more.
    pub fn shut_down(&self, reason: &str) {
        self.endpoint.close(CLOSE_DONE, reason.as_bytes());
    }

    fn links(&self) -> std::sync::MutexGuard<'_, HashMap<LinkId, Connection>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection in the table of links, for as long as this lives.
struct Registered {
    shared: Arc<BackupEndpoint>,
    link: LinkId,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.shared.links().remove(&self.link);
    }
}

/// A connection whose primary was admitted.
struct Admitted {
    registered: Registered,
    reader: FrameReader,
    send: SendStream,
}

struct Session {
    shared: Arc<BackupEndpoint>,
    admission: Arc<dyn Admission>,
    checkpoints: mpsc::Sender<Arc<Checkpoint>>,
}

impl Session {
    async fn run(self, incoming: Incoming) {
        let peer = incoming.remote_address();
        let introduced = tokio::time::timeout(INTRODUCTION, self.introduce(incoming)).await;
        let (connection, admitted) = match introduced {
            Ok(Ok(introduced)) => introduced,
            Ok(Err(e)) => return self.admission.turned_away(peer, e),
            Err(_) => {
                let reason = format!("no hello within {INTRODUCTION:?}");
                return self.admission.turned_away(peer, LinkError::Connection { peer, reason });
            }
        };
        let link = admitted.registered.link;
        let inputs = tokio::spawn(read_inputs(connection.clone(), link, self.admission.clone()));
        let beats = tokio::spawn(read_beats(connection.clone(), link, self.admission.clone()));
        let end = match self.receive(&connection, admitted).await {
            Err(e) => {
                if connection.close_reason().is_none() {
                    connection.close(CLOSE_PROTOCOL, e.to_string().as_bytes());
                }
                e
            }
            // The primary has finished its stream; it closes once it knows that all arrived.
            Ok(()) => LinkError::connection(peer, &connection.closed().await),
        };
        inputs.abort();
        beats.abort();
        self.admission.event(link, Event::Lost(end));
    }

    /// Handshake, the peer's name, its hello and the answer.
    async fn introduce(&self, incoming: Incoming) -> Result<(Connection, Admitted), LinkError> {
        let peer = incoming.remote_address();
        let config = quic::server_for(&self.shared.crypto, peer);
        let connection = incoming
            .accept_with(config)
            .map_err(|e| LinkError::connection(peer, &e))?
            .await
            .map_err(|e| LinkError::connection(peer, &e))?;
        if let Err(e) = quic::check_name(&connection, &self.shared.peer_name) {
            connection.close(CLOSE_WRONG_PEER, e.to_string().as_bytes());
            return Err(e);
        }
        let (mut send, recv) =
            connection.accept_bi().await.map_err(|e| LinkError::connection(peer, &e))?;
        let mut reader = FrameReader::new(recv);
        let refuse_as = |e: LinkError| {
            connection.close(CLOSE_PROTOCOL, e.to_string().as_bytes());
            e
        };
        let expected = "a hello";
        let frame = reader.next(&connection).await.map_err(refuse_as)?;
        let Some(Frame { generation, message: Message::Hello(hello), .. }) = frame else {
            let got = frame.map_or("nothing".into(), |f| format!("{:?}", f.message.kind()));
            return Err(refuse_as(LinkError::Unexpected { got, expected }));
        };
        let link = LinkId(self.shared.next.fetch_add(1, Ordering::Relaxed));
        let registered = Registered { shared: self.shared.clone(), link };
        self.shared.links().insert(link, connection.clone());
        match self.admission.hello(link, generation, &hello) {
            Ok(welcome) => {
                if hello.pulse_port != 0 && welcome.pulse_port != 0 {
                    let port = hello.pulse_port;
                    self.admission.pulses(pulse::Session::of(
                        &connection,
                        link,
                        End::Called,
                        port,
                    )?);
                }
                let frame = encode(generation, Epoch::NONE, &Message::Welcome(welcome))?;
                send.write_chunk(frame).await.map_err(|e| broken(&connection, e))?;
                Ok((connection, Admitted { registered, reader, send }))
            }
            Err((refuse, newest)) => {
                let error =
                    LinkError::Refused { code: refuse.code, text: refuse.text.clone(), newest };
                let frame = encode(newest, Epoch::NONE, &Message::Refuse(refuse))?;
                if send.write_chunk(frame).await.is_ok() && send.finish().is_ok() {
                    let _ = tokio::time::timeout(FAREWELL, send.stopped()).await;
                }
                connection.close(CLOSE_REFUSED, error.to_string().as_bytes());
                Err(error)
            }
        }
    }

    /// Checkpoints, what comes ahead of them, and goodbye, until the stream ends.
    async fn receive(&self, connection: &Connection, admitted: Admitted) -> Result<(), LinkError> {
        let Admitted { registered, mut reader, mut send } = admitted;
        let link = registered.link;
        let mut assembly = Assembly::new(self.shared.limits);
        while let Some(frame) = reader.next(connection).await? {
            self.admission.event(link, Event::Heard(None));
            if let Message::Bye(bye) = frame.message {
                self.admission.event(link, Event::Bye { bye, last: frame.epoch });
                continue;
            }
            if let Message::VolumeSeed(payload) = &frame.message
                && !assembly.is_open()
            {
                block_in_place(|| self.admission.seed(link, frame.epoch, frame.at, payload))?;
                continue;
            }
            // Long work in a task keeps the runtime from looking for heartbeats and timers: an idle
            // worker does not take over the driver of a busy one.
            let progress = match &frame.message {
                Message::PageChunk(bytes) if bytes.len() >= LONG_CHUNK => {
                    block_in_place(|| assembly.push(&frame))
                }
                _ => assembly.push(&frame),
            }?;
            if let Progress::Complete(receipt, checkpoint) = progress {
                let pages =
                    checkpoint.pages.pages() + checkpoint.edits.list.len() / EDITS_OF_A_PAGE;
                if self.offer(link, receipt, checkpoint).await? {
                    let Receipt { generation, epoch, digest, .. } = receipt;
                    let ack = encode(generation, epoch, &Message::Ack { digest })?;
                    send.write_chunk(ack).await.map_err(|e| broken(connection, e))?;
                    // It leaves before the rest is done.
                    tokio::task::yield_now().await;
                }
                if pages >= LONG_FOLD {
                    block_in_place(|| assembly.fold());
                } else {
                    assembly.fold();
                }
            }
        }
        Ok(())
    }

    /// Waits for room at the applier, keeps its files, then asks whether the checkpoint is taken.
    async fn offer(
        &self,
        link: LinkId,
        receipt: Receipt,
        checkpoint: Arc<Checkpoint>,
    ) -> Result<bool, LinkError> {
        let Ok(permit) = self.checkpoints.reserve().await else { return Ok(false) };
        let has_files = !checkpoint.files.is_empty();
        if has_files {
            block_in_place(|| self.admission.keep(link, &checkpoint))?;
        }
        let mut permit = Some(permit);
        let mut deliver = || {
            if let Some(permit) = permit.take() {
                permit.send(checkpoint.clone());
            }
        };
        let taken = self.admission.complete(link, receipt, &mut deliver);
        if has_files && !taken {
            block_in_place(|| self.admission.take_back(&checkpoint));
        }
        Ok(taken)
    }
}

async fn read_inputs(connection: Connection, link: LinkId, admission: Arc<dyn Admission>) {
    let Ok(stream) = connection.accept_uni().await else { return };
    let mut reader = FrameReader::new(stream);
    loop {
        match reader.next(&connection).await {
            Ok(Some(Frame { generation, epoch, message: Message::Input(bytes), .. })) => {
                admission.event(link, Event::Input { generation, epoch, bytes });
            }
            Ok(Some(frame)) => {
                let got = format!("{:?}", frame.message.kind());
                let e = LinkError::Unexpected { got, expected: "an input record" };
                return connection.close(CLOSE_PROTOCOL, e.to_string().as_bytes());
            }
            Ok(None) => return,
            Err(e) => return connection.close(CLOSE_PROTOCOL, e.to_string().as_bytes()),
        }
    }
}

async fn read_beats(connection: Connection, link: LinkId, admission: Arc<dyn Admission>) {
    while let Ok(datagram) = connection.read_datagram().await {
        // Datagrams that are damaged or of a kind not known here are as good as lost.
        if let Ok(Frame { generation, epoch, message: Message::Heartbeat(beat), .. }) =
            decode_datagram(&datagram)
        {
            admission.event(link, Event::Heard(Some((generation, epoch, beat))));
        }
    }
}
