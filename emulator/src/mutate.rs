//! Mutants of PTX text: one synchronisation deleted, or one guard negated, at a time.
//!
//! Every mutant must be found by the checker or by the numbers; one that is not shows a synchronisation that is either
//! not needed or not tested.

/// An instruction that orders something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// The kernel or function that contains it.
    pub function: String,
    /// Line of the PTX text, from 1.
    pub line: usize,
    /// The instruction.
    pub text: String,
    /// Line of the source, from the last `.loc`, 0 without.
    pub source_line: u32,
    /// Where inlined code itself stands, from the last `.loc`: the number of its `.file`, and the line.
    pub innermost: (u32, u32),
}

const ORDERING: [&str; 16] = [
    "bar.sync",
    "bar.arrive",
    "bar.warp.sync",
    "bar.red",
    "barrier.",
    "cp.async.wait_group",
    "cp.async.wait_all",
    "cp.async.commit_group",
    "cp.async.bulk.commit_group",
    "cp.async.bulk.wait_group",
    "membar.",
    "fence.",
    "mbarrier.",
    "wgmma.fence",
    "wgmma.commit_group",
    "wgmma.wait_group",
];

/// Every synchronisation in the text, in order.
pub fn sites(ptx: &str) -> Vec<Site> {
    find(ptx, |text| {
        let bare = if text.starts_with('@') { text.split_once(' ').map_or("", |(_, t)| t.trim()) } else { text };
        ORDERING.iter().any(|o| bare.starts_with(o))
    })
}

fn find(ptx: &str, wanted: impl Fn(&str) -> bool) -> Vec<Site> {
    let mut found = Vec::new();
    let (mut function, mut source_line, mut innermost) = (String::new(), 0, (0, 0));
    for (i, line) in ptx.lines().enumerate() {
        let text = line.trim();
        if let Some((_, rest)) = text.split_once(".entry ").or_else(|| text.split_once(".func ")) {
            function = rest.split('(').next().unwrap_or_default().trim().to_string();
        }
        if let Some(rest) = text.strip_prefix(".loc") {
            // The outermost place: where the kernel itself is.
            let numbers = rest.split_once("inlined_at").map_or(rest, |(_, at)| at);
            let number =
                |text: &str, at: usize| text.split_whitespace().nth(at).and_then(|n| n.parse().ok()).unwrap_or(0);
            source_line = number(numbers, 1);
            innermost = (number(rest, 0), number(rest, 1));
        }
        if wanted(text) {
            found.push(Site {
                function: function.clone(),
                line: i + 1,
                text: text.to_string(),
                source_line,
                innermost,
            });
        }
    }
    found
}

/// Every instruction under a guard, in order: branches, mostly.
pub fn guards(ptx: &str) -> Vec<Site> {
    find(ptx, |text| text.starts_with('@'))
}

/// The text with the guard at `site` negated.
pub fn negate(ptx: &str, site: &Site) -> String {
    let by = match site.text.strip_prefix("@!") {
        Some(rest) => format!("@{rest}"),
        None => site.text.replacen('@', "@!", 1),
    };
    replace(ptx, site, &by)
}

/// The text with the instruction at `site` deleted; every other line keeps its number. Where a barrier also reduces, each thread is
/// left with its own value; a wait for an mbarrier's phase finds it over.
pub fn without(ptx: &str, site: &Site) -> String {
    if let Some((_, operands)) = site.text.split_once(".red.or.pred").or_else(|| site.text.split_once(".red.and.pred"))
    {
        let operands: Vec<&str> = operands.trim().trim_end_matches(';').split(',').map(str::trim).collect();
        if let (Some(result), Some(value)) = (operands.first(), operands.last()) {
            return replace(ptx, site, &format!("mov.pred {result}, {value};"));
        }
    }
    if let Some((_, operands)) = site.text.split_once("_wait.").filter(|(op, _)| op.contains("mbarrier."))
        && let Some((_, operands)) = operands.split_once(char::is_whitespace)
    {
        let over = operands.split(',').next().unwrap_or_default().trim();
        return replace(ptx, site, &format!("setp.eq.u32 {over}, 0, 0;"));
    }
    replace(ptx, site, "")
}

