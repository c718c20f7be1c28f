//! OpenMetrics 1.0 text, which unlike Prometheus's own can carry exemplars.
//!
//! Differences that matter: a counter's family has no `_total` in its name, numbers of buckets are written as floats,
//! and the text ends with `# EOF`.

use std::fmt::Write;

use prometheus::proto::{Metric, MetricFamily, MetricType};

use super::histogram::{Exemplar, Exemplars, LABELS, NAME};

/// `exemplars` belong to the family [`NAME`], their labels in the order of the metric's.
pub(super) fn encode(families: &[MetricFamily], exemplars: &Exemplars) -> String {
    let mut out = String::new();
    for family in families {
        let (kind, name) = match family.get_field_type() {
            MetricType::COUNTER => ("counter", family.name().strip_suffix("_total").unwrap_or(family.name())),
            MetricType::HISTOGRAM => ("histogram", family.name()),
            // Summaries and untyped metrics are not used here.
            _ => ("gauge", family.name()),
        };
        line(&mut out, format_args!("# TYPE {name} {kind}"));
        line(&mut out, format_args!("# HELP {name} {}", escape(family.help())));
        for metric in family.get_metric() {
            match kind {
                "counter" => {
                    let (labels, value) = (labels(metric, None), number(metric.get_counter().get_value()));
                    line(&mut out, format_args!("{name}_total{labels} {value}"));
                }
                "histogram" => histogram(&mut out, name, metric, exemplars),
                _ => {
                    let (labels, value) = (labels(metric, None), number(metric.get_gauge().get_value()));
                    line(&mut out, format_args!("{name}{labels} {value}"));
                }
            }
        }
    }
    out.push_str("# EOF\n");
    out
}

fn histogram(out: &mut String, name: &str, metric: &Metric, exemplars: &Exemplars) {
    let value_of = |wanted| {
        let pair = metric.get_label().iter().find(|pair| pair.name() == wanted);
        pair.map(|pair| pair.value().to_owned()).unwrap_or_default()
    };
    let own = if name == NAME { exemplars.get(&LABELS.map(value_of)) } else { None };
    let data = metric.get_histogram();
    let everything = (f64::INFINITY, data.get_sample_count());
    let buckets =
        data.get_bucket().iter().map(|b| (b.upper_bound(), b.cumulative_count())).chain([everything]);
    for (i, (bound, count)) in buckets.enumerate() {
        let labels = labels(metric, Some(bound));
        let exemplar = own.and_then(|own| own.get(i)?.as_ref()).map(exemplar).unwrap_or_default();
        line(out, format_args!("{name}_bucket{labels} {count}{exemplar}"));
    }
    let labels = labels(metric, None);
    line(out, format_args!("{name}_count{labels} {}", data.get_sample_count()));
    line(out, format_args!("{name}_sum{labels} {}", number(data.get_sample_sum())));
}

fn exemplar(e: &Exemplar) -> String {
    let trace = e.trace_id.as_ref().map(|id| format!("trace_id=\"{}\",", escape(id))).unwrap_or_default();
    let id = escape(&e.request_id);
    format!(" # {{{trace}request_id=\"{id}\"}} {} {:.3}", number(e.seconds), e.timestamp)
}

fn labels(metric: &Metric, bound: Option<f64>) -> String {
    let mut pairs: Vec<String> =
        metric.get_label().iter().map(|p| format!("{}=\"{}\"", p.name(), escape(p.value()))).collect();
    if let Some(bound) = bound {
        pairs.push(format!("le=\"{}\"", number(bound)));
    }
    if pairs.is_empty() { String::new() } else { format!("{{{}}}", pairs.join(",")) }
}

/// With a decimal point or an exponent always, as the specification wants of bucket bounds.
fn number(n: f64) -> String {
    if n == f64::INFINITY {
        "+Inf".to_owned()
    } else if n == f64::NEG_INFINITY {
        "-Inf".to_owned()
    } else {
        format!("{n:?}")
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"")
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_follow_the_specification() {
        assert_eq!(number(1.0), "1.0");
        assert_eq!(number(0.005), "0.005");
        assert_eq!(number(f64::INFINITY), "+Inf");
        assert_eq!(number(1_099_511_627_776.0), "1099511627776.0");
        assert_eq!(escape("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
