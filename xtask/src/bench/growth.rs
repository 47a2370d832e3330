//! `cargo xtask bench --growth`: what becomes of time and memory as tokens, rank and loaded adapters grow.

use super::case::{Case, Cases, Series};
use super::run::{Desk, Made, Measure};
use super::table::{bytes, median, seconds};
use crate::failure::Failure;
use crate::places;
use plotters::prelude::*;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::Write as _;

/// What grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Axis {
    Tokens,
    Rank,
    Loaded,
}

impl Axis {
    fn title(self) -> &'static str {
        match self {
            Self::Tokens => "a LoRA step, by tokens of its row",
            Self::Rank => "a LoRA step, by rank",
            Self::Loaded => "a forward pass, by adapters that are loaded",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Tokens => "tokens",
            Self::Rank => "rank",
            Self::Loaded => "adapters",
        }
    }
}

/// A case at one size.
struct Point {
    at: usize,
    /// Operations of its products, where they are counted.
    flops: f64,
    seconds: Vec<f64>,
    bytes: Vec<f64>,
}

impl Point {
    fn time(&self) -> Option<f64> {
        median(self.seconds.clone())
    }

    fn memory(&self) -> Option<f64> {
        median(self.bytes.clone())
    }
}

/// A case at all sizes.
struct Line {
    axis: Axis,
    what: String,
    points: Vec<Point>,
}

/// Everything that a point needs to be measured.
struct Task {
    case: Case,
    desk: Desk,
    made: Made,
    lengths: Vec<usize>,
    loaded: Option<usize>,
}

/// Measures all series, round by round, and tells.
pub(super) fn run(desk: &Desk, cases: &Cases, rounds: usize) -> Result<(), Failure> {
    let growth = &cases.growth;
    let all = [
        (Axis::Tokens, &growth.tokens),
        (Axis::Rank, &growth.rank),
        (Axis::Loaded, &growth.loaded),
    ];
    let mut lines = Vec::new();
    let mut tasks = Vec::new();
    for (axis, series) in all {
        let (line, own) = plan(axis, series, cases, desk)?;
        lines.push(line);
        tasks.push(own);
    }
    for round in 0..rounds {
        for (line, own) in lines.iter_mut().zip(&tasks) {
            for (point, task) in line.points.iter_mut().zip(own) {
                print!("{:<46}{:<6}", line.axis.title(), point.at);
                let _ = std::io::stdout().flush();
                let Task { case, desk, made, lengths, loaded } = task;
                let run = desk.grown(case, made, lengths, *loaded, round)?;
                let step = median(run.step_seconds.clone());
                println!("{}", seconds(step.unwrap_or(f64::NAN)));
                point.seconds.extend(run.step_seconds);
                point.bytes.extend(run.peak_memory_bytes.map(|bytes| bytes as f64));
            }
        }
        places::write(&desk.output.join("growth.md"), markdown(&lines).as_bytes())?;
        let told = format!("{:#}\n", told(&lines));
        places::write(&desk.output.join("growth.json"), told.as_bytes())?;
        places::write(&desk.output.join("growth.svg"), svg(&lines)?.as_bytes())?;
    }
    println!("\n{}\nTable and picture in {}", markdown(&lines), desk.output.display());
    Ok(())
}

/// A series' points, and what measures them.
fn plan(
    axis: Axis,
    series: &Series,
    cases: &Cases,
    desk: &Desk,
) -> Result<(Line, Vec<Task>), Failure> {
    let case = series.of(cases)?;
    let (mut points, mut tasks) = (Vec::new(), Vec::new());
    for &at in &series.at {
        let mut desk = desk.clone();
        if axis == Axis::Rank {
            // As strong at every rank, so that the step is the same but for its size.
            desk.settings.lora_alpha *= at as f64 / desk.settings.r as f64;
            desk.settings.r = at;
        }
        let made = desk.made(&case)?;
        let (lengths, measure) = match axis {
            Axis::Tokens => (vec![at], Measure::Lora),
            Axis::Rank => (case.lengths(Measure::Lora, &desk.settings), Measure::Lora),
            Axis::Loaded => (case.lengths(Measure::Forward, &desk.settings), Measure::Forward),
        };
        let targets = &case.target_modules;
        let flops = made.shape.step(measure, &lengths, targets, desk.settings.r, 0);
        points.push(Point { at, flops, seconds: Vec::new(), bytes: Vec::new() });
        let loaded = (axis == Axis::Loaded).then_some(at);
        tasks.push(Task { case: case.clone(), desk, made, lengths, loaded });
    }
    Ok((Line { axis, what: case.what, points }, tasks))
}

/// Times of the first point's.
fn times(of: Option<f64>, first: Option<f64>) -> String {
    of.zip(first).map_or_else(String::new, |(of, first)| format!("{:.2}", of / first))
}

fn markdown(lines: &[Line]) -> String {
    let mut text = String::new();
    for Line { axis, what, points } in lines {
        let Some(first) = points.first() else { continue };
        let _ = write!(text, "### {}: {what}\n\n", axis.title());
        // What grows with its tokens is told by the token.
        let by = |point: &Point| if *axis == Axis::Tokens { point.at as f64 } else { 1.0 };
        let each = if *axis == Axis::Tokens { "time a token" } else { "time" };
        let _ = writeln!(
            text,
            "| {} | time | {each}, of the first | arithmetic, likewise | peak memory | more, a unit |\n|---|---|---|---|---|---|",
            axis.unit()
        );
        let mut before: Option<&Point> = None;
        for point in points {
            let time = point.time();
            let share =
                times(time.map(|time| time / by(point)), first.time().map(|time| time / by(first)));
            let arithmetic = (point.flops / by(point)) / (first.flops / by(first));
            let more = before.and_then(|before| {
                let grown = point.memory()? - before.memory()?;
                Some(bytes(grown.max(0.0) / (point.at - before.at) as f64))
            });
            let _ = writeln!(
                text,
                "| {} | {} | {share} | {arithmetic:.2} | {} | {} |",
                point.at,
                time.map(seconds).unwrap_or_default(),
                point.memory().map(bytes).unwrap_or_default(),
                more.unwrap_or_default(),
            );
            before = Some(point);
        }
        text.push('\n');
    }
    text
}

