//! The comparison with published values: means, deviations, differences and flags.

#[path = "../examples/paper/published.rs"]
#[allow(dead_code)]
mod published;
#[path = "../examples/paper/table.rs"]
mod table;

use published::{BENCHMARK, Published, SWEEP};
use table::{Line, Measured, markdown};

fn line(published: Option<Published>, measured: Result<Measured, String>) -> Line {
    Line { configuration: "c".to_owned(), measure: "m", published, measured, decimals: 2 }
}

const PUBLISHED: Published = Published { mean: 93.4, deviation: Some(0.4), decimals: 1 };

fn measured(mean: f64) -> Result<Measured, String> {
    Ok(Measured { mean, deviation: None })
}

#[test]
fn mean_and_deviation_over_seeds() {
    let found = Measured::of(&[1.0, 2.0, 6.0]);
    assert_eq!(found.mean, 3.0);
    assert!((found.deviation.unwrap() - 7f64.sqrt()).abs() < 1e-12, "(n − 1) in the denominator: {found:?}");
    assert_eq!(Measured::of(&[5.0]).deviation, None);
}

#[test]
fn flags_are_for_more_than_three_published_deviations() {
    assert!(!line(Some(PUBLISHED), measured(94.5)).is_flagged());
    assert!(line(Some(PUBLISHED), measured(94.7)).is_flagged());
    assert!(line(Some(PUBLISHED), measured(92.1)).is_flagged());
    assert!(line(Some(PUBLISHED), measured(f64::NAN)).is_flagged());
    // Nothing to compare with.
    assert!(!line(Some(Published { deviation: None, ..PUBLISHED }), measured(0.0)).is_flagged());
    assert!(!line(None, measured(0.0)).is_flagged());
}

#[test]
fn a_deviation_below_the_rounding_is_not_divided_by() {
    // Published as −676 ± 0: half a unit is 0.5.
    let published = SWEEP[1].loss.unwrap();
    assert_eq!((published.mean, published.deviation, published.scale()), (-676.0, Some(0.0), Some(0.5)));
    // Published as 92.9 ± 0.0: half a unit is 0.05.
    assert!((SWEEP[4].probe.unwrap().scale().unwrap() - 0.05).abs() < 1e-12);
    assert_eq!(BENCHMARK[0].probe.unwrap().scale(), Some(0.38));
}

#[test]
fn tables_show_all_of_it() {
    let with_deviation = Ok(Measured { mean: 91.0, deviation: Some(0.1) });
    let text = markdown(&[
        line(Some(PUBLISHED), with_deviation),
        line(None, measured(1.0)),
        line(Some(PUBLISHED), Err("the loss is not finite".to_owned())),
    ]);
    let cells: Vec<Vec<&str>> = text.lines().map(|row| row.split('|').map(str::trim).collect()).collect();
    assert_eq!(cells[2][3..7], ["93.4 ± 0.4", "91.00 ± 0.10", "-2.40 (-2.6 %)", "-6.0 **> 3**"]);
    assert_eq!(cells[3][3..7], ["–", "1.00", "–", "–"]);
    assert_eq!(cells[4][3..7], ["93.4 ± 0.4", "failed: the loss is not finite", "–", "–"]);
    // All rows are of the same width.
    assert!(text.lines().all(|row| row.chars().count() == text.lines().next().unwrap().chars().count()));
}
