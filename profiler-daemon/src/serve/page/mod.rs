//! The web page: a few files, built in, that need nothing from elsewhere.
//!
//! They talk to the API like any other client; what they show of it goes through `textContent`, never as HTML.

use std::sync::Arc;

use axum::Router;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::{App, guard};

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", get(async || file("text/html; charset=utf-8", include_str!("index.html"))))
        .route("/style.css", get(async || file("text/css; charset=utf-8", include_str!("style.css"))))
        .route("/icon.svg", get(async || file("image/svg+xml", include_str!("icon.svg"))))
        .route("/app.js", get(async || file("text/javascript; charset=utf-8", include_str!("app.js"))))
}

fn file(content_type: &'static str, body: &'static str) -> Response {
    let headers = [(header::CONTENT_TYPE, content_type), (header::CONTENT_SECURITY_POLICY, guard::PAGE)];
    (headers, body).into_response()
}
