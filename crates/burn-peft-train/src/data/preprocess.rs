//! What is done to an image before a model reads it, as `preprocessor_config.json` says.

use super::DataError;
use super::error::read_text;
use super::images::Picture;
use super::resample::{Filter, resize};
use serde::Deserialize;
use std::path::Path;

/// One number for both sides, or named ones.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Size {
    Side(usize),
    Named {
        height: Option<usize>,
        width: Option<usize>,
        shortest_edge: Option<usize>,
        longest_edge: Option<usize>,
    },
}

/// One number for all channels, or one for each.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum PerChannel {
    All(f64),
    Each(Vec<f64>),
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Config {
    image_processor_type: Option<String>,
    feature_extractor_type: Option<String>,
    do_resize: Option<bool>,
    size: Option<Size>,
    resample: Option<u8>,
    do_center_crop: Option<bool>,
    crop_size: Option<Size>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f64>,
    do_normalize: Option<bool>,
    image_mean: Option<PerChannel>,
    image_std: Option<PerChannel>,
    do_pad: Option<bool>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// Both sides, whatever the image's proportions.
    Exact([usize; 2]),
    /// The shorter side; the longer one keeps the proportions.
    Shortest(usize),
}

/// Resizes, cuts out the middle, rescales and normalises, each where the model's file asks for it.
#[derive(Debug, Clone)]
pub struct Preprocessor {
    resize: Option<(Target, Filter)>,
    crop: Option<[usize; 2]>,
    scale: f64,
    /// Mean and standard deviation of each channel.
    channels: Vec<(f64, f64)>,
}

/// Sides larger than this are no model's.
const LARGEST: usize = 1 << 14;

impl Preprocessor {
    /// That of a model's folder.
    ///
    /// # Errors
    /// A missing or malformed file, and a step that is not implemented, by its name.
    pub fn load(folder: &Path) -> Result<Self, DataError> {
        let path = folder.join("preprocessor_config.json");
        let text = read_text(&path)?;
        let config: Config = serde_json::from_str(&text)
            .map_err(|e| DataError::file(&path, format!("is not a preprocessor's: {e}")))?;
        Self::of(&config).map_err(|reason| DataError::file(&path, reason))
    }

    fn of(config: &Config) -> Result<Self, String> {
        // What a file leaves out is as its class has it: BiT's, which is DINOv2's, or ViT's.
        let class = config.image_processor_type.as_ref().or(config.feature_extractor_type.as_ref());
        let bit = class.is_some_and(|class| class.starts_with("Bit"));
        if config.do_pad == Some(true) {
            return Err("do_pad: padding is not implemented; expected false".into());
        }
        let resize = match config.do_resize.unwrap_or(true) {
            false => None,
            true => {
                let size = config.size.ok_or("has no `size`; expected one to resize to")?;
                let filter = match config.resample.unwrap_or(if bit { 3 } else { 2 }) {
                    2 => Filter::Bilinear,
                    3 => Filter::Bicubic,
                    other => {
                        return Err(format!(
                            "resample: expected 2 (bilinear) or 3 (bicubic), found {other}"
                        ));
                    }
                };
                Some((target("size", size, bit)?, filter))
            }
        };
        let crop = match (config.do_center_crop.unwrap_or(bit), config.crop_size) {
            (false, _) => None,
            (true, Some(size)) => match target("crop_size", size, false)? {
                Target::Exact(sides) => Some(sides),
                Target::Shortest(_) => {
                    return Err("crop_size: expected height and width, found shortest_edge".into());
                }
            },
            (true, None) => return Err("has no `crop_size`; expected one to cut out".into()),
        };
        let scale = match config.do_rescale.unwrap_or(true) {
            true => config.rescale_factor.unwrap_or(1.0 / 255.0),
            false => 1.0,
        };
        let channels = match config.do_normalize.unwrap_or(true) {
            false => vec![(0.0, 1.0); 3],
            true => {
                let each = |name: &str, numbers: &Option<PerChannel>| match numbers {
                    None => Err(format!("has no `{name}`; expected a number for each channel")),
                    Some(PerChannel::All(number)) => Ok(vec![*number; 3]),
                    Some(PerChannel::Each(numbers)) => Ok(numbers.clone()),
                };
                let mean = each("image_mean", &config.image_mean)?;
                let std = each("image_std", &config.image_std)?;
                if mean.len() != std.len() || ![1, 3].contains(&mean.len()) {
                    let found = [mean.len(), std.len()];
                    return Err(format!(
                        "image_mean and image_std: expected 1 or 3 numbers each, found {found:?}"
                    ));
                }
                mean.into_iter().zip(std).collect()
            }
        };
        let mut numbers = channels.iter().flat_map(|(mean, std)| [*mean, *std]).chain([scale]);
        if !numbers.all(f64::is_finite) || channels.iter().any(|(_, std)| *std == 0.0) {
            return Err("image_std: expected finite numbers other than 0".into());
        }
        Ok(Self { resize, crop, scale, channels })
    }

