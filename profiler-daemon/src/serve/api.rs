//! The endpoints of the contract.
//!
//! Handlers parse strictly first, then do what may take long on a thread for blocking work, of which a few run at the
//! same time.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::error::ApiError;
use super::query::{FILTERS, Params};
use super::{App, Context, guard, metrics};
use crate::profile::Builder;
use crate::profile::format::{Format, Subject, render};
use crate::record::{RequestRecord, TOO_SHORT};
use crate::store::{DropReason, Filter, InvalidId, RequestId};

type Answer = Result<Response, ApiError>;
type PathId = Result<Path<String>, PathRejection>;

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/metrics", get(show_metrics))
        .route("/-/healthy", get(healthy))
        .route("/-/ready", get(ready))
        .route("/-/reload", post(reload))
        .route("/api/v1/status", get(status))
        .route("/api/v1/targets", get(targets))
        .route("/api/v1/requests", get(requests))
        .route("/api/v1/requests/{id}", get(request))
        .route("/api/v1/requests/{id}/profile", get(request_profile))
        .route("/api/v1/routes", get(route_stats))
        .route("/api/v1/profile", get(merged_profile))
        .route("/api/v1/diff", any(planned))
        .route("/api/v1/captures", any(planned))
        .route("/api/v1/captures/{id}", any(planned))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
}

async fn unknown(uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is nothing at {:?}", uri.path()))
}

/// What the contract names and a later version will have.
async fn planned(uri: Uri) -> ApiError {
    let message = format!("{:?} is planned, not in this version", uri.path());
    ApiError::new(StatusCode::NOT_FOUND, "endpoint_unavailable", message)
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("{:?} does not take {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

async fn healthy() -> &'static str {
    "healthy\n"
}

async fn ready(State(app): State<Arc<App>>) -> Answer {
    readiness(&app.context).map_err(|why| ApiError::unavailable("not_ready", why))?;
    Ok("ready\n".into_response())
}

fn readiness(context: &Context) -> Result<(), String> {
    (context.ready)()?;
    match context.store.counters().degraded() {
        Some(why) => Err(format!("the store cannot be written: {why}")),
        None => Ok(()),
    }
}

async fn reload(State(app): State<Arc<App>>) -> Answer {
    work(&app, |context| {
        let result = (context.reload)();
        context.metrics.set_reload_successful(result.is_ok());
        result.map_err(|why| ApiError::conflict("reload_failed", why))?;
        Ok(Json(json!({"reloaded": true})).into_response())
    })
    .await
}

async fn show_metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let encoding = metrics::Encoding::negotiate(accept);
    let body = app.context.metrics.encode(encoding, Some(app.context.store.counters()));
    ([(header::CONTENT_TYPE, encoding.content_type())], body).into_response()
}

async fn status(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    Params::parse(&uri, &[])?;
    work(&app, |context| {
        let mut status = (context.status)();
        if let Value::Object(fields) = &mut status {
            fields.insert("store".to_owned(), store_status(context));
            fields.insert("ready".to_owned(), json!(readiness(context).is_ok()));
        }
        Ok(Json(status).into_response())
    })
    .await
}

fn store_status(context: &Context) -> Value {
    let counters = context.store.counters();
    let dropped: serde_json::Map<_, _> =
        DropReason::ALL.iter().map(|r| (r.name().to_owned(), counters.dropped(*r).into())).collect();
    let degraded = counters.degraded();
    json!({
        "state": if degraded.is_some() { "degraded" } else { "ok" },
        "reason": degraded,
        "bytes": counters.bytes(),
        "written": counters.written(),
        "deleted": counters.deleted(),
        "dropped": dropped,
    })
}

async fn targets(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    Params::parse(&uri, &[])?;
    work(&app, |context| Ok(Json(json!({"targets": (context.targets)(), "next": null})).into_response()))
        .await
}

async fn requests(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    let params = Params::parse(&uri, &[&FILTERS, &["sort", "limit", "cursor"]])?;
    let (filter, sort, limit) = (params.filter(now())?, params.sort()?, params.limit()?);
    work(&app, move |context| {
        let page = context.store.list(&filter, sort, limit, params.cursor())?;
        Ok(Json(json!({"requests": page.records, "next": page.next})).into_response())
    })
    .await
}

async fn request(State(app): State<Arc<App>>, id: PathId, uri: Uri) -> Answer {
    Params::parse(&uri, &[])?;
    let id = request_id(id)?;
    work(&app, move |context| Ok(Json(find(context, id)?).into_response())).await
}

