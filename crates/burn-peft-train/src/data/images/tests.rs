#![allow(clippy::unwrap_used)]
use super::*;
use burn_peft_core::TensorFile;
use flate2::{Compression, write::GzEncoder};
use proptest::prelude::*;
use std::io::Write;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn preprocessor(model: &str) -> Preprocessor {
    Preprocessor::load(&fixtures().join("models").join(model)).unwrap()
}

/// Pillow's bytes, and what follows to the rounding of f32: `transformers` rescales and normalises in f32, three
/// operations on numbers below 16.
#[test]
fn images_are_preprocessed_as_by_transformers() {
    for (model, count) in [("vit", 4), ("dinov2", 4)] {
        let preprocessor = preprocessor(model);
        let folder = fixtures().join(format!("vision/preprocessing-{model}"));
        let mut file = TensorFile::open(folder.join("golden.safetensors")).unwrap();
        let names: Vec<String> = file.names().map(str::to_owned).collect();
        let sizes: Vec<&str> = names.iter().filter_map(|n| n.strip_prefix("image.")).collect();
        assert_eq!(sizes.len(), count);
        for size in sizes {
            let (shape, pixels) = file.take_ints(&format!("image.{size}")).unwrap();
            let pixels = pixels.into_iter().map(|value| u8::try_from(value).unwrap()).collect();
            let picture = Picture { pixels, sides: [shape[0], shape[1]], channels: 3 };
            let example = ImageExample::new(size.into(), String::new(), picture, &preprocessor);
            let found = images(&[&example], &preprocessor);
            let expected =
                file.take_data(&format!("pixel_values.{size}")).unwrap().convert::<f32>();
            let expected: Vec<f32> = expected.try_to_vec().unwrap();
            assert_eq!((found.batch, found.shape), (1, [3, 12, 12]));
            let far = found.pixels.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let far = far.max_by(f32::total_cmp).unwrap_or_default();
            assert!(found.pixels.len() == expected.len() && far < 4e-6, "{model} {size}: {far}");
        }
    }
}

fn png(path: &Path, sides: [u32; 2], grey: bool) {
    let value = |x: u32, y: u32| (x * 7 + y * 13) as u8;
    match grey {
        true => image::GrayImage::from_fn(sides[1], sides[0], |x, y| image::Luma([value(x, y)]))
            .save(path)
            .unwrap(),
        false => image::RgbImage::from_fn(sides[1], sides[0], |x, y| {
            image::Rgb([value(x, y), value(y, x), 9])
        })
        .save(path)
        .unwrap(),
    }
}

#[test]
fn a_folder_for_each_class() {
    let folder = tempfile::tempdir().unwrap();
    for class in ["shoe", "bag"] {
        std::fs::create_dir(folder.path().join(class)).unwrap();
    }
    png(&folder.path().join("bag/b.png"), [12, 12], false);
    png(&folder.path().join("bag/a.PNG"), [30, 20], true);
    png(&folder.path().join("shoe/c.png"), [5, 8], false);
    std::fs::write(folder.path().join("bag/notes.txt"), "none").unwrap();
    let preprocessor = preprocessor("dinov2");
    let examples = read_labelled_images(folder.path(), &preprocessor).unwrap();
    let labels: Vec<&str> = examples.iter().map(|example| &*example.label).collect();
    assert_eq!(labels, ["bag", "bag", "shoe"]);
    assert!(examples[0].name.ends_with("a.PNG") && examples[0].fitted && !examples[2].fitted);
    let batch = image_batch(&examples, &[0, 0, 1], &[2, 0], &preprocessor);
    assert_eq!((batch.labels, batch.input.shape), (vec![1, 0], [3, 12, 12]));
    // A grey image is the same in all colours, before the normalisation.
    let grey = images(&[&examples[0]], &preprocessor).pixels;
    let back = |channel: usize, mean: f32, std: f32| grey[channel * 144 + 50] * std + mean;
    assert!((back(0, 0.5, 0.5) - back(2, 0.3, 0.2)).abs() < 1e-6);

    let files = data_files(folder.path()).unwrap();
    assert_eq!(files.len(), 4);
    assert!(files[0].ends_with("bag/a.PNG") && files[3].ends_with("shoe/c.png"), "{files:?}");
    png(&folder.path().join("d.png"), [12, 12], false);
    assert_eq!(read_images(folder.path(), &preprocessor).unwrap().len(), 4);
    let said = read_labelled_images(folder.path(), &preprocessor).unwrap_err().to_string();
    assert!(said.contains("d.png has no label"), "{said}");
}

