//! Data: files to examples, examples to tokens, tokens to batches. All of it on the host.

mod batch;
mod causal;
mod error;
mod images;
mod preprocess;
mod resample;
mod split;
mod template;
mod text;
mod tokenize;

pub use batch::{ClassBatch, ClassItem, class_batch, in_order, length_grouped, pad, plain};
pub use causal::{
    CausalBatch, CausalItem, CausalReport, IGNORED, TextUnit, causal_batch, pack, read_causal,
};
pub use error::DataError;
pub use images::{
    ImageExample, data_files, image_batch, images, read_images, read_labelled_images,
};
pub use preprocess::Preprocessor;
pub use split::{hold_out, shuffle};
pub use template::{ChatTemplate, Message};
pub use text::{Columns, Example, Labels, read_labelled, read_texts};
pub use tokenize::{Encoded, TextTokenizer};
