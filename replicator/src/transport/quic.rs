//! Settings of QUIC and TLS, and the endpoints made from them.
//!
//! What counts on a fast, near link is the size of datagrams: with segmentation offload ten of
//! them leave in one call, and they must fit 64 KiB together, so [`LARGEST`] is the most that
//! pays. The size starts at what the route to the peer allows and probes find out the rest.
//! AES-128-GCM comes first, because hardware does it.

use super::link::LinkError;
use super::pki::Identity;
use nix::sys::socket::{setsockopt, sockopt};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    ServerConfig, TransportConfig, VarInt,
};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

/// Application protocol of the connection.
pub const ALPN: &[u8] = b"nilicon/1";

/// Largest datagram, in bytes of UDP payload.
pub const LARGEST: u16 = 6500;

/// A connection on which nothing is heard for this long is given up. The failure detector is
/// much faster; this only clears away what it left.
pub const IDLE: Duration = Duration::from_secs(2);

/// Bytes in flight on a stream, and on a connection.
const STREAM_WINDOW: u32 = 64 << 20;
const WINDOW: u32 = 128 << 20;

/// Socket buffers: what may arrive while our tasks wait for a core.
const SOCKET_BUFFER: usize = 8 << 20;

/// Datagrams that wait to be sent or read; heartbeats that wait for long are worth nothing.
const DATAGRAMS: usize = 16 << 10;

/// Packets that a peer may receive before it confirms them without having anything else to say. An epoch is a packet
/// or two, and its acknowledgement carries the confirmation.
const UNCONFIRMED: u32 = 10;

/// UDP payload that the route to a peer carries, as far as it is known now.
pub fn route_payload(peer: SocketAddr) -> u16 {
    let fallback = 1200;
    let any = if peer.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let Ok(socket) = UdpSocket::bind(any) else { return fallback };
    if socket.connect(peer).is_err() {
        return fallback;
    }
    match nix::sys::socket::getsockopt(&socket, sockopt::IpMtu) {
        Ok(mtu) if peer.is_ipv4() => (mtu - 28).clamp(1200, LARGEST.into()) as u16,
        _ => fallback,
    }
}

fn transport(peer: SocketAddr) -> TransportConfig {
    let payload = route_payload(peer);
    let mut discovery = MtuDiscoveryConfig::default();
    // Over IPv6 the route's size is not asked for, so probes go up to the largest.
    discovery.upper_bound(if peer.is_ipv4() { payload } else { LARGEST });
    let mut confirmations = AckFrequencyConfig::default();
    confirmations.ack_eliciting_threshold(VarInt::from_u32(UNCONFIRMED));
    let mut t = TransportConfig::default();
    t.initial_mtu(payload)
        .mtu_discovery_config(Some(discovery))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE.as_millis() as u32))))
        .ack_frequency_config(Some(confirmations))
        .keep_alive_interval(None)
        .initial_rtt(Duration::from_millis(20))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(WINDOW.into())
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .datagram_receive_buffer_size(Some(DATAGRAMS))
        .datagram_send_buffer_size(DATAGRAMS);
    t
}

fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

fn roots(identity: &Identity) -> Result<Arc<RootCertStore>, LinkError> {
    let mut roots = RootCertStore::empty();
    roots.add(identity.authority.clone()).map_err(LinkError::tls)?;
    Ok(Arc::new(roots))
}

/// Settings of a primary that connects to `peer`.
pub(super) fn client(identity: &Identity, peer: SocketAddr) -> Result<ClientConfig, LinkError> {
    let mut tls = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(LinkError::tls)?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(vec![identity.certificate.clone()], identity.key.clone_key())
        .map_err(LinkError::tls)?;
    tls.alpn_protocols = vec![ALPN.into()];
    tls.resumption = Resumption::disabled();
    let crypto = QuicClientConfig::try_from(tls).map_err(LinkError::tls)?;
    let mut config = ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport(peer)));
    Ok(config)
}

/// TLS settings of a backup.
pub(super) fn server(identity: &Identity) -> Result<Arc<QuicServerConfig>, LinkError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(identity)?, provider())
        .build()
        .map_err(LinkError::tls)?;
    let mut tls = rustls::ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(LinkError::tls)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())
        .map_err(LinkError::tls)?;
    tls.alpn_protocols = vec![ALPN.into()];
    tls.session_storage = Arc::new(NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    Ok(Arc::new(QuicServerConfig::try_from(tls).map_err(LinkError::tls)?))
}

/// Settings of a backup for a connection from `peer`.
pub(super) fn server_for(crypto: &Arc<QuicServerConfig>, peer: SocketAddr) -> Arc<ServerConfig> {
    let mut config = ServerConfig::with_crypto(crypto.clone());
    config.transport_config(Arc::new(transport(peer)));
    config.migration(false);
    Arc::new(config)
}

/// A bound endpoint; must be called on a tokio runtime.
pub(super) fn endpoint(
    bind: SocketAddr,
    server: Option<ServerConfig>,
) -> Result<Endpoint, LinkError> {
    let failed = |source| LinkError::Bind { address: bind, source };
    let socket = UdpSocket::bind(bind).map_err(failed)?;
    // Beyond the system's limit with the privilege, up to it without.
    if setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(&socket, sockopt::RcvBuf, &SOCKET_BUFFER);
    }
    if setsockopt(&socket, sockopt::SndBufForce, &SOCKET_BUFFER).is_err() {
        let _ = setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER);
    }
    let runtime = Arc::new(quinn::TokioRuntime);
    let mut config = EndpointConfig::default();
    // What we tell peers that they may send at once; quinn's default keeps them at 1472.
    config.max_udp_payload_size(LARGEST).expect("more than 1200");
    Endpoint::new(config, server, socket, runtime).map_err(failed)
}

/// Checks that the peer's certificate, which the handshake has found genuine, carries this name.
pub(super) fn check_name(connection: &quinn::Connection, expected: &str) -> Result<(), LinkError> {
    let wrong = |reason: String| LinkError::WrongPeer { expected: expected.into(), reason };
    let chain = connection
        .peer_identity()
        .and_then(|i| i.downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>().ok());
    let Some(leaf) = chain.as_ref().and_then(|c| c.first()) else {
        return Err(wrong("it shows no certificate".into()));
    };
    let name = rustls::pki_types::ServerName::try_from(expected)
        .map_err(|e| wrong(format!("that is no valid name: {e}")))?;
    ParsedCertificate::try_from(leaf)
        .and_then(|leaf| rustls::client::verify_server_name(&leaf, &name))
        .map_err(|e| wrong(e.to_string()))
}
