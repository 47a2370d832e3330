//! The picture of a benchmark: each step as a multiple of its arithmetic.

use super::run::Side;
use super::table::{Head, Row};
use crate::failure::Failure;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of the picture, of the names in it, and of what stands right of the bars.
const WIDTH: i32 = 1000;
const NAMES: i32 = 260;
const NUMBERS: i32 = 110;
/// Height of a bar, of what parts groups of them, and of title and legend.
const BAR: i32 = 14;
const GAP: i32 = 12;
const TOP: i32 = 60;

const SIDES: [(Side, &str, RGBColor); 3] = [
    (Side::Ours, "ours", RGBColor(31, 119, 180)),
    (Side::Peft, "peft", RGBColor(255, 127, 14)),
    (Side::ApplyLora, "Burn's apply_lora", RGBColor(127, 127, 127)),
];

/// A measure of a case.
struct Group {
    name: String,
    /// Colour and how many times the floor, by side.
    bars: Vec<(RGBColor, f64)>,
}

/// An SVG of all steps that are known; none if there are none.
pub(super) fn svg(head: &Head, rows: &[Row<'_>]) -> Result<Option<String>, Failure> {
    let group = |row: &Row<'_>| {
        let floor = row.floor(head.rate)?;
        let bar =
            |(side, _, color): &(Side, &str, RGBColor)| Some((*color, row.step(*side)? / floor));
        let bars: Vec<_> = SIDES.iter().filter_map(bar).collect();
        let name = format!("{}, {}", row.case.name, row.measure.title());
        (row.failures.is_empty() && !bars.is_empty()).then_some(Group { name, bars })
    };
    let groups: Vec<Group> = rows.iter().filter_map(group).collect();
    if groups.is_empty() {
        return Ok(None);
    }
    let height: i32 = groups.iter().map(|group| BAR * group.bars.len() as i32 + GAP).sum();
    let mut svg = String::new();
    {
        let size = (WIDTH as u32, (TOP + height + GAP) as u32);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = draw(&root, &groups);
        drawn.map_err(|e| Failure::new(format!("the picture cannot be drawn: {e}")))?;
    }
    Ok(Some(svg))
}

fn draw(
    root: &DrawingArea<SVGBackend<'_>, Shift>,
    groups: &[Group],
) -> Result<(), Box<dyn std::error::Error>> {
    root.fill(&WHITE)?;
    let text = |size: i32, side: HPos| {
        ("sans-serif", size).into_font().color(&BLACK).pos(Pos::new(side, VPos::Center))
    };
    let title = "Time of a step, as a multiple of its arithmetic at the fastest rate measured";
    root.draw(&Text::new(title, (14, 18), text(16, HPos::Left)))?;
    for ((_, name, color), index) in SIDES.iter().zip(0..) {
        let left = 14 + index * 170;
        root.draw(&Rectangle::new([(left, 36), (left + 12, 48)], color.filled()))?;
        root.draw(&Text::new(*name, (left + 18, 42), text(12, HPos::Left)))?;
    }
    let most = groups.iter().flat_map(|group| &group.bars).map(|bar| bar.1).fold(1.0, f64::max);
    let scale = f64::from(WIDTH - NAMES - NUMBERS) / most;
    let mut top = TOP;
    for group in groups {
        let tall = BAR * group.bars.len() as i32;
        let name =
            Text::new(group.name.as_str(), (NAMES - 10, top + tall / 2), text(12, HPos::Right));
        root.draw(&name)?;
        for (color, times) in &group.bars {
            let right = NAMES + (times * scale).round() as i32;
            root.draw(&Rectangle::new([(NAMES, top + 1), (right, top + BAR - 1)], color.filled()))?;
            let said = format!("{times:.2}");
            root.draw(&Text::new(said, (right + 6, top + BAR / 2), text(11, HPos::Left)))?;
            top += BAR;
        }
        top += GAP;
    }
    // Nothing can be left of it.
    let floor = NAMES + scale.round() as i32;
    root.draw(&PathElement::new(
        [(floor, TOP - 6), (floor, top - GAP + 4)],
        BLACK.stroke_width(1),
    ))?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::case::Cases;
    use crate::bench::table::tests::{head, row};

    #[test]
    fn steps_that_are_known_are_in_the_picture() {
        let cases = Cases::read().expect("is well formed");
        assert_eq!(svg(&head(), &[]).expect("is drawn"), None);
        let drawn = svg(&head(), &[row(&cases.cases[0])]).expect("is drawn").expect("has bars");
        for told in ["minilm, LoRA step", "4.00", "8.00"] {
            assert!(drawn.contains(told), "{told} is not in the picture");
        }
        let mut failed = row(&cases.cases[0]);
        failed.failures.push("no".into());
        assert_eq!(svg(&head(), &[failed]).expect("is drawn"), None);
    }
}
