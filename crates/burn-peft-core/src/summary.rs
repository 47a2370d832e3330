//! What is trained, where, and how much of the whole that is.

use crate::buffer::Count;
use crate::{Adapter, Adapters, Sites, trained_parameters};
use burn::module::Module;
use burn::module::ModuleDisplay;
use std::collections::BTreeMap;
use std::fmt;

/// Trainable and total parameters, and the adapted layers grouped by name.
#[derive(Debug, Clone)]
pub struct Summary {
    /// Parameters that are trained.
    pub trainable: usize,
    /// Parameters of the base model and of the adapters, without the base parameters that trained
    /// copies stand for, as HF PEFT counts them plus the copies.
    pub total: usize,
    groups: Vec<(String, usize, usize)>,
}

impl Summary {
    /// Of adapters over a model with these sites.
    pub fn new<A: Module + ModuleDisplay + Adapter>(sites: &Sites, adapters: &Adapters<A>) -> Self {
        let mut groups: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        let mut counted = Count::default();
        let mut add = |path: &str, suffix: &str, count: usize| {
            let name = format!("{}{suffix}", blocks_as_star(path));
            let group = groups.entry(name).or_default();
            group.0 += 1;
            group.1 += count;
        };
        for (path, adapter) in adapters.iter() {
            add(path, "", counted.more(adapter));
        }
        for (path, copy) in adapters.copies() {
            add(path, " (trained copy)", counted.more(copy));
        }
        let trainable = trained_parameters(adapters);
        Self {
            trainable,
            total: sites.parameters + trainable,
            groups: groups.into_iter().map(|(name, (n, count))| (name, n, count)).collect(),
        }
    }

    /// Trained share in percent.
    pub fn percent(&self) -> f64 {
        100.0 * self.trainable as f64 / self.total.max(1) as f64
    }
}

fn blocks_as_star(path: &str) -> String {
    let star = |part: &str| {
        if part.parse::<usize>().is_ok() { "*".into() } else { part.to_owned() }
    };
    path.split('.').map(star).collect::<Vec<_>>().join(".")
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "trainable {} of {} parameters ({:.3} %)",
            grouped(self.trainable),
            grouped(self.total),
            self.percent()
        )?;
        for (name, layers, count) in &self.groups {
            writeln!(f, "  {name}: {layers} x, {} parameters", grouped(*count))?;
        }
        Ok(())
    }
}