    /// Resized and cut, still in bytes.
    pub(crate) fn fit(&self, picture: Picture) -> Picture {
        let mut picture = picture;
        if let Some((target, filter)) = self.resize {
            let sides = target.of(picture.sides);
            if sides != picture.sides {
                let pixels =
                    resize(&picture.pixels, picture.sides, picture.channels, sides, filter);
                picture = Picture { pixels, sides, ..picture };
            }
        }
        match self.crop {
            Some(sides) if sides != picture.sides => picture.middle(sides),
            _ => picture,
        }
    }

    /// Appends the numbers of a picture that [fits](Self::fit), `[channels, height, width]`, and returns that
    /// shape.
    pub(crate) fn numbers(&self, picture: &Picture, into: &mut Vec<f32>) -> [usize; 3] {
        for (channel, (mean, std)) in self.channels.iter().enumerate() {
            // A grey picture is the same in all colours.
            let from = channel.min(picture.channels - 1);
            let values = picture.pixels.iter().skip(from).step_by(picture.channels);
            let number = |value: &u8| ((f64::from(*value) * self.scale - mean) / std) as f32;
            into.extend(values.map(number));
        }
        let [height, width] = picture.sides;
        [self.channels.len(), height, width]
    }

    /// The shape that a picture of these sides gets.
    pub(crate) fn sides(&self, sides: [usize; 2]) -> [usize; 2] {
        let resized = self.resize.map_or(sides, |(target, _)| target.of(sides));
        self.crop.unwrap_or(resized)
    }

    /// How many colours it gives on.
    pub(crate) fn colours(&self) -> usize {
        self.channels.len()
    }
}

impl Target {
    fn of(self, [height, width]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Exact(sides) => sides,
            Self::Shortest(side) => {
                let long = |long: usize, short: usize| side.saturating_mul(long) / short.max(1);
                match width <= height {
                    true => [long(height, width), side],
                    false => [side, long(width, height)],
                }
            }
        }
    }
}

fn target(name: &str, size: Size, one_is_shortest: bool) -> Result<Target, String> {
    let found = match size {
        Size::Side(side) if one_is_shortest => Target::Shortest(side),
        Size::Side(side) => Target::Exact([side, side]),
        Size::Named { height: Some(height), width: Some(width), .. } => {
            Target::Exact([height, width])
        }
        Size::Named { shortest_edge: Some(side), longest_edge: None, .. } => Target::Shortest(side),
        Size::Named { .. } => {
            return Err(format!("{name}: expected height and width, or shortest_edge alone"));
        }
    };
    let sides = match found {
        Target::Exact(sides) => sides.to_vec(),
        Target::Shortest(side) => vec![side],
    };
    match sides.iter().find(|side| !(1..=LARGEST).contains(*side)) {
        None => Ok(found),
        Some(side) => Err(format!("{name}: expected sides from 1 to {LARGEST}, found {side}")),
    }
}
