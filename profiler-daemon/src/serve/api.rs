//! The endpoints of the contract.
//!
//! Handlers parse strictly first, then do what may take long on a thread for blocking work, of which a few run at the
//! same time.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::cache::Document;
use super::error::ApiError;
use super::query::{FILTERS, Params};
use super::{App, Context, guard, metrics};
use crate::profile::Builder;
use crate::profile::format::{Format, Subject, render};
use crate::record::{RequestRecord, TOO_SHORT};
use crate::store::{Deadline, DropReason, Filter, InvalidId, Merged, RequestId};

type Answer = Result<Response, ApiError>;
type PathId = Result<Path<String>, PathRejection>;

/// What stands before the id of one request.
const REQUEST: &str = "/api/v1/requests/";
/// Characters of an invalid id that an error repeats: twice those of a valid one.
const ID_SHOWN: usize = 48;

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
    // An id with a slash in it, such as `../x`, is as bad as one with an encoded slash.
    let rest = uri.path().strip_prefix(REQUEST);
    if let Some(text) = rest.filter(|rest| rest.split('/').next().is_none_or(|id| !is_id(id))) {
        return invalid_id(text.strip_suffix("/profile").unwrap_or(text));
    }
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
        (context.reload)().map_err(|why| ApiError::conflict("reload_failed", why))?;
        Ok(Json(json!({"reloaded": true})).into_response())
    })
    .await
}

async fn show_metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Answer {
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let encoding = metrics::Encoding::negotiate(accept);
    // Thousands of series are worth a thread, but not a turn: those who watch the daemon wait for nobody.
    let encode = move || {
        (app.context.refresh)();
        app.context.metrics.encode(encoding, Some(app.context.store.counters()))
    };
    let body = tokio::task::spawn_blocking(encode).await.map_err(|_| failed())?;
    Ok(([(header::CONTENT_TYPE, encoding.content_type())], body).into_response())
}

async fn status(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    Params::parse(&uri, &[])?;
    work(&app, |context| {
        let mut status = (context.status)();
        if let Value::Object(fields) = &mut status {
            fields.insert("store".to_owned(), store_status(context));
            let ready = readiness(context);
            fields.insert("ready".to_owned(), json!(ready.is_ok()));
            fields.insert("not_ready".to_owned(), json!(ready.err()));
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
    let id = request_id(id, &uri)?;
    work(&app, move |context| Ok(Json(find(context, id)?).into_response())).await
}

/// What is not even UTF-8 is no id either.
fn request_id(id: PathId, uri: &Uri) -> Result<RequestId, ApiError> {
    let Ok(Path(text)) = id else {
        let raw = uri.path().strip_prefix(REQUEST).unwrap_or_default();
        return Err(invalid_id(raw.strip_suffix("/profile").unwrap_or(raw)));
    };
    text.parse().map_err(|InvalidId| invalid_id(&text))
}

fn is_id(text: &str) -> bool {
    text.parse::<RequestId>().is_ok()
}

/// Names what was given, as much of it as a person needs to recognise it.
fn invalid_id(text: &str) -> ApiError {
    let shown: String = text.chars().take(ID_SHOWN).collect();
    let more = if shown.len() < text.len() { "…" } else { "" };
    ApiError::bad_request("invalid_id", format!("{shown:?}{more} is {InvalidId}"))
}

fn find(context: &Context, id: RequestId) -> Result<RequestRecord, ApiError> {
    context.store.get(id)?.ok_or_else(|| ApiError::not_found(format!("there is no request {id}")))
}

async fn request_profile(State(app): State<Arc<App>>, id: PathId, uri: Uri) -> Answer {
    let params = Params::parse(&uri, &[&["format", "view", "color"]])?;
    let id = request_id(id, &uri)?;
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
        Ok(document(body, format, &id.to_string()).into_response())
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
    let job = move |context: &Context, until| {
        let answer = json!({"routes": context.store.routes(&filter, until)?, "next": null});
        let headers = [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))];
        Ok(Document { headers: headers.into_iter().collect(), body: answer.to_string().into() })
    };
    cached(&app, &app.jobs, &uri, job).await
}

async fn merged_profile(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    let params = Params::parse(&uri, &[&FILTERS, &["format", "view", "color"]])?;
    let (filter, view, format) = (params.filter(now())?, params.view()?, params.format()?);
    let color = params.color()?;
    let job = move |context: &Context, until| {
        let merged = context.store.merged(&filter, until)?;
        if merged.merged == 0 {
            return Err(ApiError::not_found(match merged.without_samples {
                0 => "no stored request with a profile matches".to_owned(),
                n => format!("none of the {n} requests that match was hit by a sample: they were too short"),
            }));
        }
        let subject = subject_of_many(&filter, &merged);
        let body = render(&merged.profile, &subject, format, view, color);
        let mut document = document(body, format, "merged");
        let mut say = |name, value| document.headers.insert(HeaderName::from_static(name), value);
        say("reqprof-requests", HeaderValue::from(merged.profile.requests()));
        say("reqprof-merged", HeaderValue::from(merged.merged));
        say("reqprof-unreadable", HeaderValue::from(merged.unreadable));
        say("reqprof-truncated", HeaderValue::from_static(if merged.truncated { "true" } else { "false" }));
        Ok(document)
    };
    cached(&app, &app.merges, &uri, job).await
}

fn subject_of_many(filter: &Filter, merged: &Merged) -> Subject {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    let what = filter.route.as_deref().or(filter.service.as_deref()).unwrap_or("all requests");
    let newest = if merged.truncated { "newest " } else { "" };
    Subject {
        title: format!(
            "{what} - {newest}{} requests, {} with samples",
            merged.profile.requests(),
            merged.merged
        ),
        service: text(&filter.service),
        route: text(&filter.route),
        method: text(&filter.method),
        with_samples: Some(merged.merged),
        ..Subject::default()
    }
}

/// A rendered profile with the headers of its format.
fn document(body: Vec<u8>, format: Format, name: &str) -> Document {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(format.content_type()));
    if format == Format::Svg {
        headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(guard::GRAPH));
    }
    // `inline`: shown where it can be, saved under this name where it cannot.
    let disposition = format!("inline; filename=\"{name}.{}\"", format.extension());
    if let Ok(value) = HeaderValue::from_str(&disposition) {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Document { headers, body: body.into() }
}

