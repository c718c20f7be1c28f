//! TLS by a library that is not OpenSSL: a certificate for a server, and a client that trusts it.

use std::io;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::{IpAddr, Ipv4Addr, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

/// Whom a client trusts; cheap to clone.
#[derive(Clone)]
pub struct Trust(Arc<ClientConfig>);

/// A server's files, in PEM.
pub struct Certificate {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// A certificate for 127.0.0.1, and who trusts it.
pub fn certificate(folder: &Path) -> (Certificate, Trust) {
    let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".into()]).expect("a certificate");
    let files = Certificate { certificate: folder.join("cert.pem"), key: folder.join("key.pem") };
    std::fs::write(&files.certificate, made.cert.pem()).expect("a file");
    std::fs::write(&files.key, made.signing_key.serialize_pem()).expect("a file");
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).expect("a certificate that can be trusted");
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    (files, Trust(Arc::new(config)))
}

impl Trust {
    /// TLS over a connection to 127.0.0.1.
    pub fn over(&self, stream: TcpStream) -> io::Result<StreamOwned<ClientConnection, TcpStream>> {
        let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::from(std::net::Ipv4Addr::LOCALHOST)));
        let client = ClientConnection::new(self.0.clone(), name).map_err(io::Error::other)?;
        Ok(StreamOwned::new(client, stream))
    }
}
