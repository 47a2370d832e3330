//! Selective methods: a few numbers of the model itself are trained. One file a method; most are a rule by
//! which the numbers are chosen ([`Criterion`]) and nothing more ([`Selective`]).

mod bias_pruning;
mod bitfit;
mod child_tuning;
mod cross_attention;
mod diff_pruning;
mod far;
mod fish_dip;
mod fish_dip_policy;
mod fish_mask;
mod lt_sft;
mod mask;
mod pafi;
mod parameter;
mod sam;
mod selected;
mod selective;
mod spt;
mod threshold_mask;

pub use bias_pruning::{BiasPruning, FirstOrder, Structure};
pub use bitfit::{BitFit, BitFitAdapter};
pub use child_tuning::{Child, ChildMode, ChildTuning};
pub use cross_attention::{CrossAttention, CrossAttentionAdapter};
pub use diff_pruning::{DiffPruning, DiffPruningAdapter};
pub use far::{Far, Nodes};
pub use fish_dip::{FishDip, FishDipAdapter, Picked, Pool};
pub use fish_mask::{FishMask, Fisher};
pub use lt_sft::{Change, LtSft};
pub use mask::{Chosen, Mask};
pub use pafi::{PaFi, Smallest};
pub use parameter::Parameter;
pub use sam::{Hessian, Sam, SecondOrder};
pub use selected::{Entries, SelectedAdapter};
pub use selective::{Criterion, Scored, Selective, highest, mask_of, share};
pub use spt::{Factors, Sensitivity, Spt, SptAdapter};
pub use threshold_mask::{ThresholdMask, ThresholdMaskAdapter};
