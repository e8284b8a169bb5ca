//! The pictures of a bench, as SVG.
//!
//! | file | shows |
//! |---|---|
//! | `stops.svg` | which part of the stops took no longer than a time |
//! | `latency.svg` | what protection adds to the median latency, against the load |
//! | `epochs.svg` | stop time and interval of one run, epoch by epoch |
//! | `failover.svg` | the phases of a failover, one after another |
//! | `scale.svg` | stop time against each property of the container |

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::figures::{BenchReport, Load, Mode, Point, Sample, Timeline};
use super::scale::{Row, lines as scale_lines};

/// Width and height of a picture.
const SIZE: (u32, u32) = (800, 420);
const FONT: (&str, u32) = ("sans-serif", 14);
const TITLE: (&str, u32) = ("sans-serif", 18);
/// Epochs in the picture that shows them one by one.
const MOST_EPOCHS: usize = 2_000;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// All pictures that the samples give, with their names.
///
/// # Errors
/// One cannot be drawn.
pub(super) fn all(report: &BenchReport, samples: &[Sample]) -> Result<Vec<(&'static str, String)>> {
    let mut all = vec![
        ("stops.svg", picture(|area| stops(area, report, samples))?),
        ("latency.svg", picture(|area| latency(area, report))?),
    ];
    if let Some(last) = samples.iter().rfind(|sample| !sample.epochs.is_empty()) {
        all.push(("epochs.svg", picture(|area| epochs(area, last))?));
    }
    if let Some(failover) = &report.failover {
        all.push(("failover.svg", picture(|area| timeline(area, failover))?));
    }
    Ok(all)
}

/// Stop time against each property, a panel for each.
///
/// # Errors
/// It cannot be drawn.
pub(super) fn scale(rows: &[Row]) -> Result<String> {
    picture(|area| {
        let panels = area.split_evenly((2, 3));
        for (panel, (property, points)) in panels.iter().zip(scale_lines(rows)) {
            let axes = Axes { title: property.to_owned(), x: "", y: "us", log_x: true };
            lines(panel, &axes, &[Line { name: String::new(), points }])?;
        }
        Ok(())
    })
}

fn picture(draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(failed)?;
        draw(&area)?;
        area.present().map_err(failed)?;
    }
    Ok(text)
}

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

fn colour(index: usize) -> RGBColor {
    const COLOURS: [RGBColor; 6] = [
        RGBColor(31, 119, 180),
        RGBColor(214, 39, 40),
        RGBColor(44, 160, 44),
        RGBColor(148, 103, 189),
        RGBColor(255, 127, 14),
        RGBColor(23, 190, 207),
    ];
    COLOURS[index % COLOURS.len()]
}

/// A line with its name and colour.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// What a chart's axes show.
struct Axes {
    title: String,
    x: &'static str,
    y: &'static str,
    log_x: bool,
}

fn lines(area: &Area<'_>, axes: &Axes, lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|line| &line.points);
    let most = |of: fn(&(f64, f64)) -> f64| points().map(of).fold(0.0_f64, f64::max).max(1e-3);
    let (x_end, y_end) = (most(|p| p.0) * 1.05, most(|p| p.1) * 1.05);
    let x_least = points().map(|p| p.0).filter(|x| *x > 0.0).fold(x_end, f64::min);
    let y_least = points().map(|p| p.1).fold(0.0, f64::min);
    let mut builder = ChartBuilder::on(area);
    builder.caption(&axes.title, TITLE).margin(12).x_label_area_size(40).y_label_area_size(64);
    // The two kinds of axis are two types.
    macro_rules! draw {
        ($x:expr) => {{
            let mut chart = builder.build_cartesian_2d($x, y_least..y_end).map_err(failed)?;
            chart
                .configure_mesh()
                .x_desc(axes.x)
                .y_desc(axes.y)
                .label_style(FONT)
                .light_line_style(WHITE)
                .draw()
                .map_err(failed)?;
            for (index, line) in lines.iter().enumerate() {
                let colour = colour(index);
                chart
                    .draw_series(LineSeries::new(
                        line.points.iter().copied(),
                        colour.stroke_width(2),
                    ))
                    .map_err(failed)?
                    .label(&line.name)
                    .legend(move |(x, y)| {
                        PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2))
                    });
            }
            if lines.iter().any(|line| !line.name.is_empty()) {
                chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::UpperLeft)
                    .background_style(WHITE.mix(0.8))
                    .border_style(BLACK.mix(0.3))
                    .label_font(FONT)
                    .draw()
                    .map_err(failed)?;
            }
        }};
    }
    if axes.log_x {
        draw!((x_least * 0.9..x_end).log_scale());
    } else {
        draw!(0.0..x_end);
    }
    Ok(())
}

