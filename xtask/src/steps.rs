//! Named steps, run one after another, with a table at the end.

use crate::failure::Failure;
use crate::summary::duration;
use std::time::Instant;

/// One thing to check.
#[derive(Debug)]
pub(crate) struct Step {
    /// What `--only` and `--skip` call it.
    pub(crate) name: &'static str,
    /// What it does.
    pub(crate) what: &'static str,
    /// Does it.
    pub(crate) run: fn() -> Result<(), Failure>,
}

/// The steps that are asked for: those of `only`, or all, less those of `skip`.
pub(crate) fn select<'a>(
    steps: &'a [Step],
    only: &[String],
    skip: &[String],
) -> Result<Vec<&'a Step>, Failure> {
    let known = |name: &&String| !steps.iter().any(|step| step.name == name.as_str());
    if let Some(name) = only.iter().chain(skip).find(known) {
        let names: Vec<_> = steps.iter().map(|step| step.name).collect();
        let names = names.join(", ");
        return Err(Failure::new(format!("there is no step `{name}`; the steps are {names}")));
    }
    let asked = |list: &[String], step: &Step| list.iter().any(|name| name == step.name);
    let chosen = |step: &&Step| (only.is_empty() || asked(only, step)) && !asked(skip, step);
    Ok(steps.iter().filter(chosen).collect())
}

/// Runs all of them, whatever fails, and says how they ended.
pub(crate) fn run(steps: &[&Step]) -> Result<(), Failure> {
    let mut ended = Vec::new();
    for step in steps {
        println!("\n==> {}: {}", step.name, step.what);
        let start = Instant::now();
        let done = (step.run)();
        let time = duration(start.elapsed().as_secs_f64());
        match &done {
            Ok(()) => println!("==> {} passed in {time}", step.name),
            Err(failure) => println!("==> {} failed after {time}: {failure}", step.name),
        }
        ended.push((step.name, done, time));
    }
    println!();
    for (name, done, time) in &ended {
        println!("{name:<12}{:<8}{time}", if done.is_ok() { "passed" } else { "FAILED" });
    }
    let failed = ended.iter().filter(|(_, done, _)| done.is_err()).count();
    println!("{} passed, {failed} failed", ended.len() - failed);
    match failed {
        0 => Ok(()),
        1 => Err(Failure::new("a step failed")),
        _ => Err(Failure::new(format!("{failed} steps failed"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEPS: &[Step] = &[
        Step { name: "one", what: "goes well", run: || Ok(()) },
        Step { name: "two", what: "fails", run: || Err(Failure::new("no")) },
        Step { name: "three", what: "goes well", run: || Ok(()) },
    ];

    fn chosen(only: &[&str], skip: &[&str]) -> Vec<&'static str> {
        let own = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let steps = select(STEPS, &own(only), &own(skip)).expect("are steps");
        steps.iter().map(|step| step.name).collect()
    }

    #[test]
    fn only_and_skip_choose_and_keep_the_order() {
        assert_eq!(chosen(&[], &[]), ["one", "two", "three"]);
        assert_eq!(chosen(&["three", "one"], &[]), ["one", "three"]);
        assert_eq!(chosen(&[], &["two"]), ["one", "three"]);
        assert_eq!(chosen(&["one", "two"], &["two"]), ["one"]);
    }

    #[test]
    fn an_unknown_step_is_refused_with_the_names_there_are() {
        let error = select(STEPS, &[], &["four".into()]).expect_err("is no step");
        assert_eq!(error.to_string(), "there is no step `four`; the steps are one, two, three");
    }

    #[test]
    fn one_failure_fails_the_whole() {
        assert!(run(&[&STEPS[0], &STEPS[2]]).is_ok());
        assert!(run(&[&STEPS[1], &STEPS[2]]).is_err());
    }
}
