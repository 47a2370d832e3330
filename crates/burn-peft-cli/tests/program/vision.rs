//! Models of images through the program.

use crate::{Desk, logits};
use serde_json::Value;

/// 28 by 28 grey pixels of class 0 to 2: the third from above that is bright.
fn pixels(at: usize) -> Vec<u8> {
    let noise = |i: usize| ((i * 37 + at * 101) % 64) as u8;
    let bright = |i: usize| if i / 28 * 3 / 28 == at % 3 { 150 } else { 0 };
    (0..784).map(|i| noise(i) + bright(i)).collect()
}

/// Idx files, as MNIST comes in.
fn idx(desk: &Desk, name: &str, range: std::ops::Range<usize>) {
    let count = (range.len() as u32).to_be_bytes();
    let side = 28_u32.to_be_bytes();
    let images: Vec<u8> = range.clone().flat_map(pixels).collect();
    let labels: Vec<u8> = range.map(|at| (at % 3) as u8).collect();
    let images = [&[0, 0, 8, 3], &count[..], &side, &side, &images].concat();
    let labels = [&[0, 0, 8, 1], &count[..], &labels].concat();
    for (kind, bytes) in [("images-idx3", images), ("labels-idx1", labels)] {
        std::fs::write(desk.path(&format!("{name}-{kind}-ubyte")), bytes).expect("writes");
    }
}

/// A folder for each class, in other words than numbers.
fn folders(desk: &Desk, name: &str, range: std::ops::Range<usize>) {
    for at in range {
        let folder = desk.path(name).join(["above", "middle", "below"][at % 3]);
        std::fs::create_dir_all(&folder).expect("makes a folder");
        let image = image::GrayImage::from_raw(28, 28, pixels(at)).expect("is as large");
        image.save(folder.join(format!("{at:03}.png"))).expect("writes");
    }
}

fn desk() -> Desk {
    let desk = Desk::new();
    idx(&desk, "train", 0..60);
    idx(&desk, "test", 60..81);
    desk
}

const LOOK: &str = "train --train-file /train-images-idx3-ubyte --learning-rate 1e-2 \
    --per-device-train-batch-size 8 --seed 3 --overwrite --output-dir /out";
const TEST: &str = "--test-file /test-images-idx3-ubyte";

fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("is JSON")
}

#[test]
fn models_of_images_are_trained_evaluated_merged_and_asked() {
    let desk = desk();
    for model in ["vit", "dinov2"] {
        let (eval, adapter) =
            (format!("eval --model @models/{model} {TEST}"), "--adapter /out --laplace");
        desk.good(&format!(
            "{LOOK} --model @models/{model} {TEST} --target-modules query,value --r 4 \
             --validation-split 0.1 --num-train-epochs 12"
        ));
        let summary = desk.json("out/summary.json");
        let accuracy = |when: &str| summary[when]["accuracy"].as_f64().expect("was measured");
        assert!(accuracy("after") > accuracy("before") && accuracy("after") > 0.8, "{summary}");
        assert_eq!(desk.json("out/labels.json"), serde_json::json!(["0", "1", "2"]));
        assert_eq!(desk.json("out/adapter_config.json")["task_type"], Value::Null);

        let report = json(&desk.good(&format!("{eval} --adapter /out")));
        assert_eq!(report["accuracy"].as_f64(), Some(accuracy("after")));
        desk.good(&format!(
            "laplace --model @models/{model} --adapter /out --train-file /train-images-idx3-ubyte \
             --prior-precision 1"
        ));
        let unsure = json(&desk.good(&format!("{eval} {adapter}")));
        assert!(unsure["loss"].as_f64().is_some_and(f64::is_finite));
        desk.good(&format!(
            "merge --model @models/{model} --adapter /out --output-dir /merged --overwrite"
        ));
        let merged = json(&desk.good(&format!("eval --model /merged {TEST}")));
        assert_eq!(merged["accuracy"], report["accuracy"]);

        let told = desk.good(&format!("predict --model @models/{model} --adapter /out {TEST}"));
        let right = told
            .lines()
            .enumerate()
            .filter(|(at, line)| json(line)["label"].as_str() == Some(&(at % 3).to_string()));
        assert_eq!(told.lines().count(), 21);
        assert_eq!(right.count(), (accuracy("after") * 21.0).round() as usize);

        let inputs = format!("--inputs @models/{model}/golden.safetensors");
        desk.good(&format!("forward --model @models/{model} {inputs} --output /l.safetensors"));
        assert_eq!(logits(&desk, "l.safetensors").len(), 6);
    }
}

#[test]
fn a_folder_for_each_class_and_other_methods() {
    let desk = desk();
    folders(&desk, "pictures", 0..24);
    let look = LOOK.replace("/train-images-idx3-ubyte", "/pictures");
    for (method, more) in [
        (
            "ia3",
            "--target-modules query,value,intermediate.dense --method-option feedforward_modules=[\"intermediate.dense\"]",
        ),
        ("prefix_tuning", "--method-option num_virtual_tokens=3"),
        ("vpt", "--method-option num_virtual_tokens=3"),
        ("bottleneck", "--target-modules .*layer\\.\\d+\\.output --method-option is_parallel=true"),
        ("bitfit", "--target-modules query,value"),
        ("lora", "--target-modules query,value --init-lora-weights eva --init-batches 2"),
    ] {
        desk.good(&format!("{look} --model @models/vit --method {method} {more} --max-steps 4"));
        assert_eq!(desk.json("out/labels.json"), serde_json::json!(["above", "below", "middle"]));
        let ask = "predict --model @models/vit --adapter /out --image /pictures/below/002.png";
        let told = json(&desk.good(ask));
        assert!(told["image"].as_str().is_some_and(|name| name.ends_with("002.png")), "{told}");
    }
    // An image that lies beside the classes has none; it can be asked about, and not learnt from.
    std::fs::copy(desk.path("pictures/below/002.png"), desk.path("pictures/a.png"))
        .expect("copies");
    let ask = "predict --model @models/vit --adapter /out --test-file /pictures";
    assert_eq!(desk.good(ask).lines().count(), 25);
    for (line, says) in [
        (format!("{look} --model @models/vit --target-modules query"), "a.png has no label"),
        (format!("{LOOK} --model @models/vit --max-length 3"), "--max-length is about texts"),
        (format!("{LOOK} --model @models/vit --task causal-lm"), "is for image-classification"),
        (format!("{LOOK} --model @models/bert"), "is not UTF-8"),
        (
            format!(
                "{LOOK} --model @models/vit --method prompt_tuning --method-option num_virtual_tokens=3"
            ),
            "embedding of words",
        ),
        ("predict --model @models/vit --text w1".into(), "model of images"),
        ("predict --model @models/bert --image a.png".into(), "model of texts"),
        ("embed --model @models/vit --text w1 --output /e".into(), "image-classification"),
    ] {
        let output = desk.run(&line);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{line} went well");
        assert!(said.contains(says) && !said.contains("panicked"), "{line}: {said}");
    }
}