fn stops(area: &Area<'_>, report: &BenchReport, samples: &[Sample]) -> Result<()> {
    let of_point = |point: Point| {
        let own = samples.iter().filter(|s| s.point == point && s.mode == Mode::Protected);
        let mut times: Vec<f64> =
            own.flat_map(|s| &s.epochs).map(|epoch| epoch.stop_us.max(1) as f64).collect();
        times.sort_by(f64::total_cmp);
        let part = |index: usize| (index + 1) as f64 / times.len() as f64 * 100.0;
        // As many steps as can be told apart.
        let step = (times.len() / 500).max(1);
        let points =
            times.iter().enumerate().filter(|(i, _)| i % step == 0 || i + 1 == times.len());
        Line { name: point.to_string(), points: points.map(|(i, us)| (*us, part(i))).collect() }
    };
    let all: Vec<Line> = report
        .points
        .iter()
        .map(|figures| of_point(figures.point))
        .filter(|line| !line.points.is_empty())
        .collect();
    let axes = Axes {
        title: format!("{}: how long a stop takes", report.topology),
        x: "stop time in us",
        y: "% of the stops are no longer",
        log_x: true,
    };
    lines(area, &axes, &all)
}

fn latency(area: &Area<'_>, report: &BenchReport) -> Result<()> {
    let mut kinds: Vec<Point> = Vec::new();
    for figures in &report.points {
        let kind = Point { load: Load::Closed, ..figures.point };
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    // Where requests queue at the container, latency is the length of the queue.
    let part = |load: Load| match load {
        Load::Closed => Some(100.0),
        Load::Saturation => None,
        Load::Part(part) => Some(part.get() * 100.0),
    };
    let mut all = Vec::new();
    for kind in kinds {
        for (mode, word) in [(Mode::Gateway, "gateway only"), (Mode::Protected, "protected")] {
            let own = report.points.iter();
            let own = own.filter(|p| Point { load: Load::Closed, ..p.point } == kind);
            let mut points: Vec<(f64, f64)> = own
                .filter_map(|figures| {
                    let figure = figures.modes.iter().find(|figures| figures.mode == mode)?;
                    Some((part(figures.point.load)?, figure.added_p50_us.median))
                })
                .collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            let reads = kind
                .reads
                .map_or(String::new(), |reads| format!(", {:.0}% reads", reads.get() * 100.0));
            let name = format!("{} connections{reads}, {word}", kind.connections);
            all.push(Line { name, points });
        }
    }
    let axes = Axes {
        title: format!("{}: what is added to the median latency", report.topology),
        x: "load, in % of what the unprotected container answers at most",
        y: "us",
        log_x: false,
    };
    lines(area, &axes, &all)
}

fn epochs(area: &Area<'_>, sample: &Sample) -> Result<()> {
    let all = &sample.epochs[..sample.epochs.len().min(MOST_EPOCHS)];
    let begin = all.iter().map(|epoch| epoch.at_us).min().unwrap_or(0);
    let series = |name: &str, of: fn(&crate::agent::status::EpochRecord) -> u64| Line {
        name: name.to_owned(),
        points: all
            .iter()
            .map(|epoch| ((epoch.at_us - begin) as f64 / 1e6, of(epoch) as f64 / 1e3))
            .collect(),
    };
    let axes =
        Axes { title: format!("epoch by epoch: {}", sample.point), x: "s", y: "ms", log_x: false };
    let all = [
        series("since the stop before", |epoch| epoch.interval_us),
        series("seal to acknowledgement", |epoch| epoch.commit_us),
        series("stop", |epoch| epoch.stop_us),
    ];
    lines(area, &axes, &all)
}

fn timeline(area: &Area<'_>, failover: &Timeline) -> Result<()> {
    let total: f64 = failover.phases_ms.iter().map(|(_, ms)| ms).sum();
    let rows = failover.phases_ms.len() as f64;
    let title = format!(
        "loss of the host: {:.0} ms until it ran again, clients waited {:.0} ms",
        failover.outage_ms, failover.gap_ms
    );
    let mut chart = ChartBuilder::on(area)
        .caption(title, TITLE)
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(16)
        .build_cartesian_2d(0.0..total.max(1e-3) * 1.25, -rows..0.5)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .disable_y_axis()
        .x_desc("ms since the fault")
        .label_style(FONT)
        .light_line_style(WHITE)
        .draw()
        .map_err(failed)?;
    let mut begin = 0.0;
    for (index, (phase, ms)) in failover.phases_ms.iter().enumerate() {
        let row = -(index as f64);
        let bar =
            Rectangle::new([(begin, row - 0.4), (begin + ms, row + 0.4)], colour(index).filled());
        let label =
            Text::new(format!("{phase} {ms:.1} ms"), (begin + ms + total * 0.01, row + 0.2), FONT);
        chart.draw_series([bar]).map_err(failed)?;
        chart.draw_series([label]).map_err(failed)?;
        begin += ms;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::figures::tests::{report, samples};
    use super::*;

    #[test]
    fn each_picture_shows_its_figures() {
        let pictures = all(&report(), &samples()).unwrap();
        let names: Vec<_> = pictures.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["stops.svg", "latency.svg", "epochs.svg", "failover.svg"]);
        for (name, picture) in &pictures {
            assert!(
                picture.starts_with("<svg") && picture.trim_end().ends_with("</svg>"),
                "{name}"
            );
            assert!(!picture.contains("NaN") && !picture.contains("inf"), "{name}");
        }
        let failover = &pictures[3].1;
        assert!(failover.contains("detect 30.0 ms") && failover.contains("35 ms until"));
        assert!(pictures[0].1.contains("50 connections, load closed"));
    }

    #[test]
    fn nothing_measured_is_drawn_as_nothing() {
        let empty = BenchReport { points: Vec::new(), failover: None, ..report() };
        assert_eq!(all(&empty, &[]).unwrap().len(), 2);
    }
}