fn now() -> i64 {
    i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX)
}

fn failed() -> ApiError {
    ApiError::unavailable("internal", "the answer could not be computed")
}

/// Runs `job` where it may block, when it is its turn.
async fn work(app: &Arc<App>, job: impl FnOnce(&Context) -> Answer + Send + 'static) -> Answer {
    run(app, &app.jobs, move |app| job(&app.context)).await
}

/// The answer of a moment ago, if there is one, else that of `job`, which gives up when nobody waits any more.
async fn cached(
    app: &Arc<App>,
    slots: &Arc<Semaphore>,
    uri: &Uri,
    job: impl FnOnce(&Context, Deadline) -> Result<Document, ApiError> + Send + 'static,
) -> Answer {
    let until = Deadline::after(guard::TIMEOUT);
    let question = uri.path_and_query().map(ToString::to_string).unwrap_or_default();
    if let Some(known) = app.cache.get(&question) {
        return Ok(known.into_response());
    }
    run(app, slots, move |app| {
        // Whoever had the turn before may have asked the same.
        if let Some(known) = app.cache.get(&question) {
            return Ok(known.into_response());
        }
        let begun = Instant::now();
        let document = job(&app.context, until)?;
        app.cache.put(question, begun.elapsed(), document.clone());
        Ok(document.into_response())
    })
    .await
}

/// Runs `job` on a thread where it may block, when there is a slot. The slot goes with it: a client that hangs up frees
/// nothing while its work still runs.
async fn run(
    app: &Arc<App>,
    slots: &Arc<Semaphore>,
    job: impl FnOnce(&App) -> Answer + Send + 'static,
) -> Answer {
    let slot = Arc::clone(slots).acquire_owned().await.map_err(|_| failed())?;
    let app = Arc::clone(app);
    let run = move || {
        let answer = job(&app);
        drop(slot);
        answer
    };
    tokio::task::spawn_blocking(run).await.map_err(|_| failed())?
}
