//! What the benchmarks share.

use std::path::Path;

/// Criterion's median of the benchmark of this name (`group/function`), in seconds; none if it did not run.
pub(crate) fn seconds(folder: &Path, name: &str) -> Option<f64> {
    let path = folder.join(name).join("new/estimates.json");
    let text = std::fs::read_to_string(path).ok()?;
    let estimates: serde_json::Value = serde_json::from_str(&text).ok()?;
    Some(estimates["median"]["point_estimate"].as_f64()? / 1e9)
}
