//! A small certificate authority for the hosts of one deployment.
//!
//! Each host has a certificate with one name, `NAME.ROLE.nilicon`, good for both ends of a
//! connection. A host accepts exactly the peer that its topology names: same authority, same
//! name, same role. Certificates do not expire: who may replicate is decided by the authority's
//! directory, and a cluster that stops protecting on a forgotten date helps nobody. To shut a
//! host out, make a new authority.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64;

const AUTHORITY: &str = "ca.pem";
const AUTHORITY_KEY: &str = "ca-key.pem";

/// What a host may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostRole {
    /// Runs containers, or spares of them.
    Host,
    /// Only votes.
    Witness,
}

impl HostRole {
    fn label(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Witness => "witness",
        }
    }
}

/// The name in the certificate of a host, such as `alpha.host.nilicon`.
pub fn certificate_name(host: &str, role: HostRole) -> String {
    format!("{host}.{}.nilicon", role.label())
}

/// Why certificates could not be made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file could not be read or written.
    #[error("{}: {fix}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What to do.
        fix: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{}: not {what} in PEM ({reason}); make it again", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// A certificate could not be made.
    #[error("the certificate of '{name}' could not be made")]
    Make {
        /// The name in it.
        name: String,
        /// The library's reason.
        source: rcgen::Error,
    },
    /// It cannot be part of a certificate's name.
    #[error("'{name}' cannot name a host: use 1 to 40 of a-z, 0-9 and '-', not '-' at its ends")]
    Name {
        /// The name.
        name: String,
    },
}

/// What a host shows to its peers, and whom it trusts.
#[derive(Clone, Debug)]
pub struct Identity {
    pub(super) authority: CertificateDer<'static>,
    pub(super) certificate: CertificateDer<'static>,
    pub(super) key: Arc<PrivateKeyDer<'static>>,
}

impl Identity {
    /// Loads the authority's certificate and a host's own, as [`issue`] wrote them.
    pub fn load(dir: &Path, host: &str, role: HostRole) -> Result<Self, PkiError> {
        let [certificate, key] = files(dir, host, role);
        Self::load_files(&dir.join(AUTHORITY), &certificate, &key)
    }

    /// Loads them from three files.
    pub fn load_files(authority: &Path, certificate: &Path, key: &Path) -> Result<Self, PkiError> {
        let missing = "cannot be read; issue the host's certificate and copy its files here";
        let key_pem = read(key, missing)?;
        Ok(Self {
            authority: read_certificate(authority, missing)?,
            certificate: read_certificate(certificate, missing)?,
            key: Arc::new(
                PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
                    .map_err(|e| not_pem(key, "a private key", e))?,
            ),
        })
    }
}

/// Makes an authority in `dir`, which is created if it does not exist. An authority that is
/// there already is not replaced.
pub fn init(dir: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| {
        PkiError::File { path: dir.into(), fix: "the directory cannot be made", source }
    })?;
    let key = KeyPair::generate()
        .map_err(|source| PkiError::Make { name: "nilicon authority".into(), source })?;
    // Its own name for each authority: a foreign one is then reported as unknown, and not as one
    // that signs wrongly.
    let name = format!("nilicon authority {:016x}", xxh3_64(key.public_key_raw()));
    let make = |source| PkiError::Make { name: name.clone(), source };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name.as_str());
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key).map_err(make)?;
    write_new(&dir.join(AUTHORITY_KEY), &key.serialize_pem())?;
    write_new(&dir.join(AUTHORITY), &certificate.pem())
}

/// Makes the certificate of a host with the authority in `dir`, and writes it there as
/// `HOST.ROLE.pem` and `HOST.ROLE-key.pem`. Gives both paths.
pub fn issue(dir: &Path, host: &str, role: HostRole) -> Result<[PathBuf; 2], PkiError> {
    let letters = host.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if !letters || !(1..=40).contains(&host.len()) || host.starts_with('-') || host.ends_with('-') {
        return Err(PkiError::Name { name: host.into() });
    }
    let no_authority = "cannot be read; make the authority first";
    let authority_key = dir.join(AUTHORITY_KEY);
    let authority = dir.join(AUTHORITY);
    let key = KeyPair::from_pem(&read(&authority_key, no_authority)?)
        .map_err(|e| not_pem(&authority_key, "a private key", e))?;
    let issuer = Issuer::from_ca_cert_pem(&read(&authority, no_authority)?, key)
        .map_err(|e| not_pem(&authority, "a certificate", e))?;

    let name = certificate_name(host, role);
    let make = |source| PkiError::Make { name: name.clone(), source };
    let own = KeyPair::generate().map_err(make)?;
    let mut params = CertificateParams::new(vec![name.clone()]).map_err(make)?;
    params.distinguished_name.push(DnType::CommonName, name.as_str());
    params.distinguished_name.push(DnType::OrganizationalUnitName, role.label());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&own, &issuer).map_err(make)?;
    let [certificate_path, key_path] = files(dir, host, role);
    write_new(&key_path, &own.serialize_pem())?;
    write_new(&certificate_path, &certificate.pem())?;
    Ok([certificate_path, key_path])
}

