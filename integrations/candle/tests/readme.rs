//! The program in the repository's README is the one in this crate's, which is compiled and run as a documentation test.

/// The programs between a fence that begins with `rust` and its end.
fn programs(text: &str) -> Vec<&str> {
    let blocks = text.split("\n```rust").skip(1);
    blocks.filter_map(|block| Some(block.split_once('\n')?.1.split_once("\n```")?.0)).collect()
}

#[test]
fn the_programs_are_the_same() {
    let whole = include_str!("../../../README.md");
    let section = whole.split("\n## ").find(|section| section.starts_with("Use it from candle")).expect("a section");
    let (shown, run) = (programs(section), programs(include_str!("../README.md")));
    assert_eq!(shown.len(), 1);
    assert_eq!(shown, run);
}
