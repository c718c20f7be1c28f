//! The HTTP side: the API, the metrics and the web page.
//!
//! In: a [`Context`], the few things this module needs from the rest of the daemon, so that it runs without a kernel
//! in tests. Out: a server on a listener that the caller bound.

mod api;
mod cache;
mod error;
mod guard;
mod listener;
pub mod metrics;
mod page;
mod query;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tower_http::limit::RequestBodyLimitLayer;

pub use metrics::Metrics;

use crate::store::Reader;

/// A question to the rest of the daemon with a JSON answer.
pub type Report = Arc<dyn Fn() -> serde_json::Value + Send + Sync>;
/// A question or an order to the rest of the daemon; the error is for people.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// No request of this API has a body worth more.
const MAX_BODY: usize = 64 << 10;
/// Answers that are computed at the same time: each may read thousands of rows or draw a large flame graph, and this
/// daemon shares the machine with those it watches.
const JOBS: usize = 3;
/// Merged profiles that are computed at the same time. They take seconds, so they have a place of their own, where they
/// keep nobody waiting but each other.
const MERGES: usize = 1;

/// What the server needs from the rest of the daemon.
#[derive(Clone)]
pub struct Context {
    pub store: Reader,
    pub metrics: Arc<Metrics>,
    /// Brings the metrics up to date before they are shown. May block.
    pub refresh: Arc<dyn Fn() + Send + Sync>,
    /// The object of `/api/v1/status`; the store's part is added here.
    pub status: Report,
    /// The array `targets` of `/api/v1/targets`.
    pub targets: Report,
    /// Whether the probes are attached; the store's state is added here.
    pub ready: Check,
    /// Reads the configuration again. May block.
    pub reload: Check,
    /// Names that this host is reached by, beside those of loopback; in lower case.
    pub hosts: Vec<String>,
}

/// A way to read the configuration again of which the metrics tell how it went, whoever asked for it.
pub fn noted(
    metrics: Arc<Metrics>,
    reload: impl Fn() -> Result<(), String> + Send + Sync + 'static,
) -> Check {
    Arc::new(move || {
        let result = reload();
        metrics.set_reload_successful(result.is_ok());
        result
    })
}

/// Shared by all handlers.
struct App {
    context: Context,
    jobs: Arc<Semaphore>,
    merges: Arc<Semaphore>,
    cache: cache::Cache,
}

/// All routes, guarded. `listen`: the address that the server is reached by, for the check of `Host`.
pub fn router(context: Context, listen: SocketAddr) -> Router {
    let guard = Arc::new(guard::Guard::new(listen, context.hosts.clone()));
    let app = Arc::new(App {
        context,
        jobs: Arc::new(Semaphore::new(JOBS)),
        merges: Arc::new(Semaphore::new(MERGES)),
        cache: cache::Cache::default(),
    });
    Router::new()
        .merge(page::routes())
        .merge(api::routes())
        .with_state(app)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(RequestBodyLimitLayer::new(MAX_BODY))
        .layer(axum::middleware::from_fn_with_state(guard, guard::guard))
}

/// Serves until `shutdown` completes and the answers in progress are given.
pub async fn serve(
    listener: TcpListener,
    context: Context,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let listen = listener.local_addr()?;
    axum::serve(listener::Bounded::new(listener), router(context, listen))
        .with_graceful_shutdown(shutdown)
        .await
}