fn files(dir: &Path, host: &str, role: HostRole) -> [PathBuf; 2] {
    let stem = format!("{host}.{}", role.label());
    [dir.join(format!("{stem}.pem")), dir.join(format!("{stem}-key.pem"))]
}

fn read(path: &Path, fix: &'static str) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|source| PkiError::File { path: path.into(), fix, source })
}

fn read_certificate(path: &Path, fix: &'static str) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(read(path, fix)?.as_bytes())
        .map_err(|e| not_pem(path, "a certificate", e))
}

fn not_pem(path: &Path, what: &'static str, reason: impl ToString) -> PkiError {
    PkiError::Pem { path: path.into(), what, reason: reason.to_string() }
}

fn write_new(path: &Path, pem: &str) -> Result<(), PkiError> {
    let file = |source| PkiError::File {
        path: path.into(),
        fix: "cannot be written; a file that exists is not replaced, remove it first",
        source,
    };
    let mut out =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(file)?;
    out.write_all(pem.as_bytes()).and_then(|()| out.sync_all()).map_err(file)
}

#[cfg(test)]
mod tests {
    use super::super::tests::TempDir;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_private_and_never_replaced() {
        let dir = TempDir::new("pki");
        init(dir.path()).unwrap();
        let paths = issue(dir.path(), "alpha", HostRole::Host).unwrap();
        assert!(paths[0].ends_with("alpha.host.pem"));
        for entry in fs::read_dir(dir.path()).unwrap() {
            let mode = entry.unwrap().metadata().unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
        assert!(init(dir.path()).unwrap_err().to_string().contains("not replaced"));
        assert!(issue(dir.path(), "alpha", HostRole::Host).is_err());
        Identity::load(dir.path(), "alpha", HostRole::Host).unwrap();
    }

    /// A host whose clock steps, or was never set, is met all the same.
    #[test]
    fn certificates_are_good_at_any_time_of_day() {
        use rustls::client::WebPkiServerVerifier;
        use rustls::client::danger::ServerCertVerifier;
        use rustls::pki_types::{ServerName, UnixTime};
        use std::time::Duration;

        let dir = TempDir::new("pki-time");
        init(dir.path()).unwrap();
        issue(dir.path(), "alpha", HostRole::Host).unwrap();
        let identity = Identity::load(dir.path(), "alpha", HostRole::Host).unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(identity.authority.clone()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider);
        let verifier = verifier.build().unwrap();
        let name = certificate_name("alpha", HostRole::Host);
        let name = ServerName::try_from(name).unwrap();
        let year = 365 * 24 * 3600;
        let now = UnixTime::now().as_secs();
        for time in [10 * year, now - 3600, now, now + 3600, now + 50 * year] {
            let at = UnixTime::since_unix_epoch(Duration::from_secs(time));
            let verified = verifier.verify_server_cert(&identity.certificate, &[], &name, &[], at);
            assert!(verified.is_ok(), "at {time}: {verified:?}");
        }
    }

    #[test]
    fn errors_name_the_file_and_what_to_do() {
        let dir = TempDir::new("pki-errors");
        let e = issue(dir.path(), "alpha", HostRole::Host).unwrap_err().to_string();
        assert!(e.contains("ca-key.pem") && e.contains("make the authority first"), "{e}");
        init(dir.path()).unwrap();
        let e = Identity::load(dir.path(), "beta", HostRole::Host).unwrap_err().to_string();
        assert!(e.contains("beta.host-key.pem") && e.contains("issue"), "{e}");
        issue(dir.path(), "beta", HostRole::Host).unwrap();
        fs::write(dir.path().join("beta.host.pem"), "nonsense").unwrap();
        let e = Identity::load(dir.path(), "beta", HostRole::Host).unwrap_err().to_string();
        assert!(e.contains("beta.host.pem") && e.contains("not a certificate"), "{e}");
        for bad in ["", "a b", "-a", "Alpha", "a.host"] {
            assert!(matches!(issue(dir.path(), bad, HostRole::Host), Err(PkiError::Name { .. })));
        }
    }
}
