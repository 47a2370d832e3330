//! A picture of a run: loss and accuracy over optimizer steps.

use crate::{Event, TrainError};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

const TRAIN: RGBColor = RGBColor(31, 119, 180);
const VALID: RGBColor = RGBColor(214, 39, 40);

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Points = Vec<(f64, f64)>;

/// Draws loss above accuracy as an SVG beside the adapter, written whole or not at all.
///
/// # Errors
/// What the operating system says.
pub fn draw(path: &Path, title: &str, events: &[Event]) -> Result<(), TrainError> {
    let mut train: (Points, Points) = (Vec::new(), Vec::new());
    let mut valid: (Points, Points) = (Vec::new(), Vec::new());
    for event in events {
        match event {
            Event::Train { step, loss, accuracy, .. } => {
                train.0.push((*step as f64, *loss));
                train.1.push((*step as f64, *accuracy));
            }
            Event::Eval { step, loss, accuracy, .. } => {
                valid.0.push((*step as f64, *loss));
                valid.1.push((*step as f64, *accuracy));
            }
            _ => {}
        }
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, (800, 640)).into_drawing_area();
        let (upper, lower) = root.split_vertically(330);
        let drawn = root
            .fill(&WHITE)
            .map_err(|e| e.to_string())
            .and_then(|()| chart(&upper, title, "loss", &train.0, &valid.0, None))
            .and_then(|()| chart(&lower, "", "accuracy", &train.1, &valid.1, Some(1.0)))
            .and_then(|()| root.present().map_err(|e| e.to_string()));
        drawn.map_err(|e| TrainError::checkpoint(path, format!("cannot be drawn: {e}")))?;
    }
    Ok(burn_peft_core::write_atomic(path, svg.as_bytes())?)
}

fn chart(
    area: &Area<'_>,
    title: &str,
    what: &str,
    train: &[(f64, f64)],
    valid: &[(f64, f64)],
    top: Option<f64>,
) -> Result<(), String> {
    let points = || train.iter().chain(valid).filter(|(_, y)| y.is_finite());
    let last = points().map(|(x, _)| *x).fold(1.0, f64::max);
    let high = top.unwrap_or_else(|| points().map(|(_, y)| *y).fold(f64::MIN_POSITIVE, f64::max));
    let low = points().map(|(_, y)| *y).fold(high, f64::min);
    let margin = (high - low).max(1e-3) * 0.08;
    let mut builder = ChartBuilder::on(area);
    builder.margin(12).x_label_area_size(36).y_label_area_size(56);
    if !title.is_empty() {
        builder.caption(title, ("sans-serif", 18));
    }
    let mut chart = builder
        .build_cartesian_2d(0.0..last * 1.02, (low - margin)..(high + margin))
        .map_err(|e| e.to_string())?;
    chart
        .configure_mesh()
        .x_desc("optimizer steps")
        .y_desc(what)
        .light_line_style(WHITE)
        .draw()
        .map_err(|e| e.to_string())?;
    for (name, color, points) in [("training", TRAIN, train), ("validation", VALID, valid)] {
        let points: Points = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
        if points.is_empty() {
            continue;
        }
        let line = LineSeries::new(points.iter().copied(), color.stroke_width(2));
        chart
            .draw_series(line)
            .map_err(|e| e.to_string())?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        let dots = points.iter().map(|point| Circle::new(*point, 3, color.filled()));
        if name == "validation" {
            chart.draw_series(dots).map_err(|e| e.to_string())?;
        }
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(|e| e.to_string())?;
    Ok(())
}
