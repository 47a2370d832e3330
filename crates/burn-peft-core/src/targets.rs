//! Which places a method is laid over: HF PEFT's matching rules.

use crate::{Error, Kind, Site, Sites};
use fancy_regex::Regex;
use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

/// The word that stands for every linear layer but the output layer.
pub const ALL_LINEAR: &str = "all-linear";

/// One name or pattern, or a list of names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Names {
    /// A regular expression that must match the whole path, or [`ALL_LINEAR`].
    Pattern(String),
    /// Each is a whole path or the end of one after a dot.
    List(Vec<String>),
}

impl<S: Into<String>> FromIterator<S> for Names {
    fn from_iter<I: IntoIterator<Item = S>>(names: I) -> Self {
        Self::List(names.into_iter().map(Into::into).collect())
    }
}

impl From<&str> for Names {
    fn from(pattern: &str) -> Self {
        Self::Pattern(pattern.to_owned())
    }
}

/// One value or a list of them, as HF PEFT's files allow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One value.
    One(T),
    /// Several.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// The values as a slice.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// The fields of a configuration that say where a method goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    /// Names of the layers to adapt: a list of suffixes, a regular expression, or "all-linear".
    pub target_modules: Option<Names>,
    /// Layers to leave out, by the same rules.
    pub exclude_modules: Option<Names>,
    /// Layers trained whole, as copies; never adapted.
    pub modules_to_save: Option<Vec<String>>,
    /// Only the blocks with these indices.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// Name of the list of blocks, such as "layer"; default: the first number in the path counts.
    pub layers_pattern: Option<OneOrMany<String>>,
}

fn compile(field: &'static str, pattern: &str) -> Result<Regex, Error> {
    Regex::new(pattern)
        .map_err(|e| Error::config(field, format!("`{pattern}` is not a regular expression: {e}")))
}

fn is_match(regex: &Regex, text: &str) -> bool {
    regex.is_match(text).unwrap_or(false)
}

fn is_suffix(path: &str, name: &str) -> bool {
    path == name || path.strip_suffix(name).is_some_and(|rest| rest.ends_with('.'))
}

enum Rule {
    Whole(Regex),
    Suffixes(Vec<String>),
}

impl Rule {
    fn new(field: &'static str, names: &Names) -> Result<Self, Error> {
        Ok(match names {
            Names::Pattern(p) => Self::Whole(compile(field, &format!("^(?:{p})$"))?),
            Names::List(list) => Self::Suffixes(list.clone()),
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Whole(regex) => is_match(regex, path),
            Self::Suffixes(list) => list.iter().any(|name| is_suffix(path, name)),
        }
    }
}

/// How strictly [`Targets::select`] takes names that match nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// Each name must match: what a user types.
    EachName,
    /// At least one place must match: what a file written elsewhere lists.
    Any,
}