fn told(lines: &[Line]) -> Value {
    let point = |point: &Point| {
        json!({
            "at": point.at, "flops": point.flops, "step_seconds": point.seconds,
            "peak_memory_bytes": point.bytes,
        })
    };
    let line = |line: &Line| {
        let points: Value = line.points.iter().map(point).collect();
        json!({"series": line.axis.title(), "model": line.what, "points": points})
    };
    lines.iter().map(line).collect()
}

/// Time and memory of each series: what was measured, and what its first point would grow to by its
/// arithmetic alone.
fn svg(lines: &[Line]) -> Result<String, Failure> {
    let mut svg = String::new();
    {
        let size = (1000, 300 * lines.len() as u32);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = draw(&root, lines);
        drawn.map_err(|e| Failure::new(format!("the picture cannot be drawn: {e}")))?;
    }
    Ok(svg)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

const TIME: RGBColor = RGBColor(31, 119, 180);
const ARITHMETIC: RGBColor = RGBColor(127, 127, 127);
const MEMORY: RGBColor = RGBColor(214, 39, 40);

fn draw(root: &Area<'_>, lines: &[Line]) -> Drawn {
    root.fill(&WHITE)?;
    for (line, area) in lines.iter().zip(root.split_evenly((lines.len(), 1))) {
        let (left, right) = area.split_horizontally(500);
        let at = |of: fn(&Point) -> Option<f64>, unit: f64| -> Vec<(f64, f64)> {
            let point = |point: &Point| Some((point.at as f64, of(point)? * unit));
            line.points.iter().filter_map(point).collect()
        };
        let measured = at(Point::time, 1e3);
        let first = line.points.first().zip(measured.first());
        let floor = first.map(|(first, (_, time))| {
            let grown = |point: &Point| (point.at as f64, time * point.flops / first.flops);
            line.points.iter().map(grown).collect::<Vec<_>>()
        });
        let title = line.axis.title();
        let floor = floor.unwrap_or_default();
        let series: [Drawing<'_>; 2] =
            [(TIME, "ms", &measured), (ARITHMETIC, "ms, if as its arithmetic", &floor)];
        panel(&left, title, line.axis.unit(), &series)?;
        let memory = at(Point::memory, 1e-6);
        panel(&right, "peak memory", line.axis.unit(), &[(MEMORY, "MB", &memory)])?;
    }
    root.present()?;
    Ok(())
}

/// Colour, name and points of what is drawn.
type Drawing<'a> = (RGBColor, &'a str, &'a [(f64, f64)]);

fn panel(area: &Area<'_>, title: &str, unit: &str, series: &[Drawing<'_>]) -> Drawn {
    let ends = |of: fn(&(f64, f64)) -> f64| {
        let all = series.iter().flat_map(|(_, _, points)| points.iter().map(of));
        all.fold(1.0, f64::max)
    };
    let (wide, high) = (ends(|point| point.0), ends(|point| point.1));
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .caption(title, ("sans-serif", 15))
        .x_label_area_size(34)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..1.05 * wide, 0.0..1.15 * high)?;
    chart.configure_mesh().x_desc(unit).light_line_style(WHITE).draw()?;
    for (color, name, points) in series {
        let color = *color;
        chart
            .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 10, y + 4)], color.filled()));
        chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines() -> Vec<Line> {
        let point =
            |at, flops, time, bytes| Point { at, flops, seconds: vec![time], bytes: vec![bytes] };
        let points = vec![point(256, 1e9, 0.1, 1e8), point(512, 2.2e9, 0.24, 1.256e8)];
        vec![Line { axis: Axis::Tokens, what: "a model".into(), points }]
    }

    #[test]
    fn what_grows_with_tokens_is_told_by_the_token() {
        let text = markdown(&lines());
        for expected in [
            "### a LoRA step, by tokens of its row: a model\n",
            "| 256 | 100 ms | 1.00 | 1.00 | 100 MB |  |\n",
            "| 512 | 240 ms | 1.20 | 1.10 | 126 MB | 100 kB |\n",
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn every_series_is_drawn() {
        let drawn = svg(&lines()).expect("is drawn");
        for told in ["by tokens of its row", "peak memory", "ms, if as its arithmetic"] {
            assert!(drawn.contains(told), "{told} is not in the picture");
        }
        assert!(svg(&[]).is_ok());
    }

    #[test]
    fn series_are_of_cases_that_there_are() {
        let cases = Cases::read().expect("is well formed");
        let Growth { tokens, rank, loaded } = cases.growth.clone();
        assert_eq!(tokens.of(&cases).expect("is a case").name, "smollm2-135m-1024-4-layers");
        for series in [tokens, rank, loaded] {
            let case = series.of(&cases).expect("is a case");
            assert_eq!(case.steps, series.steps);
            assert!(series.at.is_sorted() && series.at.len() > 1);
        }
    }

    use super::super::case::Growth;
}