#[test]
fn idx_files_with_their_labels_packed_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let pixels = [&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4][..], &[7; 24]].concat();
    let labels = [0, 0, 8, 1, 0, 0, 0, 2, 9, 4];
    let pack = |bytes: &[u8]| {
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(bytes).unwrap();
        packed.finish().unwrap()
    };
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("t-images-idx3-ubyte"), &pixels).unwrap();
    std::fs::write(at("t-labels-idx1-ubyte"), labels).unwrap();
    std::fs::write(at("u-images-idx3-ubyte.gz"), pack(&pixels)).unwrap();
    std::fs::write(at("u-labels-idx1-ubyte.gz"), pack(&labels)).unwrap();
    let preprocessor = preprocessor("vit");
    for name in ["t-images-idx3-ubyte", "u-images-idx3-ubyte.gz"] {
        let examples = read_labelled_images(&at(name), &preprocessor).unwrap();
        assert_eq!(examples[1].label, "4");
        assert_eq!(examples[1].name, format!("{name} #1"));
        assert_eq!(examples[1].picture.sides, [3, 4]);
        assert_eq!(data_files(&at(name)).unwrap().len(), 2);
    }
    for (name, bytes, says) in [
        ("a-images-idx3", &pixels[..20], "expected 24 bytes for [2, 3, 4], found 4"),
        ("b-images-idx3", &labels[..], "in 3 dimensions"),
        ("c-images-idx3", &pixels[..6], "c-images-idx3"),
        ("d.png", b"no image", "is not a whole PNG or JPEG image"),
    ] {
        std::fs::write(at(name), bytes).unwrap();
        let said = read_images(&at(name), &preprocessor).unwrap_err().to_string();
        assert!(said.contains(says), "{said} should contain {says}");
    }
    let said = read_images(&at("none"), &preprocessor).unwrap_err().to_string();
    assert!(said.contains("none"), "{said}");
    std::fs::write(at("t-labels-idx1-ubyte"), [0, 0, 8, 1, 0, 0, 0, 1, 9]).unwrap();
    let said = read_images(&at("t-images-idx3-ubyte"), &preprocessor).unwrap_err().to_string();
    assert!(said.contains("expected 2 labels"), "{said}");
}

#[test]
fn steps_that_are_not_there_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("preprocessor_config.json");
    let both = r#""image_mean": [0, 0, 0], "image_std": [1, 1, 1]"#;
    for (said, says) in [
        (format!(r#"{{{both}, "size": 12, "resample": 1}}"#), "resample"),
        (format!(r#"{{{both}, "size": {{"longest_edge": 12}}}}"#), "shortest_edge"),
        (format!(r#"{{{both}, "size": 0}}"#), "from 1 to"),
        (format!(r#"{{{both}}}"#), "has no `size`"),
        (format!(r#"{{{both}, "size": 12, "do_center_crop": true}}"#), "has no `crop_size`"),
        (format!(r#"{{{both}, "size": 12, "do_pad": true}}"#), "do_pad"),
        (r#"{"size": 12, "image_mean": [0.5]}"#.to_owned(), "has no `image_std`"),
        (r#"{"size": 12, "image_mean": 0, "image_std": 0}"#.to_owned(), "other than 0"),
        ("3".to_owned(), "is not a preprocessor's"),
    ] {
        std::fs::write(&path, &said).unwrap();
        let error = Preprocessor::load(folder.path()).unwrap_err().to_string();
        assert!(error.contains(says), "{error} should contain {says}");
    }
    // As ViT's first checkpoints have it, and BiT's.
    std::fs::write(&path, format!(r#"{{{both}, "size": 12}}"#)).unwrap();
    assert_eq!(Preprocessor::load(folder.path()).unwrap().sides([30, 60]), [12, 12]);
    let bit = format!(
        r#"{{{both}, "size": 12, "do_center_crop": false, "image_processor_type": "BitImageProcessor"}}"#
    );
    std::fs::write(&path, bit).unwrap();
    assert_eq!(Preprocessor::load(folder.path()).unwrap().sides([30, 61]), [12, 24]);
}

#[test]
fn the_middle_of_a_small_picture_is_black_around() {
    let picture = Picture { pixels: vec![1, 2, 3, 4, 5, 6], sides: [2, 3], channels: 1 };
    assert_eq!(picture.middle([1, 2]).pixels, [1, 2]);
    assert_eq!(picture.middle([3, 4]).pixels, [0, 0, 0, 0, 0, 1, 2, 3, 0, 4, 5, 6]);
}

proptest! {
    #[test]
    fn no_bytes_make_a_reader_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200), idx in any::<bool>()
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("images-idx3");
        let begins: &[u8] = if idx { &[0, 0, 8, 3, 0, 0, 0] } else { &[] };
        std::fs::write(&path, [begins, &bytes].concat()).unwrap();
        let _ = read_images(&path, &preprocessor("vit"));
    }
}