/// The text with every kernel but one taken out, so that a mutant of it loads fast; every line keeps its number.
pub fn only(ptx: &str, kernel: &str) -> String {
    let mut out = String::with_capacity(ptx.len());
    // Within another kernel: how many braces are open, and whether one was.
    let mut other: Option<(i32, bool)> = None;
    for line in ptx.lines() {
        let code = line.split("//").next().unwrap_or_default();
        if let Some((_, rest)) = code.split_once(".entry ")
            && rest.split('(').next().unwrap_or_default().trim() != kernel
        {
            other = Some((0, false));
        }
        if let Some((depth, opened)) = &mut other {
            *opened |= code.contains('{');
            *depth += code.matches('{').count() as i32 - code.matches('}').count() as i32;
            if *opened && *depth == 0 {
                other = None;
            }
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

/// The names of the source files, by the numbers that `.loc` gives them.
pub fn files(ptx: &str) -> Vec<(u32, String)> {
    let name = |line: &str| {
        let mut words = line.trim().strip_prefix(".file")?.trim().splitn(2, char::is_whitespace);
        let (number, path) = (words.next()?.parse().ok()?, words.next()?.split('"').nth(1)?);
        Some((number, path.rsplit('/').next().unwrap_or(path).to_string()))
    };
    ptx.lines().filter_map(name).collect()
}

/// Every instruction that `wanted` picks by its text, in order.
pub fn instructions(ptx: &str, wanted: impl Fn(&str) -> bool) -> Vec<Site> {
    find(ptx, wanted)
}

/// The text with the instruction at `site` replaced.
pub fn replace(ptx: &str, site: &Site, by: &str) -> String {
    let mut out = String::with_capacity(ptx.len());
    for (i, line) in ptx.lines().enumerate() {
        if i + 1 == site.line {
            out.push_str(by);
        } else {
            out.push_str(line);
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_goes() {
        let ptx = ".visible .entry k(\n)\n{\n.loc 1 7 3\nbar.sync 0;\nadd.s32 %r1, %r1, 1;\n@%p1 bar.sync 1;\n}\n";
        let found = sites(ptx);
        assert_eq!(found.len(), 2);
        assert_eq!((found[0].function.as_str(), found[0].line, found[0].source_line), ("k", 5, 7));
        let guarded = guards(ptx);
        assert_eq!(guarded.len(), 1);
        assert!(negate(&negate(ptx, &guarded[0]), &guards(&negate(ptx, &guarded[0]))[0]) == ptx);
        let mutant = without(ptx, &found[0]);
        assert_eq!(sites(&mutant).len(), 1);
        assert_eq!(mutant.lines().count(), ptx.lines().count());
    }

    #[test]
    fn a_reducing_barrier_leaves_its_value() {
        let ptx = ".visible .entry k()\n{\nbar.red.or.pred \t%p2, 0, %p1;\n}\n";
        assert!(without(ptx, &sites(ptx)[0]).contains("mov.pred %p2, %p1;"));
    }

    #[test]
    fn a_wait_for_an_mbarrier_is_over() {
        let ptx = ".visible .entry k()\n{\n@%p1 mbarrier.try_wait.parity.shared::cta.b64 \t%p2, [%r1], 0;\n}\n";
        assert!(without(ptx, &sites(ptx)[0]).contains("\nsetp.eq.u32 %p2, 0, 0;\n"));
    }

    #[test]
    fn one_kernel_stays() {
        let ptx =
            ".version 9.0\n.visible .entry a(\n)\n{\n{ // }\nbar.sync 0;\n}\n}\n.visible .entry b()\n{\nret;\n}\n";
        let b = only(ptx, "b");
        assert_eq!(b, ".version 9.0\n\n\n\n\n\n\n\n.visible .entry b()\n{\nret;\n}\n");
        assert_eq!(sites(&only(ptx, "a")), sites(ptx));
    }
}
