//! Measured values beside published ones.

use crate::published::Published;

/// Published deviations beyond which a difference is flagged.
const FLAG: f64 = 3.0;

/// Mean and deviation over seeds.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Mean.
    pub mean: f64,
    /// Standard deviation (n − 1); none for a single seed.
    pub deviation: Option<f64>,
}

impl Measured {
    /// Of one value for each seed.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Self { mean, deviation: (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt()) }
    }
}

/// A line of a table.
pub struct Line {
    /// Which training.
    pub configuration: String,
    /// What is measured.
    pub measure: &'static str,
    /// What is published, if anything is.
    pub published: Option<Published>,
    /// What was measured, or why it was not.
    pub measured: Result<Measured, String>,
    /// Decimals to show.
    pub decimals: usize,
}

impl Line {
    /// The difference in published deviations, where one is published.
    fn deviations(&self) -> Option<f64> {
        let published = self.published?;
        Some((self.measured.as_ref().ok()?.mean - published.mean) / published.scale()?)
    }

    /// Whether the difference is more than [`FLAG`] published deviations.
    pub fn is_flagged(&self) -> bool {
        self.deviations().is_some_and(|deviations| deviations.is_nan() || deviations.abs() > FLAG)
    }

    fn cells(&self) -> [String; 6] {
        let with = |mean: f64, deviation: Option<f64>, decimals: usize| match deviation {
            Some(deviation) => format!("{mean:.decimals$} ± {deviation:.decimals$}"),
            None => format!("{mean:.decimals$}"),
        };
        let none = || "–".to_owned();
        let published = self.published.map_or_else(none, |p| with(p.mean, p.deviation, p.decimals));
        let (measured, difference) = match &self.measured {
            Ok(measured) => (
                with(measured.mean, measured.deviation, self.decimals),
                self.published.map_or_else(none, |p| {
                    let relative = 100.0 * (measured.mean - p.mean) / p.mean.abs();
                    let relative = if p.mean == 0.0 { String::new() } else { format!(" ({relative:+.1} %)") };
                    format!("{:+.*}{relative}", self.decimals, measured.mean - p.mean)
                }),
            ),
            Err(reason) => (format!("failed: {reason}"), none()),
        };
        let deviations = self.deviations().map_or_else(none, |deviations| {
            format!("{deviations:+.1}{}", if self.is_flagged() { " **> 3**" } else { "" })
        });
        [self.configuration.clone(), self.measure.to_owned(), published, measured, difference, deviations]
    }
}

/// A table in Markdown; its columns are as wide as their widest cell, so that it can be read as it is.
pub fn markdown(lines: &[Line]) -> String {
    let header = ["configuration", "measure", "published", "here", "difference", "in published sd"].map(str::to_owned);
    let mut rows = vec![header];
    rows.extend(lines.iter().map(Line::cells));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut text = String::new();
    for (at, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += &format!("| {} |\n", cells.join(" | "));
        if at == 0 {
            let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
            text += &format!("| {} |\n", rule.join(" | "));
        }
    }
    text
}
