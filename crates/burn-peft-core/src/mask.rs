//! The `[MASK]` of a masked language model: what a model says of it, and what reads a class there.

use crate::mark::mark;

/// Marks the module that holds it, and a table of words beside it, as one that a `[MASK]` can be set in front of and read at:
/// by a classifier over an encoder that predicted masked words. It has no parameters; [`Sites`](crate::Sites) finds it,
/// and says it with the [table](crate::Site::mask).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaskPlace {
    /// Number of the `[MASK]` among the words; none where nothing beside the checkpoint names it.
    pub word: Option<usize>,
    /// The tensors that the checkpoint lacks of the transform which stood between the states and the output layer of words;
    /// with all of them the model has it, beside its parameters.
    pub missing: Vec<String>,
}

/// What stands for a word that is not known.
const NONE: &str = "none";

impl MaskPlace {
    /// The type under which a visitor meets it; the names it is met by are the word and what is missing.
    pub(crate) const MARK: &'static str = "Struct:MaskPlace";

    fn names(&self) -> Vec<String> {
        let word = self.word.map_or(NONE.to_owned(), |word| word.to_string());
        [vec![word], self.missing.clone()].concat()
    }

    /// Out of its names.
    pub(crate) fn of(names: Vec<String>) -> Self {
        let mut names = names.into_iter();
        let word = names.next().and_then(|word| word.parse().ok());
        Self { word, missing: names.collect() }
    }
}

mark!(MaskPlace);

/// A `[MASK]` among the tokens that stand in front of a sequence: the input of a classifier's output layer is its state
/// then, in place of what the model reads otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    /// Which of the tokens it is.
    pub column: usize,
    /// Whether its state goes through the frozen transform of the masked language model's head first; the model must
    /// [have it](MaskPlace::missing).
    pub transform: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_all_of_it() {
        for word in [None, Some(103)] {
            for missing in [vec![], vec!["a.weight".to_owned(), "none".to_owned()]] {
                let place = MaskPlace { word, missing };
                assert_eq!(MaskPlace::of(place.names()), place);
            }
        }
    }
}
