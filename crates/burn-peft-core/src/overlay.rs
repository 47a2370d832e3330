//! Which adapters lie over a model, and how strongly.

use crate::Adapter;
use burn::tensor::{Int, Tensor};

/// How strongly an adapter lies over a place.
#[derive(Debug, Clone)]
pub enum Strength<'a> {
    /// `y0 + w·δ` for the whole batch.
    Scale(f64),
    /// `y0 + δ` for these rows of the batch only: indices `[n]` into its first axis. What stands in front of a
    /// sequence knows no rows, and [`Bank::rows`](crate::Bank::rows) refuses it.
    Rows(&'a Tensor<1, Int>),
}

/// One adapter at one place, with its strength.
#[derive(Debug, Clone)]
pub struct Laid<'a> {
    /// The adapter.
    pub adapter: &'a dyn Adapter,
    /// How strongly it counts.
    pub strength: Strength<'a>,
}

/// Which adapters lie over a model: nothing (`()`), adapters, several at once (a tuple), or a
/// selection from a bank.
pub trait Overlay {
    /// Appends what lies at `path`.
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>);

    /// Whether all that it lays anywhere goes [token by token](Adapter::by_token).
    fn by_token(&self) -> bool {
        false
    }

    /// Whether it is the same for all rows of the batch.
    fn rows_alike(&self) -> bool {
        false
    }
}

impl Overlay for () {
    fn at<'a>(&'a self, _path: &str, _laid: &mut Vec<Laid<'a>>) {}

    fn by_token(&self) -> bool {
        true
    }

    fn rows_alike(&self) -> bool {
        true
    }
}

impl<O: Overlay + ?Sized> Overlay for &O {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        (**self).at(path, laid);
    }

    fn by_token(&self) -> bool {
        (**self).by_token()
    }

    fn rows_alike(&self) -> bool {
        (**self).rows_alike()
    }
}

impl<O: Overlay + ?Sized> Overlay for Box<O> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        (**self).at(path, laid);
    }

    fn by_token(&self) -> bool {
        (**self).by_token()
    }

    fn rows_alike(&self) -> bool {
        (**self).rows_alike()
    }
}

impl<O: Overlay> Overlay for Vec<O> {
    fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
        for overlay in self {
            overlay.at(path, laid);
        }
    }

    fn by_token(&self) -> bool {
        self.iter().all(Overlay::by_token)
    }

    fn rows_alike(&self) -> bool {
        self.iter().all(Overlay::rows_alike)
    }
}

macro_rules! tuple {
    ($($name:ident),+) => {
        impl<$($name: Overlay),+> Overlay for ($($name,)+) {
            #[allow(non_snake_case)]
            fn at<'a>(&'a self, path: &str, laid: &mut Vec<Laid<'a>>) {
                let ($($name,)+) = self;
                $($name.at(path, laid);)+
            }

            #[allow(non_snake_case)]
            fn by_token(&self) -> bool {
                let ($($name,)+) = self;
                $($name.by_token())&&+
            }

            #[allow(non_snake_case)]
            fn rows_alike(&self) -> bool {
                let ($($name,)+) = self;
                $($name.rows_alike())&&+
            }
        }
    };
}
tuple!(A);
tuple!(A, B);
tuple!(A, B, C);
tuple!(A, B, C, D);