impl Targets {
    /// Targets by a list of layer names.
    pub fn list<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self { target_modules: Some(names.into_iter().collect()), ..Self::default() }
    }

    /// The places to adapt, in the model's order.
    ///
    /// # Errors
    /// A pattern that is no regular expression, a name that matches no layer of one of `kinds`,
    /// or no `target_modules` at all.
    pub fn select<'s>(
        &self,
        sites: &'s Sites,
        kinds: &[Kind],
        strictness: Strictness,
    ) -> Result<Vec<&'s Site>, Error> {
        const FIELD: &str = "target_modules";
        let Some(target) = &self.target_modules else {
            return Err(Error::config(FIELD, "is not set; name layers, or use \"all-linear\""));
        };
        let exclude = match &self.exclude_modules {
            Some(names) => Some(Rule::new("exclude_modules", names)?),
            None => None,
        };
        if let (Names::Pattern(pattern), Some(_)) = (target, self.blocks()) {
            let reason = format!(
                "restricts a list of names only, as in HF PEFT; target_modules is `{pattern}`: name \
                 the layers, or write the blocks into the pattern"
            );
            return Err(Error::config("layers_to_transform", reason));
        }
        let saved = self.saved_patterns()?;
        let blocks = self.block_patterns()?;

        let all_linear = matches!(target, Names::Pattern(p) if p.eq_ignore_ascii_case(ALL_LINEAR));
        let rule = if all_linear { None } else { Some(Rule::new(FIELD, target)?) };
        let wanted = |site: &Site| match &rule {
            Some(rule) => rule.matches(&site.path),
            None => site.kind == Kind::Linear && sites.output.as_deref() != Some(&*site.path),
        };
        let adaptable = |site: &&Site| kinds.contains(&site.kind);

        if let (Names::List(list), Strictness::EachName) = (target, strictness) {
            for name in list {
                if !sites.all.iter().filter(adaptable).any(|site| is_suffix(&site.path, name)) {
                    return Err(self.nothing(name, sites, kinds));
                }
            }
        }
        let chosen: Vec<&Site> = sites
            .all
            .iter()
            .filter(adaptable)
            .filter(|site| wanted(site))
            .filter(|site| !exclude.as_ref().is_some_and(|rule| rule.matches(&site.path)))
            .filter(|site| !saved.iter().any(|regex| is_match(regex, &site.path)))
            .filter(|site| self.in_blocks(&blocks, &site.path))
            .collect();
        if chosen.is_empty() && sites.all.iter().filter(adaptable).any(&wanted) {
            let reason = "matches layers, and exclude_modules, modules_to_save, \
                          layers_to_transform or layers_pattern leave none of them";
            return Err(Error::config(FIELD, reason));
        }
        if chosen.is_empty() {
            let asked = match target {
                Names::Pattern(p) => p.clone(),
                Names::List(list) => list.join(", "),
            };
            return Err(self.nothing(&asked, sites, kinds));
        }
        Ok(chosen)
    }

    fn nothing(&self, name: &str, sites: &Sites, kinds: &[Kind]) -> Error {
        let candidates = sites.all.iter().filter(|s| kinds.contains(&s.kind));
        let what = if kinds == [Kind::Linear] { "linear layer" } else { "adaptable layer" };
        Error::no_match("target_modules", name, what, candidates.map(|site| site.path.as_str()))
    }

    fn blocks(&self) -> Option<&[usize]> {
        let blocks = self.layers_to_transform.as_ref().map(OneOrMany::as_slice);
        blocks.filter(|blocks| !blocks.is_empty())
    }

    fn saved_patterns(&self) -> Result<Vec<Regex>, Error> {
        self.modules_to_save
            .iter()
            .flatten()
            .map(|name| compile("modules_to_save", &format!(r"^(^|.*\.){name}($|\..*)")))
            .collect()
    }

    fn block_patterns(&self) -> Result<Vec<Regex>, Error> {
        let patterns = self.layers_pattern.as_ref().map_or(&[][..], OneOrMany::as_slice);
        if patterns.is_empty() {
            return Ok(vec![compile("layers_pattern", r"^.*?\.[^.]*\.(\d+)\.")?]);
        }
        patterns
            .iter()
            .map(|p| compile("layers_pattern", &format!(r"^(?:^|.*?\.){p}\.(\d+)\.")))
            .collect()
    }

    fn in_blocks(&self, patterns: &[Regex], path: &str) -> bool {
        let Some(wanted) = self.blocks() else {
            return true;
        };
        patterns
            .iter()
            .find_map(|regex| regex.captures(path).ok().flatten())
            .and_then(|found| found.get(1)?.as_str().parse::<usize>().ok())
            .is_some_and(|index| wanted.contains(&index))
    }

    /// Places under the names of `modules_to_save`.
    ///
    /// # Errors
    /// A name under which the model has nothing.
    pub fn saved<'s>(
        &self,
        sites: &'s Sites,
        strictness: Strictness,
    ) -> Result<Vec<&'s Site>, Error> {
        let mut chosen: Vec<&Site> = Vec::new();
        for name in self.modules_to_save.iter().flatten() {
            let inside = |site: &&Site| {
                let path = &site.path;
                // A hidden state has no parameters to be trained whole.
                let saved = site.kind != Kind::Hidden;
                saved
                    && (is_suffix(path, name)
                        || path.starts_with(&format!("{name}."))
                        || path.contains(&format!(".{name}.")))
            };
            let mut matched = sites.all.iter().filter(inside).peekable();
            let none = matched.peek().is_none();
            for site in matched {
                // HF PEFT lists names twice at times.
                if !chosen.iter().any(|known| known.path == site.path) {
                    chosen.push(site);
                }
            }
            if none && strictness == Strictness::EachName {
                let paths = sites.all.iter().map(|site| site.path.as_str());
                return Err(Error::no_match("modules_to_save", name, "layer", paths));
            }
        }
        Ok(chosen)
    }
}

/// Looks a path up in `rank_pattern` or `alpha_pattern`: each key is a regular expression for the
/// end of the path after a dot, the first that matches wins.
///
/// # Errors
/// A key that is no regular expression.
pub fn pattern_value<T: Copy>(
    field: &'static str,
    patterns: &IndexMap<String, T>,
    path: &str,
) -> Result<Option<T>, Error> {
    for (key, value) in patterns {
        if is_match(&compile(field, &format!(r"^(.*\.)?({key})$"))?, path) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}
