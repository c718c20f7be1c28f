//! How whole the stacks of each target come out, as a running daemon says.
//!
//! In: the list of targets from its API, or why there is none. Out: one check for each target that was sampled often enough
//! to tell.

use serde_json::Value;

use super::{Check, Level};
use crate::cli::client::ClientError;

/// Fewer samples tell nothing of a share.
const SAMPLES_MIN: u64 = 100;
/// Whole stacks in a hundred: below, something is amiss.
const WHOLE_MIN: u64 = 99;
/// Processes listed: those with the most samples. A prefork server has many alike.
const TARGETS_MAX: usize = 20;

pub(super) fn checks(targets: Result<Value, ClientError>) -> Vec<Check> {
    let ok = |finding: String| Check { name: "stacks".into(), level: Level::Ok, finding, remedy: None };
    let answer = match targets {
        Ok(answer) => answer,
        Err(error) => return vec![ok(format!("not looked at: {error}"))],
    };
    let list = answer["targets"].as_array().map_or(&[][..], Vec::as_slice);
    let mut sampled: Vec<(u64, &Value)> = list
        .iter()
        .filter_map(|target| Some((target["unwind"]["samples"].as_u64()?, target)))
        .filter(|(samples, _)| *samples >= SAMPLES_MIN)
        .collect();
    if sampled.is_empty() {
        let finding = format!("no target was sampled {SAMPLES_MIN} times inside requests yet");
        return vec![ok(finding)];
    }
    sampled.sort_by_key(|(samples, _)| std::cmp::Reverse(*samples));
    let left_out = sampled.len().saturating_sub(TARGETS_MAX);
    let mut checks: Vec<Check> =
        sampled.iter().take(TARGETS_MAX).map(|(n, target)| check(*n, target)).collect();
    if left_out > 0 {
        checks.push(ok(format!("{left_out} more targets, of fewer samples: see `reqprof targets --json`")));
    }
    checks
}

fn check(samples: u64, target: &Value) -> Check {
    let unwind = &target["unwind"];
    let complete = unwind["complete"].as_u64().unwrap_or(0);
    let tenths = complete * 1000 / samples;
    let mut reasons: Vec<(u64, &str)> = unwind["incomplete"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(reason, n)| Some((n.as_u64()?, reason.as_str())))
        .collect();
    reasons.sort_unstable_by(|one, other| other.cmp(one));
    let mut finding =
        format!("{}.{} % of {samples} reach their outermost function", tenths / 10, tenths % 10);
    if !reasons.is_empty() {
        let listed: Vec<String> = reasons.iter().map(|(n, reason)| format!("{reason} {n}")).collect();
        finding += &format!("; the others end early: {}", listed.join(", "));
    }
    let text = |name: &str| target[name].as_str().unwrap_or("?");
    let name = format!("stacks {} ({})", target["pid"], text("comm").escape_debug());
    let short = complete * 100 < samples * WHOLE_MIN;
    let remedy = short.then(|| remedy(reasons.first().map_or("", |(_, reason)| reason)).to_owned());
    Check { name: name.into(), level: if short { Level::Warn } else { Level::Ok }, finding, remedy }
}

/// What to do where this reason leads.
fn remedy(reason: &str) -> &'static str {
    match reason {
        "no_rule" => "build it with -fasynchronous-unwind-tables, or with frame pointers",
        "no_table" => {
            "keep .eh_frame in its files; code compiled at run time needs frame pointers (node --interpreted-frames-native-stack, \
             java -XX:+PreserveFramePointer)"
        }
        "unmapped" => "wait: what a process maps is read again within 10 s",
        "truncated" => "none is needed: deeper than what is kept, which are the innermost frames",
        "fault" => "give it memory: its stack is swapped out",
        _ => "see docs/troubleshooting.md, stacks that end early",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn target(pid: u32, samples: u64, complete: u64, incomplete: Value) -> Value {
        let unwind =
            json!({"samples": samples, "complete": complete, "guessed": 0, "incomplete": incomplete});
        json!({"pid": pid, "comm": "gunicorn", "unwind": unwind})
    }

    #[test]
    fn whole_stacks_are_well_and_others_have_a_remedy() {
        let list = json!({"targets": [
            target(7, 1000, 995, json!({"unmapped": 5})),
            target(8, 2000, 1200, json!({"no_table": 700, "unmapped": 100})),
            target(9, 99, 0, json!({"fault": 99})),
        ]});
        let checks = checks(Ok(list));
        assert_eq!(checks.len(), 2, "99 samples tell nothing: {checks:?}");
        assert_eq!((checks[0].name.as_ref(), checks[0].level), ("stacks 8 (gunicorn)", Level::Warn));
        assert_eq!(
            checks[0].finding,
            "60.0 % of 2000 reach their outermost function; the others end early: no_table 700, unmapped 100"
        );
        assert!(checks[0].remedy.as_ref().is_some_and(|remedy| remedy.contains(".eh_frame")));
        assert_eq!((checks[1].level, &checks[1].remedy), (Level::Ok, &None));
        assert!(checks[1].finding.starts_with("99.5 % of 1000"), "{checks:?}");
    }

    #[test]
    fn many_targets_are_not_all_listed() {
        let list: Vec<Value> = (0..50).map(|pid| target(pid, 1000, 1000, json!({}))).collect();
        let checks = checks(Ok(json!({ "targets": list })));
        assert_eq!(checks.len(), TARGETS_MAX + 1);
        assert!(checks[TARGETS_MAX].finding.starts_with("30 more targets"), "{checks:?}");
    }

    #[test]
    fn without_a_daemon_or_samples_that_is_said() {
        let url = "http://127.0.0.1:9977".to_owned();
        let none = checks(Err(ClientError::NotRunning { url, reason: "connection refused".into() }));
        assert!(
            none.len() == 1 && none[0].level == Level::Ok && none[0].finding.starts_with("not looked at: ")
        );
        assert!(none[0].finding.contains("127.0.0.1:9977"), "{none:?}");
        let idle = checks(Ok(json!({"targets": [target(7, 3, 3, json!({}))]})));
        assert_eq!(idle[0].finding, "no target was sampled 100 times inside requests yet");
    }

    #[test]
    fn every_reason_of_the_daemon_has_a_word() {
        for reason in crate::unwind::quality::REASONS {
            assert!(!remedy(reason).is_empty());
        }
    }
}
