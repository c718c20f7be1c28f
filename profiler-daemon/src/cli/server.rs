//! The HTTP side of the commands that profile: its address, its start and its end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::CliError;
use crate::config::Config;
use crate::serve;
use crate::session::Gauges;
use crate::store::Store;

/// Connections that wait to be accepted; the server accepts at once unless it is flooded.
const BACKLOG: u32 = 1_024;

/// Takes the address, so that nobody else does while the probes are attached. Until there is somebody to answer,
/// connections are refused rather than left waiting.
pub(super) fn reserve(address: SocketAddr) -> Result<tokio::net::TcpSocket, CliError> {
    let take = || {
        let socket = match address {
            SocketAddr::V4(_) => tokio::net::TcpSocket::new_v4()?,
            SocketAddr::V6(_) => tokio::net::TcpSocket::new_v6()?,
        };
        // Connections of a daemon that has just ended do not count.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        Ok(socket)
    };
    take().map_err(|e| cannot_listen(address, &e))
}

fn cannot_listen(address: SocketAddr, error: &std::io::Error) -> CliError {
    CliError::runtime(format!("listening on {address}: {error}"))
        .with_remedy("stop what listens there, or choose another address with --listen")
}

/// Page, API and metrics of a session.
pub(super) struct Server {
    stop: tokio::sync::oneshot::Sender<()>,
    task: tokio::task::JoinHandle<std::io::Result<()>>,
}

impl Server {
    pub(super) fn start(
        socket: tokio::net::TcpSocket,
        config: &Config,
        store: &Store,
        gauges: &Arc<Gauges>,
        reload: serve::Check,
    ) -> Result<Self, CliError> {
        let failed = |e: std::io::Error| cannot_listen(config.listen, &e);
        let listener = socket.listen(BACKLOG).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let context = serve::Context {
            store: store.reader(),
            metrics: gauges.metrics.clone(),
            refresh: {
                let gauges = gauges.clone();
                Arc::new(move || gauges.refresh())
            },
            status: report(gauges, |g| g.status()),
            targets: report(gauges, |g| g.target_list()),
            ready: {
                let gauges = gauges.clone();
                Arc::new(move || gauges.ready())
            },
            reload,
            hosts: config.allow_hosts.clone(),
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let task = tokio::spawn(serve::serve(listener, context, async {
            // Also when the sender is dropped.
            let _ = stopped.await;
        }));
        tracing::info!("ready; the page is at http://{address}/");
        Ok(Self { stop, task })
    }

    pub(super) async fn stop(self) {
        // It may have ended by itself.
        let _ = self.stop.send(());
        let _ = tokio::time::timeout(Duration::from_secs(5), self.task).await;
    }
}

fn report(
    gauges: &Arc<Gauges>,
    ask: impl Fn(&Gauges) -> serde_json::Value + Send + Sync + 'static,
) -> serve::Report {
    let gauges = gauges.clone();
    Arc::new(move || ask(&gauges))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_taken_but_nobody_waits_there_before_it_is_served() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let socket = reserve("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let refused = std::net::TcpStream::connect(address).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
        let _listener = socket.listen(BACKLOG).unwrap();
        std::net::TcpStream::connect(address).unwrap();
        assert!(reserve(address).is_err(), "a second daemon is told at once");
    }
}
