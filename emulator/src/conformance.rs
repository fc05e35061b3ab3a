//! What the emulator and a chip must agree on: the kernels of `kernels/conformance.cu`, their input, and how far their outputs may differ.

use crate::{Device, Fault, Grid, Module, Options};

/// The kernels' PTX.
pub const PTX: &str = include_str!("../tests/ptx/conformance.ptx");

/// Words of input, and of output.
pub const WORDS: usize = 1024;

/// What output holds before a kernel runs.
pub const UNWRITTEN: u32 = u32::MAX;

/// The input of every kernel.
pub fn input() -> Vec<u32> {
    let mut x = 1u64;
    (0..WORDS)
        .map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 32) as u32
        })
        .collect()
}

/// The emulator's output of a kernel.
pub fn emulated(module: &Module, kernel: &str, options: Options) -> Result<Vec<u32>, Fault> {
    let mut device = Device::new(options);
    let (from, to) = (device.upload(&input()), device.alloc(4 * WORDS));
    device.launch(module, kernel, Grid::linear(1, 32, 0), &[from.into(), to.into()])?;
    device.download(to, WORDS)
}

/// How far one word of a chip's output may be from the emulator's.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Bound {
    /// The same bits.
    Exact,
    /// A number with the same bits, or any NaN.
    Number,
    /// A number within this, absolutely or relative to the larger, or any NaN.
    Within { absolute: f64, relative: f64 },
}

/// Of word `at` of a kernel's output.
fn bound(kernel: &str, at: usize) -> Bound {
    // 2^-21: what the ISA allows the approximate functions, and some.
    const RELATIVE: f64 = 4.8e-7;
    let relative = |relative: f64| Bound::Within { absolute: 0.0, relative };
    match (kernel, at) {
        // 17 terms below 4 in size: a unit in the last place of the largest, for each term twice.
        ("c_mma_bf16" | "c_mma_f16" | "c_mma_tf32_tame", _) => Bound::Within { absolute: 4e-6, relative: 0.0 },
        ("c_mma_tf32", _) => relative(2e-6),
        ("c_approximate", _) => match at % 6 {
            // Near 1 the error of lg2 is absolute.
            2 => Bound::Within { absolute: RELATIVE, relative: RELATIVE },
            // tanh has 11 bits.
            5 => relative(6e-4),
            _ => relative(RELATIVE),
        },
        // expf and its like contain ex2.
        ("c_exact_math", _) if at % 16 >= 11 => relative(2.0 * RELATIVE),
        ("c_exact_math", _) if !matches!(at % 16, 8 | 9) => Bound::Number,
        ("c_extremes", _) if at % 8 < 6 => Bound::Number,
        ("c_max_nan", _) => Bound::Number,
        ("c_conversions", _) if at % 14 == 12 => Bound::Number,
        _ => Bound::Exact,
    }
}

/// Whether a chip's output of a kernel agrees with the emulator's; else the first word that does not.
pub fn compare(kernel: &str, chip: &[u32], emulated: &[u32]) -> Result<(), String> {
    if chip.len() != emulated.len() {
        return Err(format!("{kernel}: {} words, expected {}", chip.len(), emulated.len()));
    }
    for (at, (&c, &e)) in chip.iter().zip(emulated).enumerate() {
        let (bound, x, y) = (bound(kernel, at), f32::from_bits(c), f32::from_bits(e));
        let agree = match bound {
            _ if c == e => true,
            // What was not written is no NaN.
            _ if c == UNWRITTEN || e == UNWRITTEN => false,
            Bound::Exact => false,
            _ if x.is_nan() || y.is_nan() => x.is_nan() && y.is_nan(),
            Bound::Number => false,
            Bound::Within { absolute, relative } => {
                let (x, y) = (f64::from(x), f64::from(y));
                (x - y).abs() <= absolute.max(relative * x.abs().max(y.abs()))
            }
        };
        if !agree {
            return Err(format!(
                "{kernel}, word {at}: {c:#010x} ({x:e}) on the chip, {e:#010x} ({y:e}) here, {bound:?}"
            ));
        }
    }
    Ok(())
}

/// A kernel's output as a line of a golden file.
pub fn to_line(kernel: &str, output: &[u32]) -> String {
    let used = output.iter().rposition(|&word| word != UNWRITTEN).map_or(0, |at| at + 1);
    output[..used].iter().fold(kernel.to_string(), |line, word| format!("{line} {word:08x}"))
}

/// The kernel and its output from such a line.
pub fn from_line(line: &str) -> Option<(&str, Vec<u32>)> {
    let mut words = line.split_whitespace();
    let kernel = words.next()?;
    let mut output = words.map(|word| u32::from_str_radix(word, 16).ok()).collect::<Option<Vec<u32>>>()?;
    (output.len() <= WORDS).then(|| output.resize(WORDS, UNWRITTEN))?;
    Some((kernel, output))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_an_output() {
        let mut output = vec![UNWRITTEN; WORDS];
        output[..3].copy_from_slice(&[1, UNWRITTEN, 0xABC]);
        let line = to_line("c_bits", &output);
        assert_eq!(line, "c_bits 00000001 ffffffff 00000abc");
        assert_eq!(from_line(&line), Some(("c_bits", output)));
        assert_eq!(from_line("c_bits no"), None);
    }

    #[test]
    fn bounds_are_kept() {
        let one = 1.0f32.to_bits();
        assert!(compare("c_bits", &[one], &[one + 1]).is_err());
        assert!(compare("c_mma_bf16", &[one], &[one + 1]).is_ok());
        assert!(compare("c_mma_bf16", &[one], &[1.00001f32.to_bits()]).is_err());
        assert!(compare("c_mma_bf16", &[one], &[UNWRITTEN]).is_err());
        assert!(compare("c_max_nan", &[0x7FFF_FFFF], &[f32::NAN.to_bits()]).is_ok());
        assert!(compare("c_max_nan", &[one], &[f32::NAN.to_bits()]).is_err());
        assert!(compare("c_bits", &[0x7FFF_FFFF], &[f32::NAN.to_bits()]).is_err());
    }
}
