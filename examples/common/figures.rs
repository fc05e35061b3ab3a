//! Figures: tiles of weights, curves of losses, points with error bars.

use super::files;
use anyhow::{Context, Result, anyhow};
use image::{ColorType, ImageFormat};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use std::io::Cursor;
use std::path::Path;
use std::sync::OnceLock;

/// Blue, the colour of values below 0 and of curves.
const BLUE: [f64; 3] = [33.0, 102.0, 172.0];
/// Red, the colour of values above 0.
const RED: [f64; 3] = [178.0, 24.0, 43.0];
/// Colours of the series of a figure, told apart by the colour-blind (Okabe & Ito).
const SERIES: [RGBColor; 4] =
    [RGBColor(0, 114, 178), RGBColor(213, 94, 0), RGBColor(0, 158, 115), RGBColor(204, 121, 167)];

/// Diagrams are drawn so many times larger and then reduced: that smooths lines and spaces letters well.
const FINE: u32 = 2;
/// Letters of titles, labels and legends, and a line's width, in pixels of the drawing.
const TITLE: u32 = 20 * FINE;
const LABEL: u32 = 14 * FINE;
const LINE: u32 = 2 * FINE;

/// An RGB picture.
struct Picture {
    width: u32,
    height: u32,
    pixels: Vec<u8>,
}

impl Picture {
    fn white(width: u32, height: u32) -> Self {
        Self { width, height, pixels: vec![255; 3 * width as usize * height as usize] }
    }

    fn write(&self, path: &Path) -> Result<()> {
        let mut png = Cursor::new(Vec::new());
        image::write_buffer_with_format(
            &mut png,
            &self.pixels,
            self.width,
            self.height,
            ColorType::Rgb8,
            ImageFormat::Png,
        )
        .with_context(|| format!("cannot encode {}", path.display()))?;
        files::write(path, &png.into_inner())
    }

    /// Draws with plotters on an area of [`FINE`] times the extents.
    fn draw(
        width: u32,
        height: u32,
        draw: impl FnOnce(&DrawingArea<BitMapBackend<'_>, Shift>) -> Result<()>,
    ) -> Result<Self> {
        load_font()?;
        let mut fine = Self::white(FINE * width, FINE * height);
        {
            let area = BitMapBackend::with_buffer(&mut fine.pixels, (fine.width, fine.height)).into_drawing_area();
            draw(&area)?;
            area.present().map_err(|e| anyhow!("cannot draw: {e}"))?;
        }
        Ok(fine.reduced())
    }

    /// Each pixel is the mean of [`FINE`] × [`FINE`].
    fn reduced(&self) -> Self {
        let fine = FINE as usize;
        let mut picture = Self::white(self.width / FINE, self.height / FINE);
        let width = picture.width as usize;
        for (at, value) in picture.pixels.iter_mut().enumerate() {
            let (x, y, channel) = (at / 3 % width, at / 3 / width, at % 3);
            let pixel = |i| ((fine * y + i / fine) * self.width as usize + fine * x + i % fine) * 3 + channel;
            let sum: usize = (0..fine * fine).map(|i| usize::from(self.pixels[pixel(i)])).sum();
            *value = (sum / (fine * fine)) as u8;
        }
        picture
    }
}

/// The font comes with the program, so that figures do not depend on what the machine has installed.
fn load_font() -> Result<()> {
    static LOADED: OnceLock<bool> = OnceLock::new();
    let load = || register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular()).is_ok();
    if *LOADED.get_or_init(load) { Ok(()) } else { Err(anyhow!("the font of the figures cannot be read")) }
}

/// White at 0, blue below and red above; `value` is in −1..=1.
fn diverging(value: f64) -> [u8; 3] {
    let end = if value < 0.0 { BLUE } else { RED };
    // A little above linear, so that weak values can still be seen.
    let share = value.abs().min(1.0).powf(0.8);
    std::array::from_fn(|c| (255.0 + share * (end[c] - 255.0)).round() as u8)
}