/// What is not even UTF-8 is no id either.
fn request_id(id: PathId) -> Result<RequestId, ApiError> {
    let Path(text) = id.map_err(|_| InvalidId)?;
    Ok(text.parse()?)
}

fn find(context: &Context, id: RequestId) -> Result<RequestRecord, ApiError> {
    context.store.get(id)?.ok_or_else(|| ApiError::not_found(format!("there is no request {id}")))
}

async fn request_profile(State(app): State<Arc<App>>, id: PathId, uri: Uri) -> Answer {
    let params = Params::parse(&uri, &[&["format", "view", "color"]])?;
    let id = request_id(id)?;
    let (view, format, color) = (params.view()?, params.format()?, params.color()?);
    work(&app, move |context| {
        let record = find(context, id)?;
        let profile = match context.store.profile(id)? {
            Some(profile) => profile,
            // Nothing hit it: all of its time is `[unsampled]`, as in its file.
            None if record.samples == 0 => Builder::default().finish(record.duration_ns),
            None => return Err(ApiError::not_found(no_profile(&record))),
        };
        let subject = Subject::of(&record);
        let body = render(&profile, &subject, format, view, color);
        Ok(document(body, format, &id.to_string()))
    })
    .await
}

/// Why a request that was sampled has no profile. Retention takes both away together.
fn no_profile(record: &RequestRecord) -> String {
    let why = match record.note.as_deref() {
        Some(TOO_SHORT) => "the request was shorter than min_duration",
        _ => {
            "the request was shorter than min_duration, or the store had no room for it (see store.dropped in the status)"
        }
    };
    format!("no profile is stored for the request {}: {why}", record.id)
}

async fn route_stats(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    let params = Params::parse(&uri, &[&FILTERS])?;
    let filter = params.filter(now())?;
    work(&app, move |context| {
        Ok(Json(json!({"routes": context.store.routes(&filter)?, "next": null})).into_response())
    })
    .await
}

async fn merged_profile(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    let params = Params::parse(&uri, &[&FILTERS, &["format", "view", "color"]])?;
    let (filter, view, format) = (params.filter(now())?, params.view()?, params.format()?);
    let color = params.color()?;
    work(&app, move |context| {
        let merged = context.store.merged(&filter)?;
        if merged.merged == 0 {
            return Err(ApiError::not_found("no stored request with a profile matches"));
        }
        let subject = subject_of_many(&filter, merged.merged, merged.truncated);
        let body = render(&merged.profile, &subject, format, view, color);
        let mut response = document(body, format, "merged");
        let headers = response.headers_mut();
        headers.insert(HeaderName::from_static("reqprof-merged"), HeaderValue::from(merged.merged));
        headers.insert(HeaderName::from_static("reqprof-unreadable"), HeaderValue::from(merged.unreadable));
        let truncated = if merged.truncated { "true" } else { "false" };
        headers.insert(HeaderName::from_static("reqprof-truncated"), HeaderValue::from_static(truncated));
        Ok(response)
    })
    .await
}

fn subject_of_many(filter: &Filter, merged: u64, truncated: bool) -> Subject {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let what = filter.route.as_deref().or(filter.service.as_deref()).unwrap_or("all requests");
    let newest = if truncated { "newest " } else { "" };
    Subject {
        title: format!("{what} - {newest}{merged} requests merged"),
        service: text(&filter.service),
        route: text(&filter.route),
        method: text(&filter.method),
        status: None,
        request_id: None,
        trace_id: None,
        start: 0,
    }
}

/// A rendered profile with the headers of its format.
fn document(body: Vec<u8>, format: Format, name: &str) -> Response {
    let mut response = ([(header::CONTENT_TYPE, format.content_type())], body).into_response();
    let headers = response.headers_mut();
    if format == Format::Svg {
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(guard::GRAPH));
    }
    // `inline`: shown where it can be, saved under this name where it cannot.
    let disposition = format!("inline; filename=\"{name}.{}\"", format.extension());
    if let Ok(value) = HeaderValue::from_str(&disposition) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    response
}

fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

/// Runs `job` where it may block, when it is its turn. The slot goes with it: a client that hangs up frees nothing
/// while its work still runs.
async fn work(app: &Arc<App>, job: impl FnOnce(&Context) -> Answer + Send + 'static) -> Answer {
    let failed = || ApiError::unavailable("internal", "the answer could not be computed");
    let slot = Arc::clone(&app.jobs).acquire_owned().await.map_err(|_| failed())?;
    let app = Arc::clone(app);
    let run = move || {
        let answer = job(&app.context);
        drop(slot);
        answer
    };
    tokio::task::spawn_blocking(run).await.map_err(|_| failed())?
}
