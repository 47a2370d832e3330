//! What is particular to models of images: their data, for every verb.

use crate::args::{PredictArgs, TrainArgs};
use crate::evaluate::{Answers, Reads, Source, size};
use crate::failure::Failure;
use crate::model::{Dinov2, Ready, Vit};
use crate::options::need;
use crate::prepare::{Prepared, held_out, in_the_models_order, with_classes};
use crate::train::{Setup, finish};
use burn_peft::core::{Scope, TensorFile};
use burn_peft::models::{Classifier, Images, Loaded};
use burn_peft::train::data::{
    ClassBatch, ImageExample, Labels, Preprocessor, image_batch, images, read_images,
    read_labelled_images,
};
use burn_peft::train::{Collate, EvalFeed, TrainFeed};
use std::path::Path;
use std::sync::Arc;

type Batch = ClassBatch<Images>;

/// Labelled images with their classes, and how batches are made of them.
struct Labelled {
    count: usize,
    collate: Collate<Batch>,
}

impl Labelled {
    /// Each of which the model can take.
    fn new<M: Classifier<Input = Images>>(
        path: &Path,
        examples: Vec<ImageExample>,
        labels: &Labels,
        preprocessor: &Arc<Preprocessor>,
        model: &M,
        cx: &Scope<'_>,
    ) -> Result<Self, Failure> {
        let id = |example: &ImageExample| labels.of_image(path, example);
        let ids = examples.iter().map(id).collect::<Result<Vec<_>, _>>()?;
        // They are all of one size.
        if let Some(first) = examples.first() {
            model.check(&images(&[first], preprocessor), cx)?;
        }
        let (count, preprocessor) = (examples.len(), preprocessor.clone());
        let make = move |picked: &[usize]| image_batch(&examples, &ids, picked, &preprocessor);
        Ok(Self { count, collate: Arc::new(make) })
    }

    /// An image is as long as another.
    fn lengths(&self) -> Vec<usize> {
        vec![1; self.count]
    }

    fn feed(&self, size: usize) -> EvalFeed<Batch> {
        EvalFeed::new(&self.lengths(), size, self.collate.clone())
    }
}

fn labelled<M: Classifier<Input = Images>>(
    ready: &Ready<M>,
    source: &Source<'_>,
    names: Vec<String>,
) -> Result<EvalFeed<Batch>, Failure> {
    let preprocessor = Arc::new(Preprocessor::load(source.model)?);
    let examples = read_labelled_images(source.path, &preprocessor)?;
    let (labels, overlay) = (Labels { names }, ready.overlay());
    let cx = Scope::new(&overlay);
    let all = Labelled::new(source.path, examples, &labels, &preprocessor, &ready.model, &cx)?;
    Ok(all.feed(source.size))
}

impl Reads for Vit {
    fn labelled(
        ready: &Ready<Self>,
        source: &Source<'_>,
        names: Vec<String>,
    ) -> Result<EvalFeed<Batch>, Failure> {
        labelled(ready, source, names)
    }
}

impl Reads for Dinov2 {
    fn labelled(
        ready: &Ready<Self>,
        source: &Source<'_>,
        names: Vec<String>,
    ) -> Result<EvalFeed<Batch>, Failure> {
        labelled(ready, source, names)
    }
}

pub(crate) fn predict<M: Reads<Input = Images>>(args: &PredictArgs) -> Result<(), Failure> {
    if !args.texts.text.is_empty() {
        return Err(Failure::new("--text: this is a model of images; give --image or --test-file"));
    }
    let size = size(args.texts.per_device_eval_batch_size)?;
    let preprocessor = Preprocessor::load(&args.model.model)?;
    let paths = args.texts.test_file.iter().chain(&args.image);
    let read = paths.map(|path| read_images(path, &preprocessor));
    let parts = read.collect::<Result<Vec<_>, _>>()?;
    if parts.is_empty() {
        return Err(Failure::new("no images: give --image or --test-file"));
    }
    let answers = Answers::<M>::new(args)?;
    // All of one part are of one size.
    for examples in parts.iter().flat_map(|part| part.chunks(size)) {
        let examples: Vec<&ImageExample> = examples.iter().collect();
        let batch = images(&examples, &preprocessor);
        Classifier::check(&answers.ready.model, &batch, &Scope::new(&answers.ready.overlay()))?;
        answers.print("image", examples.iter().map(|example| &*example.name), &batch)?;
    }
    Ok(())
}

/// Refuses what would be passed over in silence.
fn refuse_text(args: &TrainArgs) -> Result<(), Failure> {
    let given = [
        ("text-column", args.text_column.is_some()),
        ("text-pair-column", args.text_pair_column.is_some()),
        ("label-column", args.label_column.is_some()),
        ("max-length", args.max_length.is_some()),
        ("packing", args.packing.is_some()),
        ("text-unit", args.text_unit.is_some()),
    ];
    match given.iter().find(|(_, given)| *given) {
        None => Ok(()),
        Some((option, _)) => Err(Failure::new(format!(
            "--{option} is about texts, and this is a model of images; leave it out"
        ))),
    }
}

pub(crate) fn train<M: Reads<Input = Images>>(setup: &Setup) -> Result<(), Failure> {
    let args = &setup.args;
    refuse_text(args)?;
    let path = need(&args.train_file, "train-file")?;
    let preprocessor = Arc::new(Preprocessor::load(&setup.model)?);
    let read = |path: &Path| read_labelled_images(path, &preprocessor);
    let examples = read(path)?;
    let labels = Labels::of(path, examples.iter().map(|example| &example.label))?;
    let labels = in_the_models_order::<M>(labels, &setup.model)?;
    let valid = args.validation_file.as_deref().map(read).transpose()?.unwrap_or_default();
    let (train, valid) = held_out(setup, path, examples, valid, "images")?;
    let test = args.test_file.as_deref().map(read).transpose()?;

    let (loaded, saved): (Loaded<M>, _) = with_classes(setup, labels.names.len())?;
    let all = |path: &Path, examples: Vec<ImageExample>| {
        Labelled::new(path, examples, &labels, &preprocessor, &loaded.model, &Scope::plain())
    };
    let train = all(path, train)?;
    let valid = all(args.validation_file.as_deref().unwrap_or(path), valid)?;
    let size = setup.options.per_device_eval_batch_size;
    let test = match (&args.test_file, test) {
        (Some(file), Some(test)) => Some(all(file, test)?.feed(size)),
        _ => None,
    };
    finish(
        setup,
        Prepared {
            train: TrainFeed::new(train.lengths(), train.collate, &setup.options),
            valid: valid.feed(size),
            test,
            loaded,
            saved,
            labels: Some(labels.names),
        },
    )
}

/// The numbers of a safetensors file, as a batch.
pub(crate) fn read_pixels(path: &Path) -> Result<Images, Failure> {
    let mut file = TensorFile::open(path)?;
    let shape = file.shape("pixel_values").unwrap_or_default().to_vec();
    let data = file.take_data("pixel_values")?.convert::<f32>();
    let [batch, channels, height, width] = shape[..] else {
        return Err(Failure::new(format!(
            "{}: `pixel_values`: expected shape [batch, channels, height, width], found {shape:?}",
            path.display()
        )));
    };
    let pixels = data.try_to_vec().map_err(|e| {
        Failure::new(format!("{}: `pixel_values`: cannot be read: {e:?}", path.display()))
    })?;
    Ok(Images { pixels, batch, shape: [channels, height, width] })
}
