//! What a training run says of itself, as a table.

use crate::failure::Failure;
use serde_json::Value;
use std::path::Path;

/// The lines to print of `summary.json` in an adapter's folder.
pub(crate) fn of(folder: &Path) -> Result<Vec<(&'static str, String)>, Failure> {
    let path = folder.join("summary.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Failure::at(&path, e))?;
    let summary: Value = serde_json::from_str(&text).map_err(|e| Failure::at(&path, e))?;
    Ok(lines(&summary))
}

fn lines(summary: &Value) -> Vec<(&'static str, String)> {
    let number = |path: &str| summary.pointer(path).and_then(Value::as_f64);
    let said = |value: Option<String>| value.unwrap_or_else(|| "not known".into());
    let accuracy =
        |when: &str| said(number(&format!("/{when}/accuracy")).map(|a| format!("{a:.3}")));
    let trained = number("/trainable_parameters").zip(number("/total_parameters"));
    let trained = trained.map(|(trained, total)| {
        format!("{} of {} ({:.2} %)", grouped(trained), grouped(total), 100.0 * trained / total)
    });
    vec![
        ("accuracy before", accuracy("before")),
        ("accuracy after", accuracy("after")),
        ("trained parameters", said(trained)),
        ("training time", said(number("/train_seconds").map(duration))),
        ("peak memory", said(number("/peak_memory_bytes").map(|b| format!("{:.2} GB", b / 1e9)))),
    ]
}

/// A whole number with commas.
pub(crate) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Seconds as one says them.
pub(crate) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 60.0 => format!("{s:.1} s"),
        s => format!("{} min {:02} s", s as u64 / 60, s as u64 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_summary_is_told_and_gaps_are_admitted() {
        let lines = lines(&json!({
            "trainable_parameters": 74_498, "total_parameters": 22_787_714,
            "train_seconds": 185.2, "before": {"accuracy": 0.5}, "after": {"accuracy": 0.7984},
        }));
        let told: Vec<_> = lines.iter().map(|(_, value)| value.as_str()).collect();
        assert_eq!(
            told,
            ["0.500", "0.798", "74,498 of 22,787,714 (0.33 %)", "3 min 05 s", "not known"]
        );
    }
}
