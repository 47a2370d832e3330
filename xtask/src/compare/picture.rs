//! The picture of a comparison: accuracy over the number of trained parameters.

use super::table::{Line, accuracy, mean};
use crate::failure::Failure;
use crate::summary::grouped;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (1000, 640);

/// Colours that can be told apart, one for each family.
const COLORS: &[RGBColor] = &[
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(140, 86, 75),
    RGBColor(23, 190, 207),
    RGBColor(127, 127, 127),
    RGBColor(231, 84, 166),
    RGBColor(158, 161, 0),
    RGBColor(0, 0, 0),
    RGBColor(0, 90, 90),
    RGBColor(112, 134, 230),
];

/// Height of a label, and how wide a letter is at most.
const LABEL: (i32, i32) = (12, 7);

/// A method in the picture.
struct Dot {
    name: String,
    family: usize,
    parameters: f64,
    accuracy: f64,
    /// The reference's accuracy, a ring.
    reference: Option<f64>,
}

/// A rectangle of pixels: left, top, right, bottom.
type Box4 = (i32, i32, i32, i32);

/// An SVG of all rows that are known so far; none if there are none.
pub(super) fn svg(title: &str, lines: &[Line<'_>]) -> Result<Option<String>, Failure> {
    let mut families: Vec<&str> = lines.iter().map(|line| line.row.family.as_str()).collect();
    families.dedup();
    let dot = |line: &Line<'_>| {
        Some(Dot {
            name: line.row.name.clone(),
            family: families.iter().position(|family| *family == line.row.family)?,
            parameters: mean(|run| run.trainable_parameters as f64, &line.ours)?,
            accuracy: mean(accuracy, &line.ours)?,
            reference: mean(accuracy, &line.python),
        })
    };
    let dots: Vec<Dot> = lines.iter().filter_map(dot).collect();
    if dots.is_empty() {
        return Ok(None);
    }
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        let drawn = draw(&root, title, &families, &dots);
        drawn.map_err(|e| Failure::new(format!("the picture cannot be drawn: {e}")))?;
    }
    Ok(Some(svg))
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn draw(
    root: &Area<'_>,
    title: &str,
    families: &[&str],
    dots: &[Dot],
) -> Result<(), Box<dyn std::error::Error>> {
    root.fill(&WHITE)?;
    let bounds = |values: Vec<f64>| {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        (low, values.iter().copied().fold(low, f64::max))
    };
    let heights = dots.iter().flat_map(|dot| [Some(dot.accuracy), dot.reference]).flatten();
    let (low, high) = bounds(heights.collect());
    let (least, most) = bounds(dots.iter().map(|dot| dot.parameters).collect());
    let (least, most) = (least / 1.5, most * 2.5);
    let width = (least..most).log_scale().with_key_points(ticks(least, most));
    let mut chart = ChartBuilder::on(root)
        .margin(14)
        .caption(title, ("sans-serif", 18))
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(width, low - 1.0..high + 1.0)?;
    chart
        .configure_mesh()
        .x_desc("trained parameters")
        .y_desc("accuracy, %")
        .x_label_formatter(&|x| grouped(*x))
        .light_line_style(WHITE)
        .draw()?;
    for (index, family) in families.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        let own = || dots.iter().filter(move |dot| dot.family == index);
        let points =
            own().map(|dot| Circle::new((dot.parameters, dot.accuracy), 4, color.filled()));
        chart
            .draw_series(points)?
            .label(*family)
            .legend(move |(x, y)| Circle::new((x + 9, y), 4, color.filled()));
        let rings = own().filter_map(|dot| Some((dot, dot.reference?)));
        let rings = rings.map(|(dot, other)| Circle::new((dot.parameters, other), 5, color));
        chart.draw_series(rings)?;
    }
    let at = |dot: &Dot| chart.backend_coord(&(dot.parameters, dot.accuracy));
    let places: Vec<(i32, i32)> = dots.iter().map(at).collect();
    let names: Vec<&str> = dots.iter().map(|dot| dot.name.as_str()).collect();
    for ((dot, place), (left, top, ..)) in dots.iter().zip(&places).zip(labels(&names, &places)) {
        let color = COLORS[dot.family % COLORS.len()];
        let style = ("sans-serif", LABEL.0).into_font().color(&color);
        let style = style.pos(Pos::new(HPos::Left, VPos::Top));
        let near = (left.max(place.0), top + LABEL.0 / 2);
        root.draw(&PathElement::new([*place, near], color.mix(0.4)))?;
        root.draw(&Text::new(dot.name.as_str(), (left, top), style))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

/// 1, 2 and 5 times powers of ten.
fn ticks(least: f64, most: f64) -> Vec<f64> {
    let powers = (0..16).flat_map(|power| [1.0, 2.0, 5.0].map(|x| x * 10_f64.powi(power)));
    powers.filter(|x| (least..most).contains(x)).collect()
}

fn apart(one: &Box4, other: &Box4) -> bool {
    one.2 <= other.0 || other.2 <= one.0 || one.3 <= other.1 || other.3 <= one.1
}

/// Where the names go: each as near to its point as it may without lying on a point or on a name.
fn labels(names: &[&str], points: &[(i32, i32)]) -> Vec<Box4> {
    let dot = |&(x, y): &(i32, i32)| (x - 4, y - 4, x + 4, y + 4);
    let mut taken: Vec<Box4> = points.iter().map(dot).collect();
    let mut placed = Vec::new();
    for (name, &(x, y)) in names.iter().zip(points) {
        let width = name.chars().count() as i32 * LABEL.1;
        let at = |dx: i32, dy: i32| {
            let left = if dx < 0 { x + dx - width } else { x + dx };
            let top = y + dy - LABEL.0 / 2;
            (left, top, left + width, top + LABEL.0)
        };
        // Right, left, then further up and down on either side.
        let tries = (0..20).flat_map(|far| [7, 40].map(|out| (far, out))).flat_map(|(far, out)| {
            let away = far * LABEL.0;
            [(out, -away), (-out, -away), (out, away), (-out, away)]
        });
        let inside =
            |b: &Box4| b.0 > 60 && b.1 > 36 && b.2 < SIZE.0 as i32 - 14 && b.3 < SIZE.1 as i32 - 54;
        let free = |b: &Box4| inside(b) && taken.iter().all(|other| apart(b, other));
        let found = tries.map(|(dx, dy)| at(dx, dy)).find(free).unwrap_or_else(|| at(7, 0));
        taken.push(found);
        placed.push(found);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::recipe::Recipe;
    use crate::compare::table::tests::measured;

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(1_000.0, 21_000.0), [1e3, 2e3, 5e3, 1e4, 2e4]);
    }

    #[test]
    fn names_lie_on_nothing() {
        let points: Vec<(i32, i32)> = (0..30).map(|i| (500, 300 + i % 7)).collect();
        let names = vec!["a-long-name"; 30];
        let placed = labels(&names, &points);
        for (index, one) in placed.iter().enumerate() {
            assert!(placed[..index].iter().all(|other| apart(one, other)), "{one:?}");
            assert!(points.iter().all(|&(x, y)| apart(one, &(x, y, x + 1, y + 1))), "{one:?}");
        }
    }

    #[test]
    fn every_known_row_is_in_the_picture() {
        let recipe = Recipe::sentiment().expect("is a recipe");
        let mut lines: Vec<_> = recipe
            .rows
            .iter()
            .map(|row| Line { row, ours: vec![], python: vec![], times: vec![], failures: vec![] })
            .collect();
        assert_eq!(svg("t", &lines).expect("is drawn"), None);
        lines[0].ours.push((1, measured(0.7, 0.5)));
        let last = lines.len() - 1;
        lines[last].ours.push((1, measured(0.8, 0.5)));
        let svg = svg("t", &lines).expect("is drawn").expect("has points");
        let (first, second) = (&recipe.rows[0], &recipe.rows[last]);
        for told in [&first.name, &first.family, &second.name, &second.family] {
            assert!(svg.contains(told.as_str()), "{told} is not in the picture");
        }
        assert!(!svg.contains(&recipe.rows[1].name), "{svg}");
    }
}
