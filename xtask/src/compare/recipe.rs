//! What is trained and how: a file that our side and Python's read alike.

use crate::failure::Failure;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The recipes of the tasks.
const SENTIMENT: &str = include_str!("../../compare/sentiment.json");
const IMAGES: &str = include_str!("../../compare/images.json");

/// All rows of a task's table.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Recipe {
    /// Options of `burn-peft train` that hold for all rows, by name.
    pub(crate) training: Map<String, Value>,
    pub(crate) rows: Vec<Row>,
}

/// One row of the table: a method with its options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Row {
    /// What the table and `--methods` call it.
    pub(crate) name: String,
    /// What it stands beside.
    pub(crate) family: String,
    /// The method's name in the registry.
    pub(crate) method: String,
    /// Who trains the same in Python: HF PEFT's configuration class, or a function of interop/references.py.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) reference: Option<String>,
    /// Layers to adapt; none for methods that have but one place to go.
    #[serde(default)]
    pub(crate) target_modules: Vec<String>,
    /// Fields of `adapter_config.json`.
    pub(crate) options: Map<String, Value>,
    /// Options of `burn-peft train` that hold for this row alone.
    pub(crate) training: Map<String, Value>,
    /// Optimizer steps of a timing, for plans that need more than the usual few; says nothing about a run.
    #[serde(default, skip_serializing)]
    pub(crate) timed_steps: Option<usize>,
}

impl Recipe {
    /// That of the task "sentiment".
    pub(crate) fn sentiment() -> Result<Self, Failure> {
        Self::read(SENTIMENT)
    }

    /// That of the task "images".
    pub(crate) fn images() -> Result<Self, Failure> {
        Self::read(IMAGES)
    }

    fn read(text: &str) -> Result<Self, Failure> {
        serde_json::from_str(text).map_err(|e| Failure::new(format!("the recipe: {e}")))
    }

    /// The rows of these names in the recipe's order; all of them if there are no names.
    pub(crate) fn select(&self, names: &[String]) -> Result<Vec<&Row>, Failure> {
        if let Some(unknown) = names.iter().find(|name| !self.rows.iter().any(|r| r.name == **name))
        {
            let known: Vec<_> = self.rows.iter().map(|row| row.name.as_str()).collect();
            let known = known.join(", ");
            return Err(Failure::new(format!("there is no row `{unknown}`; the rows are {known}")));
        }
        let asked = |row: &&Row| names.is_empty() || names.contains(&row.name);
        Ok(self.rows.iter().filter(asked).collect())
    }

    /// The options of `burn-peft train` for a row: its own over those of all.
    pub(crate) fn training(&self, row: &Row) -> Map<String, Value> {
        let mut training = self.training.clone();
        training.extend(row.training.clone());
        training
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// The table that a test of the registry writes.
    const METHODS: &str = include_str!("../../../docs/methods.md");

    #[test]
    fn every_registered_method_has_a_row() {
        let cells = |line: &str| -> Vec<String> {
            line.split('|').skip(1).map(|cell| cell.trim().to_owned()).collect()
        };
        let (_, table) = METHODS.split_once("<!-- The table").expect("has a table");
        let (table, _) = table.split_once("<!-- end of the table").expect("ends");
        let mut table = table.lines().filter(|line| line.starts_with('|')).map(cells);
        let first = table.next().expect("has a first line");
        let format = first.iter().position(|cell| cell == "HF format").expect("says what HF has");
        let registered: Vec<(String, bool)> =
            table.skip(1).map(|row| (row[0].to_lowercase(), row[format] == "yes")).collect();
        assert!(registered.len() >= 35, "{registered:?}");
        let recipe = Recipe::sentiment().expect("is a recipe");
        for (method, in_hf_format) in &registered {
            let own: Vec<_> = recipe.rows.iter().filter(|row| row.method == *method).collect();
            assert!(!own.is_empty(), "{method} has no row in sentiment.json");
            for row in own {
                let peft = row.reference.iter().any(|name| name.ends_with("Config"));
                assert!(!peft || *in_hf_format, "{}: HF PEFT has no such", row.name);
            }
        }
        for row in recipe.rows.iter().chain(&Recipe::images().expect("is a recipe").rows) {
            assert!(registered.iter().any(|(method, _)| *method == row.method), "{}", row.method);
        }
    }

    #[test]
    fn a_reference_is_a_class_of_peft_or_a_function_there_is() {
        const REFERENCES: &str = include_str!("../../../interop/references.py");
        let recipe = Recipe::sentiment().expect("is a recipe");
        for row in &recipe.rows {
            let there = |name: &String| {
                name.ends_with("Config") || REFERENCES.contains(&format!("\ndef {name}("))
            };
            assert!(row.reference.iter().all(there), "{}: {:?}", row.name, row.reference);
        }
    }

    #[test]
    fn rows_have_names_of_their_own_and_stand_by_family() {
        for recipe in [Recipe::sentiment(), Recipe::images()] {
            let recipe = recipe.expect("is a recipe");
            let names: BTreeSet<_> = recipe.rows.iter().map(|row| &row.name).collect();
            assert_eq!(names.len(), recipe.rows.len());
            let mut families: Vec<_> = recipe.rows.iter().map(|row| &row.family).collect();
            families.dedup();
            let once: BTreeSet<_> = families.iter().collect();
            assert_eq!(once.len(), families.len(), "{families:?}");
            assert!(recipe.rows.iter().all(|row| row.training.contains_key("learning_rate")));
        }
    }

    #[test]
    fn a_row_lays_its_options_over_those_of_all() {
        let recipe = Recipe::read(
            r#"{"training": {"max_steps": 9, "weight_decay": 0.1}, "rows": [{
                "name": "a", "family": "f", "method": "m", "target_modules": ["query"],
                "options": {}, "training": {"weight_decay": 0.0}}]}"#,
        );
        let recipe = recipe.expect("is a recipe");
        let training = Value::Object(recipe.training(&recipe.rows[0]));
        assert_eq!(training, serde_json::json!({"max_steps": 9, "weight_decay": 0.0}));
        assert!(Recipe::read(r#"{"training": {}, "rows": [], "more": 1}"#).is_err());
    }

    #[test]
    fn an_unknown_name_is_refused_with_those_there_are() {
        let recipe = Recipe::sentiment().expect("is a recipe");
        let names = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let error = recipe.select(&names(&["lora", "none"])).expect_err("is no row");
        assert!(error.to_string().starts_with("there is no row `none`; the rows are lora,"));
        let two = recipe.select(&names(&["oft", "lora"])).expect("are rows");
        assert_eq!(two.iter().map(|row| row.name.as_str()).collect::<Vec<_>>(), ["lora", "oft"]);
        assert_eq!(recipe.select(&[]).expect("all").len(), recipe.rows.len());
    }
}
