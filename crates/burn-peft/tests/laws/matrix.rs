//! What each method can do, as `docs/methods.md` says it: the table there is this one.

use crate::probe::{Probe, targets};
use burn_peft::core::{Adapter, Kind, Method, Sites, adapt, survey};
use burn_peft::device;
use burn_peft::registry::{ForEach, for_each_method};
use std::path::Path;

const BEGIN: &str =
    "<!-- The table is made by a test: UPDATE_DOCS=1 cargo test --workspace matrix -->\n";
const END: &str = "<!-- end of the table -->";

struct Rows(Vec<String>, Probe);

impl ForEach for Rows {
    fn visit<T: Method>(&mut self) {
        let sites = Sites::of(&self.1, Some("head"));
        let [linear, _] = targets::<T>(&sites);
        let method = T::samples(&linear).pop().expect("every method has a sample");
        let method = survey(method, &sites, &self.1).expect("fits");
        let adapters = adapt(&sites, &method, 0, &sites.all[0].device()).expect("fits");
        let (_, adapter) = adapters.iter().next().expect("adapts something");
        let serves = |kind| if T::KINDS.contains(&kind) { "yes" } else { "" };
        let yes = |is: bool| if is { "yes" } else { "" };
        self.0.push(format!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            T::NAME,
            serves(Kind::Linear),
            serves(Kind::Embedding),
            serves(Kind::Conv1d),
            serves(Kind::Conv2d),
            serves(Kind::Norm),
            serves(Kind::Hidden),
            serves(Kind::Attention),
            serves(Kind::Blocks),
            if method.weight_only() { "dense" } else { "factored" },
            yes(T::fold(adapter).is_some()),
            yes(T::fold(adapter).is_some_and(|fold| !fold.brings_bias())
                && T::KINDS.iter().any(|kind| *kind != Kind::Norm)),
            "yes",
            yes(adapters.iter().all(|(_, adapter)| adapter.virtual_tokens() == 0)),
            "yes",
            yes(T::HF_FORMAT),
        ));
    }
}

#[test]
fn the_capability_matrix_is_the_documents() {
    let device = device::by_name(device::names()[0]).expect("is in the build");
    let mut rows = Rows(Vec::new(), Probe::new(&device));
    for_each_method(&mut rows);
    rows.0.sort();
    let head = "| method | linear | embedding | conv1d | conv2d | norm | hidden | attention | blocks | forward | merge | convertible | mix | rows | quantized base | HF format |\n\
                |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n";
    let table = format!("{head}{}\n", rows.0.join("\n"));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/methods.md");
    let text = std::fs::read_to_string(&path).expect("is committed");
    let (before, rest) = text.split_once(BEGIN).expect("has the mark before the table");
    let (found, after) = rest.split_once(END).expect("has the mark after the table");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        let text = format!("{before}{BEGIN}{table}{END}{after}");
        std::fs::write(&path, text).expect("is writable");
    } else {
        assert_eq!(found, table, "run UPDATE_DOCS=1 cargo test --workspace matrix");
    }
}
