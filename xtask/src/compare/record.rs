//! The committed record of runs, of which the table in docs/ is made.

use super::run::{Desk, Job, Measured};
use super::times::{self, Times};
use crate::failure::Failure;
use crate::places;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

/// Runs and step times, by the names of their files: what was run, and a sum of its settings, so that a
/// recipe that changes takes what was run before it out.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// Where and how they were run, for the head of the table.
    pub(super) note: String,
    runs: BTreeMap<String, Measured>,
    times: BTreeMap<String, Times>,
}

impl Record {
    /// The record at `path`; an empty one if there is none.
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        match std::fs::read_to_string(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            text => serde_json::from_str(&text.map_err(|e| Failure::at(path, e))?)
                .map_err(|e| Failure::at(path, e)),
        }
    }

    /// An empty one with the note of an older one.
    pub(super) fn after(older: &Self) -> Self {
        Self { note: older.note.clone(), ..Self::default() }
    }

    pub(super) fn write(&self, path: &Path) -> Result<(), Failure> {
        places::write(path, format!("{:#}\n", json!(self)).as_bytes())
    }

    /// What a job came to in the output folder or, if it wasn't run there, in an `older` record.
    pub(super) fn run(
        &mut self,
        job: &Job<'_>,
        older: &Self,
        desk: &Desk,
    ) -> Result<Option<Measured>, Failure> {
        let stem = job.stem(desk);
        let run = job.finished(desk)?.or_else(|| older.runs.get(&stem).cloned());
        if let Some(run) = &run {
            self.runs.insert(stem, run.clone());
        }
        Ok(run)
    }

    /// The same for the step times of the job's row.
    pub(super) fn times(
        &mut self,
        job: &Job<'_>,
        older: &Self,
        desk: &Desk,
    ) -> Result<Option<Times>, Failure> {
        let short = times::short(job, None);
        let stem = short.stem(desk);
        let times = times::finished(&short, desk)?.or_else(|| older.times.get(&stem).copied());
        if let Some(times) = times {
            self.times.insert(stem, times);
        }
        Ok(times)
    }
}

#[cfg(test)]
mod tests {
    use super::super::recipe::Recipe;
    use super::super::run::{Side, tests::desk_at};
    use super::super::table::tests::measured;
    use super::*;

    #[test]
    fn runs_go_to_the_record_and_come_from_it_while_their_settings_hold() {
        let folder = tempfile::tempdir().expect("makes a folder");
        let (desk, path) = (desk_at(folder.path()), folder.path().join("compare.json"));
        let recipe = Recipe::sentiment().expect("is a recipe");
        let row = &recipe.rows[0];
        let job = |seed| Job { row, training: recipe.training(row), seed, side: Side::Ours };
        places::make(&folder.path().join("runs")).expect("makes a folder");
        let write = |name, value: serde_json::Value| {
            std::fs::write(job(1).file(&desk, name), value.to_string()).expect("writes");
        };
        assert_eq!(Record::read(&path).expect("is none"), Record::default());
        write("json", json!({"measured": measured(0.75, 0.5)}));

        let mut first = Record::default();
        let none = Record::default();
        assert_eq!(first.run(&job(1), &none, &desk).expect("is read"), Some(measured(0.75, 0.5)));
        assert_eq!(first.run(&job(2), &none, &desk).expect("is none"), None);
        assert_eq!(first.times(&job(1), &none, &desk).expect("is none"), None);
        first.write(&path).expect("writes");
        std::fs::remove_file(job(1).file(&desk, "json")).expect("is there");

        let older = Record::read(&path).expect("is well formed");
        assert_eq!(older, first);
        let mut next = Record::default();
        assert!(next.run(&job(1), &older, &desk).expect("is recorded").is_some());
        let mut other = job(1);
        other.training.insert("max_steps".into(), json!(7));
        assert_eq!(next.run(&other, &older, &desk).expect("is another run"), None);
        assert_eq!(next, first);
    }
}
