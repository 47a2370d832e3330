//! Training for burn-peft: data, batches and a run on burn-train's learner.

pub mod calibration;
pub mod checkpoint;
pub mod data;
mod error;
mod feed;
pub mod laplace;
mod objectives;
mod optim;
mod options;
mod parts;
pub mod plot;
mod progress;
mod run;
mod sample;
mod silent;
mod tuned;

pub use checkpoint::CHECKPOINT_FOLDER;
pub use error::TrainError;
pub use feed::{Collate, EvalFeed, TrainFeed};
pub use optim::clip;
pub use options::{BestBy, Options, Schedule};
pub use parts::Part;
pub use progress::{Console, Event, MetricsFile, Observer};
pub use run::{Fitted, Run};
pub use sample::Sample;
pub use tuned::{Loss, Objective, Report, Step, StepSettings, Tuned, measure};
