//! The witness: a third machine that remembers to whom it has granted which generation.
//!
//! ```text
//! host                                             witness
//!   QUIC, mutual TLS: NAME.host.nilicon    <->     NAME.witness.nilicon
//!   a stream: Claim, end                    ->     decided, written down, and only then
//!                                          <-      Verdict, end
//! ```
//! It is asked only when a side wants to act alone, never for an epoch. A host can ask in its own
//! name only. What was granted is on disk before the answer leaves: a witness that starts again
//! contradicts nothing that it said (FO-1). Claims are bounded before they are read (RB-1).

use super::link::{CLOSE_DONE, CLOSE_WRONG_PEER, LinkError, broken};
use super::pki::{HostRole, Identity, certificate_name};
use super::quic;
use crate::protocol::arbiter::{Arbiter, Claim, Grants, Verdict};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Longest claim, and longest verdict, in bytes.
const LONGEST: usize = 1024;
/// How long a conversation may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Containers that a witness remembers; claims for further ones are refused.
const CONTAINERS: usize = 10_000;

/// Grants that outlive the witness's process.
#[derive(Debug)]
pub struct Ledger {
    path: PathBuf,
    grants: Grants,
}

impl Ledger {
    /// Reads what was granted so far; nothing, if there is no such file.
    pub fn open(path: &Path) -> io::Result<Self> {
        let grants = match std::fs::read(path) {
            Ok(bytes) => postcard::from_bytes(&bytes).map_err(|e| {
                io::Error::other(format!("{} holds no grants: {e}", path.display()))
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Grants::default(),
            Err(e) => return Err(e),
        };
        Ok(Self { path: path.into(), grants })
    }

    /// Decides, and writes a grant down before it gives it.
    pub fn decide(&mut self, claim: &Claim) -> io::Result<Verdict> {
        if self.grants.newest(&claim.container).is_none() && self.grants.len() >= CONTAINERS {
            return Err(io::Error::other(format!("{CONTAINERS} containers are known already")));
        }
        let mut next = self.grants.clone();
        let verdict = next.decide(claim);
        if next != self.grants {
            self.write(&next)?;
            self.grants = next;
        }
        Ok(verdict)
    }

    fn write(&self, grants: &Grants) -> io::Result<()> {
        let bytes = postcard::to_allocvec(grants).map_err(io::Error::other)?;
        let new = self.path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        std::fs::rename(&new, &self.path)
    }
}

/// A bound witness.
pub struct WitnessEndpoint {
    endpoint: quinn::Endpoint,
    crypto: Arc<quinn::crypto::rustls::QuicServerConfig>,
    ledger: Mutex<Ledger>,
}

impl WitnessEndpoint {
    /// Binds the local address; must be called on a tokio runtime.
    pub fn bind(
        bind: SocketAddr,
        identity: &Identity,
        ledger: Ledger,
    ) -> Result<Arc<Self>, LinkError> {
        let crypto = quic::server(identity)?;
        let server = quinn::ServerConfig::with_crypto(crypto.clone());
        let endpoint = quic::endpoint(bind, Some(server))?;
        Ok(Arc::new(Self { endpoint, crypto, ledger: Mutex::new(ledger) }))
    }

    /// The local address, with the port that was chosen.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.endpoint.local_addr().ok()
    }

    /// Answers for as long as it is polled. `told` hears each claim with its verdict, and each
    /// conversation that failed.
    pub async fn serve(
        self: Arc<Self>,
        told: impl Fn(SocketAddr, Result<(Claim, Verdict), LinkError>) + Send + Sync + 'static,
    ) {
        let told = Arc::new(told);
        while let Some(incoming) = self.endpoint.accept().await {
            let (me, told) = (self.clone(), told.clone());
            tokio::spawn(async move {
                let peer = incoming.remote_address();
                let reason = format!("it asked nothing within {PATIENCE:?}");
                let late = LinkError::Connection { peer, reason };
                let talk = me.talk(incoming, peer);
                let result = tokio::time::timeout(PATIENCE, talk).await.unwrap_or(Err(late));
                told(peer, result);
            });
        }
    }

    async fn talk(
        &self,
        incoming: quinn::Incoming,
        peer: SocketAddr,
    ) -> Result<(Claim, Verdict), LinkError> {
        let config = quic::server_for(&self.crypto, peer);
        let connection = incoming
            .accept_with(config)
            .map_err(|e| LinkError::connection(peer, &e))?
            .await
            .map_err(|e| LinkError::connection(peer, &e))?;
        let (mut send, mut receive) =
            connection.accept_bi().await.map_err(|e| LinkError::connection(peer, &e))?;
        let claim: Claim = read(&mut receive, &connection).await?;
        let name = certificate_name(&claim.host, HostRole::Host);
        if let Err(e) = quic::check_name(&connection, &name) {
            connection.close(CLOSE_WRONG_PEER, e.to_string().as_bytes());
            return Err(e);
        }
        let decided = self.ledger.lock().unwrap_or_else(PoisonError::into_inner).decide(&claim);
        let verdict = decided.map_err(|e| {
            let reason = format!("a grant cannot be written down: {e}");
            connection.close(CLOSE_DONE, reason.as_bytes());
            LinkError::Connection { peer, reason }
        })?;
        write(&mut send, &verdict, &connection).await?;
        let _ = send.stopped().await;
        Ok((claim, verdict))
    }
}

/// How to reach a witness.
#[derive(Clone, Debug)]
pub struct WitnessClient {
    /// Its name in the topology.
    pub name: String,
    /// Its address.
    pub address: SocketAddr,
    /// This host's certificates.
    pub identity: Identity,
}

impl WitnessClient {
    /// Asks once. After an error the claim may have been granted all the same: ask again.
    pub async fn ask(&self, claim: &Claim) -> Result<Verdict, LinkError> {
        let peer = self.address;
        let reason = format!("no answer within {PATIENCE:?}");
        let late = LinkError::Connection { peer, reason };
        tokio::time::timeout(PATIENCE, self.talk(claim)).await.unwrap_or(Err(late))
    }