/// Draws rows of `weight` \[H,height·width\] as tiles, in the given order, row by row.
///
/// Each tile's colours are symmetric about 0 and reach to its own largest absolute value.
pub fn tiles(path: &Path, weight: &[f32], (height, width): (usize, usize), order: &[usize]) -> Result<()> {
    let columns = (order.len() as f64).sqrt().ceil().max(1.0) as usize;
    let lines = order.len().div_ceil(columns);
    // Whole pixels of about 84 a tile, fewer where there are many tiles.
    let target = (2400 / columns).clamp(1, 84);
    let scale = (target / height.max(width)).max(1);
    let gap = (scale * height.max(width) / 14).max(2);
    let extent = |tiles: usize, pixels: usize| (tiles * (pixels * scale + gap) + gap) as u32;
    let mut picture = Picture::white(extent(columns, width), extent(lines, height));
    for (place, latent) in order.iter().enumerate() {
        let tile = &weight[latent * height * width..(latent + 1) * height * width];
        let largest = tile.iter().fold(0.0f64, |largest, w| largest.max(f64::from(w.abs())));
        let top = gap + place / columns * (height * scale + gap);
        let left = gap + place % columns * (width * scale + gap);
        for y in 0..height * scale {
            for x in 0..width * scale {
                let w = f64::from(tile[y / scale * width + x / scale]);
                let colour = diverging(if largest > 0.0 { w / largest } else { 0.0 });
                let at = 3 * ((top + y) * picture.width as usize + left + x);
                picture.pixels[at..at + 3].copy_from_slice(&colour);
            }
        }
        // A frame, so that a pale tile still has an edge.
        for y in top - 1..=top + height * scale {
            for x in left - 1..=left + width * scale {
                if y < top || x < left || y == top + height * scale || x == left + width * scale {
                    let at = 3 * (y * picture.width as usize + x);
                    picture.pixels[at..at + 3].fill(200);
                }
            }
        }
    }
    picture.write(path)
}

/// One panel for each loss term: its mean over an epoch's batches, against the epoch. Terms that are always 0 are left out.
pub fn losses(path: &Path, terms: &[&str], history: &[Vec<f64>]) -> Result<()> {
    let shown: Vec<usize> = (0..terms.len()).filter(|t| history.iter().any(|epoch| epoch[*t] != 0.0)).collect();
    let columns = if shown.len() > 1 { 2 } else { 1 };
    let lines = shown.len().div_ceil(columns).max(1);
    let picture = Picture::draw(600 * columns as u32, 380 * lines as u32, |area| {
        for (panel, term) in area.split_evenly((lines, columns)).iter().zip(&shown) {
            let values: Vec<f64> = history.iter().map(|epoch| epoch[*term]).collect();
            curve(panel, terms[*term], &values).map_err(|e| anyhow!("cannot draw {}: {e}", terms[*term]))?;
        }
        Ok(())
    })?;
    picture.write(path)
}

/// A loss term in words.
fn title(term: &str) -> String {
    let words = match term {
        "lse" => "log-sum-exp",
        "var" => "variance",
        "tc" => "correlation",
        "wr" => "weight redundancy",
        "mse" => "mean squared error",
        "total" => return "total loss".to_owned(),
        other => return other.to_owned(),
    };
    format!("{words} ({term})")
}

/// A number of an axis: as many decimals as it needs, at most four.
fn number(value: &f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".to_owned() } else { text.replace('-', "−") }
}

/// A curve over the epochs, counted from 1.
fn curve<D: DrawingBackend>(
    area: &DrawingArea<D, Shift>,
    name: &str,
    values: &[f64],
) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
    let epochs = values.len().max(2) as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(title(name), ("sans-serif", TITLE))
        .margin(12 * FINE)
        .margin_right(22 * FINE)
        .x_label_area_size(40 * FINE)
        .y_label_area_size(64 * FINE)
        .build_cartesian_2d(1.0..epochs, span(values.iter().copied()))?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.6))
        .label_style(("sans-serif", LABEL))
        .x_desc("epoch")
        .x_label_formatter(&|epoch| format!("{epoch:.0}"))
        .y_label_formatter(&number)
        .x_labels(values.len().clamp(2, 8))
        .y_labels(6)
        .draw()?;
    let points = values.iter().enumerate().map(|(epoch, value)| (epoch as f64 + 1.0, *value));
    chart.draw_series(LineSeries::new(points.clone(), SERIES[0].stroke_width(LINE)))?;
    // A curve of one epoch has no line.
    if values.len() < 3 {
        chart.draw_series(points.map(|point| Circle::new(point, 3 * FINE, SERIES[0].filled())))?;
    }
    Ok(())
}

