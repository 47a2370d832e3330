//! Data: files to examples, examples to tokens, tokens to batches. All of it on the host.

mod batch;
mod causal;
mod error;
mod images;
mod preprocess;
mod resample;
mod seq2seq;
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
pub use seq2seq::{Seq2SeqBatch, Seq2SeqItem, read_seq2seq, seq2seq_batch};
pub use split::{hold_out, shuffle};
pub use template::{ChatTemplate, Message};
pub use text::{Columns, Example, Labels, read_labelled, read_texts};
pub use tokenize::{Encoded, TextTokenizer};