    async fn talk(&self, claim: &Claim) -> Result<Verdict, LinkError> {
        let peer = self.address;
        let any: IpAddr = if peer.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            Ipv6Addr::UNSPECIFIED.into()
        };
        let endpoint = quic::endpoint(SocketAddr::new(any, 0), None)?;
        let client = quic::client(&self.identity, peer)?;
        let name = certificate_name(&self.name, HostRole::Witness);
        let connection = endpoint
            .connect_with(client, peer, &name)
            .map_err(|e| LinkError::Connection { peer, reason: e.to_string() })?
            .await
            .map_err(|e| LinkError::connection(peer, &e))?;
        let (mut send, mut receive) =
            connection.open_bi().await.map_err(|e| LinkError::connection(peer, &e))?;
        write(&mut send, claim, &connection).await?;
        let verdict = read(&mut receive, &connection).await?;
        connection.close(CLOSE_DONE, b"thank you");
        Ok(verdict)
    }
}

async fn write<T: Serialize>(
    stream: &mut quinn::SendStream,
    message: &T,
    connection: &quinn::Connection,
) -> Result<(), LinkError> {
    let bytes = postcard::to_allocvec(message).map_err(|e| broken(connection, e))?;
    stream.write_all(&bytes).await.map_err(|e| broken(connection, e))?;
    stream.finish().map_err(|e| broken(connection, e))
}

async fn read<T: DeserializeOwned>(
    stream: &mut quinn::RecvStream,
    connection: &quinn::Connection,
) -> Result<T, LinkError> {
    let bytes = stream.read_to_end(LONGEST).await.map_err(|e| broken(connection, e))?;
    match postcard::take_from_bytes(&bytes).map_err(|e| broken(connection, e))? {
        (message, []) => Ok(message),
        (_, rest) => Err(broken(connection, format!("{} bytes are left over", rest.len()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Generation;
    use crate::transport::pki;

    fn claim(host: &str, base: u64, wanted: u64) -> Claim {
        Claim {
            container: "store".into(),
            host: host.into(),
            base: Generation(base),
            wanted: Generation(wanted),
        }
    }

    struct Bed {
        directory: PathBuf,
    }

    impl Bed {
        fn new(name: &str) -> Self {
            let directory =
                std::env::temp_dir().join(format!("nilicon-witness-{name}-{}", std::process::id()));
            pki::init(&directory).unwrap();
            for (name, role) in [
                ("alpha", HostRole::Host),
                ("beta", HostRole::Host),
                ("gamma", HostRole::Witness),
                ("gamma", HostRole::Host),
            ] {
                pki::issue(&directory, name, role).unwrap();
            }
            Self { directory }
        }

        fn identity(&self, name: &str, role: HostRole) -> Identity {
            Identity::load(&self.directory, name, role).unwrap()
        }

        fn ledger(&self) -> Ledger {
            Ledger::open(&self.directory.join("grants")).unwrap()
        }

        fn start(&self, role: HostRole) -> SocketAddr {
            let bind = "127.0.0.1:0".parse().unwrap();
            let identity = self.identity("gamma", role);
            let witness = WitnessEndpoint::bind(bind, &identity, self.ledger()).unwrap();
            let address = witness.local_addr().unwrap();
            tokio::spawn(witness.serve(|_, _| {}));
            address
        }

        fn client(&self, host: &str, address: SocketAddr) -> WitnessClient {
            let identity = self.identity(host, HostRole::Host);
            WitnessClient { name: "gamma".into(), address, identity }
        }
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.directory);
        }
    }

    #[tokio::test]
    async fn of_two_hosts_one_is_granted_it_also_after_a_restart_of_the_witness() {
        let bed = Bed::new("two");
        let address = bed.start(HostRole::Witness);
        let alpha = bed.client("alpha", address);
        assert_eq!(alpha.ask(&claim("alpha", 0, 1)).await.unwrap(), Verdict::Granted);
        assert_eq!(alpha.ask(&claim("alpha", 1, 2)).await.unwrap(), Verdict::Granted);
        let again = bed.start(HostRole::Witness);
        let denied = Verdict::Denied { newest: Generation(2) };
        for address in [address, again] {
            let beta = bed.client("beta", address);
            assert_eq!(beta.ask(&claim("beta", 1, 2)).await.unwrap(), denied);
        }
    }

    #[tokio::test]
    async fn nobody_claims_in_anothers_name_and_only_a_witness_is_asked() {
        let bed = Bed::new("names");
        let address = bed.start(HostRole::Witness);
        let error = bed.client("beta", address).ask(&claim("alpha", 0, 1)).await.unwrap_err();
        assert!(error.to_string().contains("alpha.host.nilicon"), "{error}");
        assert!(bed.ledger().grants.is_empty());
        let no_witness = bed.start(HostRole::Host);
        bed.client("alpha", no_witness).ask(&claim("alpha", 0, 1)).await.unwrap_err();
        assert!(bed.ledger().grants.is_empty());
    }
}
