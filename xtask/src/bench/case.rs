//! What is measured: a file of cases, the rows of their batches, and where their models lie.

use super::run::Measure;
use crate::assets::MINILM;
use crate::failure::Failure;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const CASES: &str = include_str!("../../bench/cases.json");

/// Counted up when the models that are made change, so that those of before are not taken for them.
const MADE: u32 = 1;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Cases {
    pub(super) settings: Settings,
    pub(super) growth: Growth,
    pub(super) cases: Vec<Case>,
}

/// What holds for all cases.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Settings {
    pub(super) r: usize,
    pub(super) lora_alpha: f64,
    pub(super) learning_rate: f64,
    pub(super) max_grad_norm: f64,
    /// Steps of a process that are made and not counted.
    pub(super) warmup: usize,
    /// Adapters that are made for a model.
    pub(super) adapters: usize,
    /// Rows and tokens of the batch whose rows have adapters of their own.
    pub(super) mixed: [usize; 2],
    /// Tokens of a text that is continued, and how many follow.
    pub(super) prompt: usize,
    pub(super) new_tokens: usize,
}

/// Along what a step's cost is followed.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Growth {
    /// Tokens of the one row of a training step.
    pub(super) tokens: Series,
    /// Rank of the adapter that is trained.
    pub(super) rank: Series,
    /// Adapters in the bank that one is chosen from for a forward pass.
    pub(super) loaded: Series,
}

/// A case at several sizes.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Series {
    /// Name of the case.
    pub(super) case: String,
    /// Its blocks, if not all.
    #[serde(default)]
    pub(super) layers: Option<usize>,
    pub(super) at: Vec<usize>,
    /// Steps of a process that count.
    pub(super) steps: usize,
}

/// A model and a batch.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Case {
    /// What `--cases` and the table call it.
    pub(super) name: String,
    pub(super) what: String,
    /// `config.json` of a model with random weights; MiniLM with its own weights if there is none.
    pub(super) config: Option<Value>,
    pub(super) target_modules: Vec<String>,
    /// Rows of a batch.
    pub(super) batch: usize,
    /// Tokens of its shortest row and of its longest; those between lie evenly.
    pub(super) lengths: [usize; 2],
    /// Steps of a process that count.
    pub(super) steps: usize,
    pub(super) measures: Vec<Measure>,
}

impl Cases {
    /// Those of `xtask/bench/cases.json`.
    pub(super) fn read() -> Result<Self, Failure> {
        serde_json::from_str(CASES).map_err(|e| Failure::new(format!("the cases: {e}")))
    }

    /// The cases of these names in the file's order; all of them if there are no names.
    pub(super) fn select(&self, names: &[String]) -> Result<Vec<&Case>, Failure> {
        let known = |name: &String| self.cases.iter().any(|case| case.name == *name);
        if let Some(unknown) = names.iter().find(|name| !known(name)) {
            let known: Vec<_> = self.cases.iter().map(|case| case.name.as_str()).collect();
            let known = known.join(", ");
            return Err(Failure::new(format!(
                "there is no case `{unknown}`; the cases are {known}"
            )));
        }
        let asked = |case: &&Case| names.is_empty() || names.contains(&case.name);
        Ok(self.cases.iter().filter(asked).collect())
    }
}

impl Series {
    /// The case with the series' blocks and steps.
    pub(super) fn of(&self, cases: &Cases) -> Result<Case, Failure> {
        let names = [self.case.clone()];
        let mut case = cases.select(&names)?.remove(0).clone();
        case.steps = self.steps;
        if let (Some(layers), Some(config)) = (self.layers, &mut case.config) {
            config["num_hidden_layers"] = layers.into();
            case.name = format!("{}-{layers}-layers", case.name);
        }
        Ok(case)
    }
}

impl Case {
    /// Name of the folder of the model and its adapters: whose, and a sum of what they are made of.
    pub(super) fn folder(&self, settings: &Settings) -> String {
        let made = json!({
            "config": self.config, "source": MINILM.sha256, "target_modules": self.target_modules,
            "r": settings.r, "lora_alpha": settings.lora_alpha, "adapters": settings.adapters,
            "made": MADE,
        });
        let sum = Sha256::digest(made.to_string().as_bytes());
        let sum: String = sum.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        format!("{}-{sum}", self.name)
    }

    /// Lengths of the rows that a measure reads.
    pub(super) fn lengths(&self, measure: Measure, settings: &Settings) -> Vec<usize> {
        match measure {
            Measure::Generate => vec![settings.prompt],
            Measure::Mixed => vec![settings.mixed[1]; settings.mixed[0]],
            _ => {
                let ([shortest, longest], last) = (self.lengths, self.batch.max(2) - 1);
                (0..self.batch).map(|row| longest - (longest - shortest) * row / last).collect()
            }
        }
    }

    /// Token ids of rows of these lengths: no padding, and none of the special tokens that stand first in
    /// vocabularies.
    pub(super) fn rows(lengths: &[usize], vocab: usize) -> Vec<Vec<usize>> {
        const FIRST: usize = 1000;
        let id = |row: usize, at: usize| FIRST + (row * 7919 + at * 104_729) % (vocab - FIRST);
        let rows = lengths.iter().enumerate();
        rows.map(|(row, length)| (0..*length).map(|at| id(row, at)).collect()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn an_unknown_case_is_refused_with_those_there_are() {
        let cases = Cases::read().expect("is well formed");
        let names = |names: &[&str]| names.iter().map(|&n| n.to_owned()).collect::<Vec<_>>();
        let error = cases.select(&names(&["minilm", "gpt5"])).expect_err("is no case");
        assert!(
            error.to_string().starts_with("there is no case `gpt5`; the cases are minilm, bert")
        );
        let two = cases.select(&names(&["bert-base", "minilm"])).expect("are cases");
        assert_eq!(
            two.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(),
            ["minilm", "bert-base"]
        );
        assert_eq!(cases.select(&[]).expect("all").len(), cases.cases.len());
    }

    #[test]
    fn cases_have_names_and_models_of_their_own() {
        let cases = Cases::read().expect("is well formed");
        let settings = &cases.settings;
        let names: BTreeSet<_> = cases.cases.iter().map(|case| &case.name).collect();
        assert_eq!(names.len(), cases.cases.len());
        let case = &cases.cases[1];
        let other = Case { target_modules: vec!["query".into()], ..case.clone() };
        assert_ne!(case.folder(settings), other.folder(settings));
        assert!(case.folder(settings).starts_with("bert-base-"));
    }

    #[test]
    fn rows_are_as_long_as_asked_and_differ() {
        let cases = Cases::read().expect("is well formed");
        let minilm = &cases.cases[0];
        let lengths = minilm.lengths(Measure::Lora, &cases.settings);
        assert_eq!((lengths.len(), lengths[0], lengths[31]), (32, 64, 20));
        assert!(lengths.windows(2).all(|two| two[0] >= two[1]));
        let rows = Case::rows(&lengths, 30_522);
        assert!(rows.iter().zip(&lengths).all(|(row, length)| row.len() == *length));
        assert!(rows.iter().flatten().all(|id| (1000..30_522).contains(id)));
        assert_ne!(rows[0][..20], rows[31][..]);
        assert_eq!(minilm.lengths(Measure::Mixed, &cases.settings), [64; 8]);
    }
}
