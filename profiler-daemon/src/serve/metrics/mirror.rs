//! Counters whose totals are kept elsewhere.
//!
//! The kernel side counts in per-CPU maps, and the stages in atomics; both are read now and then as absolute values.
//! Prometheus's own counters can only be added to, so these can be set.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, LabelPair, Metric, MetricFamily, MetricType};

/// Label values are names of our own (reasons, stages, probes); this only guards against a mistake.
const MAX_SERIES: usize = 1_000;

/// A family of counters. Clones are the same family.
#[derive(Clone)]
pub(super) struct Mirror {
    desc: Arc<Desc>,
    values: Arc<Mutex<BTreeMap<Vec<String>, f64>>>,
}

impl Mirror {
    pub(super) fn new(name: &str, help: &str, labels: &[&str]) -> Result<Self, prometheus::Error> {
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        let desc = Desc::new(name.to_owned(), help.to_owned(), labels, std::collections::HashMap::new())?;
        Ok(Self { desc: Arc::new(desc), values: Arc::default() })
    }

    /// `labels`: as many values as there are label names.
    pub(super) fn set(&self, labels: &[&str], total: f64) {
        self.update(labels, |value| *value = total);
    }

    pub(super) fn add(&self, labels: &[&str], n: f64) {
        self.update(labels, |value| *value += n);
    }

    fn update(&self, labels: &[&str], change: impl FnOnce(&mut f64)) {
        debug_assert_eq!(labels.len(), self.desc.variable_labels.len());
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let key: Vec<String> = labels.iter().map(|&label| label.to_owned()).collect();
        if values.len() < MAX_SERIES || values.contains_key(&key) {
            change(values.entry(key).or_default());
        }
    }
}

impl Collector for Mirror {
    fn desc(&self) -> Vec<&Desc> {
        vec![&self.desc]
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        let metrics = values.iter().map(|(labels, value)| {
            let mut counter = Counter::default();
            counter.set_value(*value);
            let mut metric = Metric::from_label(pairs(&self.desc.variable_labels, labels));
            metric.set_counter(counter);
            metric
        });
        vec![family(&self.desc, MetricType::COUNTER, metrics.collect())]
    }
}

pub(super) fn pairs(names: &[String], values: &[String]) -> Vec<LabelPair> {
    let pair = |(name, value): (&String, &String)| {
        let mut pair = LabelPair::default();
        pair.set_name(name.clone());
        pair.set_value(value.clone());
        pair
    };
    names.iter().zip(values).map(pair).collect()
}

pub(super) fn family(desc: &Desc, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(desc.fq_name.clone());
    family.set_help(desc.help.clone());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_can_be_set_and_series_are_bounded() {
        let mirror = Mirror::new("x_total", "Help.", &["reason"]).unwrap();
        mirror.set(&["a"], 5.0);
        mirror.set(&["a"], 7.0);
        mirror.add(&["a"], 1.0);
        for n in 0..2_000 {
            mirror.set(&[&n.to_string()], 1.0);
        }
        let families = mirror.collect();
        let metrics = families[0].get_metric();
        assert_eq!(metrics.len(), MAX_SERIES);
        let a = metrics.iter().find(|m| m.get_label()[0].value() == "a").unwrap();
        assert_eq!(a.get_counter().get_value(), 8.0);
    }
}
