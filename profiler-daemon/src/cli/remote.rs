//! From parsed arguments to questions to a running daemon.

use std::io::IsTerminal;

use super::args::{ExportArgs, RequestsArgs, RoutesArgs, ServerArgs, ShowArgs, TargetsArgs};
use super::client::{self, ClientError, ClientOptions, ExportQuery, ExportSource, RequestsQuery};
use super::{CliError, ExitCode, output};
use crate::config::Span;

impl From<ClientError> for CliError {
    fn from(error: ClientError) -> Self {
        if error.is_usage() { Self::usage(error.to_string()) } else { Self::runtime(error.to_string()) }
    }
}

fn options(server: &ServerArgs, json: bool) -> ClientOptions {
    // What is not wanted is taken out again on the way to stdout.
    let color = match anstream::ColorChoice::global() {
        anstream::ColorChoice::Auto => std::io::stdout().is_terminal(),
        anstream::ColorChoice::Always | anstream::ColorChoice::AlwaysAnsi => true,
        anstream::ColorChoice::Never => false,
    };
    ClientOptions { url: server.url.clone(), json, color }
}

/// What the daemon looks at, as its API says.
pub(super) fn target_list(server: &ServerArgs) -> Result<serde_json::Value, client::ClientError> {
    client::target_list(&options(server, true))
}

fn duration(span: Span) -> String {
    humantime::format_duration(span.get()).to_string().replace(' ', "")
}

pub fn requests(args: &RequestsArgs) -> Result<ExitCode, CliError> {
    let query = RequestsQuery {
        service: args.service.clone(),
        route: args.route.clone(),
        method: args.method.clone(),
        status: args.status.clone(),
        pid: args.pid.clone().map(|p| p.get()),
        min_duration: args.min_duration.clone().map(duration),
        max_duration: args.max_duration.clone().map(duration),
        since: args.window.since.map(|t| t.to_string()),
        until: args.window.until.map(|t| t.to_string()),
        sort: Some(args.sort.clone()),
        limit: Some(args.limit),
        cursor: args.cursor.clone(),
    };
    output::stdout(&client::requests(&options(&args.server, args.json), &query)?)
}

pub fn routes(args: &RoutesArgs) -> Result<ExitCode, CliError> {
    let query = RequestsQuery {
        service: args.service.clone(),
        since: args.window.since.map(|t| t.to_string()),
        until: args.window.until.map(|t| t.to_string()),
        ..RequestsQuery::default()
    };
    output::stdout(&client::routes(&options(&args.server, args.json), &query)?)
}

pub fn targets(args: &TargetsArgs) -> Result<ExitCode, CliError> {
    output::stdout(&client::targets(&options(&args.server, args.json))?)
}

pub fn show(args: &ShowArgs) -> Result<ExitCode, CliError> {
    output::stdout(&client::show(&options(&args.server, args.json), &args.id, args.view.name())?)
}

pub fn export(args: &ExportArgs) -> Result<ExitCode, CliError> {
    let source = match (&args.id, &args.route) {
        (Some(id), _) => ExportSource::Request(id.clone()),
        (None, route) => ExportSource::Matching(RequestsQuery {
            route: route.clone(),
            service: args.service.clone(),
            since: args.window.since.map(|t| t.to_string()),
            until: args.window.until.map(|t| t.to_string()),
            ..RequestsQuery::default()
        }),
    };
    let query = ExportQuery {
        source,
        format: args.format.clone().map(|f| f.get().name().to_owned()),
        view: args.view.name(),
        output: args.output.clone(),
    };
    output::stdout(&client::export(&options(&args.server, false), &query)?)
}
