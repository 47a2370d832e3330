//! Methods by their names, and places by theirs.

use crate::any_model;
use crate::probe::{Probe, serves_linear};
use burn_peft::core::{Method, Sites, Targets, adapt};
use burn_peft::device;
use burn_peft::registry::{ForEach, NAMES, for_each_method};

#[test]
fn every_method_is_found_by_its_name() {
    struct Ask;
    impl burn_peft::registry::Job for Ask {
        type Output = &'static str;
        fn run<T: Method>(self) -> &'static str {
            T::NAME
        }
    }
    for name in NAMES {
        let lower = name.to_lowercase();
        assert_eq!(burn_peft::registry::with_method(&lower, Ask).expect("is listed"), *name);
    }
    let unknown = burn_peft::registry::with_method("nonsense", Ask).expect_err("is not listed");
    assert!(unknown.to_string().contains(NAMES[0]));
}

#[test]
fn targets_that_match_nothing_list_near_names() {
    let model = Probe::new(&device::by_name(device::names()[0]).expect("is in the build"));
    let sites = Sites::of(&model, Some("head"));
    struct Refused<'a>(&'a Sites);
    impl ForEach for Refused<'_> {
        fn visit<T: Method>(&mut self) {
            let asks = |method: &T| method.targets().target_modules.is_some();
            let near = self.0.places().find(|site| T::KINDS.contains(&site.kind));
            let near = near.expect("serves a place").path.rsplit('.').next().expect("has a name");
            let near = if serves_linear::<T>() { "query" } else { near };
            for method in T::samples(&Targets::list(["quary"])).into_iter().filter(asks) {
                let device = self.0.all[0].device().autodiff();
                let said =
                    adapt(self.0, &method, 0, &device).expect_err("matches nothing").to_string();
                assert!(said.contains("`quary`") && said.contains(near), "{said}");
            }
        }
    }
    for_each_method(&mut Refused(&sites));
}

#[test]
fn the_example_runs() {
    any_model::main();
}
