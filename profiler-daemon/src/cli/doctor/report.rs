//! Checks for people (a table) and for programs (JSON).

use std::fmt::Write;

use super::{Check, Level};
use crate::cli::CliError;

/// One line per check, remedies below theirs, a summary at the end; with colours, which the output drops where
/// they are not wanted.
pub(super) fn table(checks: &[Check]) -> String {
    let width = checks.iter().map(|c| c.name.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for Check { name, level, finding, remedy } in checks {
        let color = match level {
            Level::Ok => anstyle::AnsiColor::Green,
            Level::Warn => anstyle::AnsiColor::Yellow,
            Level::Fail => anstyle::AnsiColor::Red,
        };
        let style = color.on_default();
        // Writing into a String cannot fail.
        let _ = writeln!(text, "{style}{:<4}{style:#}  {name:<width$}  {finding}", level.name());
        if let Some(remedy) = remedy {
            let _ = writeln!(text, "      {:<width$}  remedy: {remedy}", "");
        }
    }
    let count = |level| checks.iter().filter(|c| c.level == level).count();
    let (warnings, failures) = (count(Level::Warn), count(Level::Fail));
    let _ = match (failures, warnings) {
        (0, 0) => writeln!(text, "\nEverything reqprof needs is there."),
        (0, n) => writeln!(text, "\nEverything reqprof needs is there; {n} thing(s) could be better."),
        (n, _) => writeln!(text, "\n{n} thing(s) that reqprof needs are missing."),
    };
    text
}

pub(super) fn json(checks: &[Check]) -> Result<String, CliError> {
    let ok = checks.iter().all(|c| c.level != Level::Fail);
    let value = serde_json::json!({ "ok": ok, "checks": checks });
    match serde_json::to_string_pretty(&value) {
        Ok(text) => Ok(text + "\n"),
        Err(e) => Err(CliError::runtime(format!("cannot write JSON: {e}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checks() -> Vec<Check> {
        let check = |name: &'static str, level, remedy: Option<&str>| Check {
            name: name.into(),
            level,
            finding: "found".into(),
            remedy: remedy.map(str::to_owned),
        };
        vec![check("a", Level::Ok, None), check("long", Level::Fail, Some("mend it"))]
    }

    #[test]
    fn the_table_lines_up_and_names_the_remedy() {
        let plain = anstream::adapter::strip_str(&table(&checks())).to_string();
        assert_eq!(
            plain,
            "ok    a     found\nfail  long  found\n            remedy: mend it\n\n1 thing(s) that reqprof needs are missing.\n"
        );
    }

    #[test]
    fn json_says_the_same() {
        let value: serde_json::Value = serde_json::from_str(&json(&checks()).expect("JSON")).expect("JSON");
        assert_eq!(value["ok"], false);
        assert_eq!(value["checks"][1]["status"], "fail");
        assert_eq!(value["checks"][1]["remedy"], "mend it");
        assert!(value["checks"][0]["remedy"].is_null());
    }
}