/// The corner with the fewest points in its quarter: there the legend hides least.
fn emptiest_corner(panel: &Panel, right: f64, vertical: &std::ops::Range<f64>) -> SeriesLabelPosition {
    let (middle, centre) = ((right - 0.5) / 2.0, (vertical.start + vertical.end) / 2.0);
    let count = |is_right: bool, is_upper: bool| {
        let points = panel.series.iter().flat_map(|series| &series.points);
        points.filter(|p| (p.at > middle) == is_right && (p.mean > centre) == is_upper).count()
    };
    let corners = [
        (SeriesLabelPosition::UpperRight, count(true, true)),
        (SeriesLabelPosition::LowerRight, count(true, false)),
        (SeriesLabelPosition::UpperLeft, count(false, true)),
        (SeriesLabelPosition::LowerLeft, count(false, false)),
    ];
    corners.into_iter().min_by_key(|(_, points)| *points).map_or(SeriesLabelPosition::UpperRight, |(corner, _)| corner)
}

/// A range that holds all values, with a margin.
fn span(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let margin = if high > low { 0.06 * (high - low) } else { 0.5 + 0.1 * high.abs() };
    low - margin..high + margin
}

/// A mean with its deviation at a place of the horizontal axis.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    /// Where.
    pub at: f64,
    /// Mean.
    pub mean: f64,
    /// Half the length of the error bar.
    pub deviation: f64,
}

/// Points that belong together.
#[derive(Debug, Clone)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// The points, from left to right.
    pub points: Vec<Point>,
    /// Drawn hollow and dashed: a published value to compare with.
    pub published: bool,
}

/// One panel of [`points`].
#[derive(Debug, Clone)]
pub struct Panel {
    /// Title.
    pub title: String,
    /// What the horizontal axis shows.
    pub horizontal: String,
    /// The labels of the horizontal axis' places 0, 1, …
    pub places: Vec<String>,
    /// The series; each published one has the colour of the one before it.
    pub series: Vec<Series>,
}

/// Panels side by side, of means with error bars.
pub fn points(path: &Path, panels: &[Panel]) -> Result<()> {
    let picture = Picture::draw(620 * panels.len().max(1) as u32, 460, |area| {
        for (area, panel) in area.split_evenly((1, panels.len().max(1))).iter().zip(panels) {
            point_panel(area, panel).map_err(|e| anyhow!("cannot draw {}: {e}", panel.title))?;
        }
        Ok(())
    })?;
    picture.write(path)
}

fn point_panel<D: DrawingBackend>(
    area: &DrawingArea<D, Shift>,
    panel: &Panel,
) -> Result<(), DrawingAreaErrorKind<D::ErrorType>> {
    let all = panel.series.iter().flat_map(|series| &series.points);
    let vertical = span(all.flat_map(|p| [p.mean - p.deviation, p.mean + p.deviation]));
    let right = panel.places.len() as f64 - 0.5;
    let legend = emptiest_corner(panel, right, &vertical);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", TITLE))
        .margin(12 * FINE)
        .margin_right(22 * FINE)
        .x_label_area_size(44 * FINE)
        .y_label_area_size(64 * FINE)
        .build_cartesian_2d(-0.5..right, vertical)?;
    // The axis has labels at multiples of a half; those between places are left empty.
    let place = |at: &f64| {
        let place = (at.fract() == 0.0 && *at >= 0.0).then(|| panel.places.get(*at as usize)).flatten();
        place.cloned().unwrap_or_default()
    };
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.12))
        .axis_style(BLACK.mix(0.6))
        .label_style(("sans-serif", LABEL))
        .x_desc(&panel.horizontal)
        .disable_x_mesh()
        .x_label_formatter(&place)
        .y_label_formatter(&number)
        .x_labels(2 * panel.places.len() + 2)
        .y_labels(8)
        .draw()?;
    let mut colour = 0;
    for (at, series) in panel.series.iter().enumerate() {
        if at > 0 && !series.published {
            colour = (colour + 1) % SERIES.len();
        }
        let ink = SERIES[colour];
        let bars = series.points.iter().filter(|p| p.deviation > 0.0).map(|p| {
            ErrorBar::new_vertical(
                p.at,
                p.mean - p.deviation,
                p.mean,
                p.mean + p.deviation,
                ink.stroke_width(LINE),
                8 * FINE,
            )
        });
        chart.draw_series(bars)?;
        let style = if series.published { ink.stroke_width(LINE) } else { ink.filled() };
        let size = FINE * if series.published { 6 } else { 4 };
        chart
            .draw_series(series.points.iter().map(|p| Circle::new((p.at, p.mean), size, style)))?
            .label(&series.name)
            .legend(move |(x, y)| Circle::new((x + 10 * FINE as i32, y), size, style));
    }
    chart
        .configure_series_labels()
        .position(legend)
        .legend_area_size(22 * FINE)
        .margin(8 * FINE)
        .label_font(("sans-serif", LABEL))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.2))
        .draw()
}
