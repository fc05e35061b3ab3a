//! What the emulator and a chip must agree on: the kernels of `kernels/conformance.cu` and `conformance_sm90.cu`, their input, and how far
//! their outputs may differ.

use crate::{Argument, Device, Fault, Grid, LoadError, Module, Options, Swizzle, TensorElement, TensorMap};

/// What output holds before a kernel runs.
pub const UNWRITTEN: u32 = u32::MAX;

/// Kernels of one file, which all have the same geometry and arguments: a tensor map if there is a tensor, input, output.
pub struct Suite {
    /// The compute capability that they need, as PTX says it. Those of `sm_90a` run on no other.
    pub target: &'static str,
    /// The kernels.
    pub ptx: &'static str,
    /// Blocks, all in one cluster.
    pub blocks: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Words of output.
    pub words: usize,
    /// What the tensor map is of.
    pub tensor: Option<Tensor>,
}

/// The input as a tensor of 16-bit elements, in boxes of 64 lines of 64 elements with a swizzle of 128 bytes.
pub struct Tensor {
    /// Elements of a line, lines of a plane, planes.
    pub extents: [u64; 3],
    /// From line to line and from plane to plane, in bytes.
    pub strides: [u64; 2],
    /// Elements of a box.
    pub shape: [u32; 3],
}

/// Instructions that every GPU has.
pub const SM80: Suite = Suite {
    target: "sm_80",
    ptx: include_str!("../tests/ptx/conformance.ptx"),
    blocks: 1,
    threads: 32,
    words: 1024,
    tensor: None,
};

/// Those of compute capability 9.0.
pub const SM90A: Suite = Suite {
    target: "sm_90a",
    ptx: include_str!("../tests/ptx/conformance_sm90.ptx"),
    blocks: 2,
    threads: 384,
    words: 4096,
    tensor: Some(Tensor { extents: [72, 80, 2], strides: [160, 80 * 160], shape: [64, 64, 1] }),
};

/// All of them.
pub const SUITES: [&Suite; 2] = [&SM80, &SM90A];

/// The first place of an element: offset / 2 is added. A bf16 of that many bits is a normal number, and so are the 16 Ki that follow.
pub const FIRST_PLACE: u16 = 0x2000;

impl Suite {
    /// The kernels, loaded.
    pub fn module(&self) -> Result<Module, LoadError> {
        Module::parse(self.ptx)
    }

    /// The input of every kernel: random words, or the tensor's two planes, whole numbers from −8 to 8 and places.
    pub fn input(&self) -> Vec<u32> {
        let mut x = 1u64;
        let mut random = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 32) as u32
        };
        let Some(tensor) = &self.tensor else { return (0..self.words).map(|_| random()).collect() };
        let plane = tensor.strides[1] as usize / 2;
        let mut elements: Vec<u16> =
            (0..plane).map(|_| half::bf16::from_f32((random() >> 8) as f32 % 17.0 - 8.0).to_bits()).collect();
        elements.extend((0..plane).map(|at| FIRST_PLACE + at as u16));
        elements.chunks(2).map(|two| u32::from(two[0]) | u32::from(two[1]) << 16).collect()
    }

    /// The emulator's output of a kernel.
    ///
    /// # Panics
    /// If the tensor breaks a rule of tensor maps.
    pub fn emulated(&self, module: &Module, kernel: &str, options: Options) -> Result<Vec<u32>, Fault> {
        let mut device = Device::new(options);
        let (from, to) = (device.upload(&self.input()), device.alloc(4 * self.words));
        device.write(to, &UNWRITTEN.to_le_bytes().repeat(self.words))?;
        let mut arguments: Vec<Argument> = Vec::new();
        if let Some(Tensor { extents, strides, shape }) = &self.tensor {
            let map = TensorMap::new(TensorElement::Bf16, from, extents, strides, shape).swizzle(Swizzle::B128);
            arguments.push(map.encode().expect("a tensor that a map takes"));
        }
        arguments.extend([from.into(), to.into()]);
        let grid = Grid::linear(self.blocks, self.threads, 0).clusters([self.blocks, 1, 1]);
        device.launch(module, kernel, grid, &arguments)?;
        device.download(to, self.words)
    }
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

/// Whether a chip's output of a kernel agrees with the emulator's; else the first word that does not, and how many there are.
pub fn compare(kernel: &str, chip: &[u32], emulated: &[u32]) -> Result<(), String> {
    if chip.len() != emulated.len() {
        return Err(format!("{kernel}: {} words, expected {}", chip.len(), emulated.len()));
    }
    let (mut first, mut different) = (None, 0);
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
            different += 1;
            first.get_or_insert_with(|| match (places(kernel, c), places(kernel, e)) {
                (Some(c), Some(e)) => format!("{at}: bytes {c:?} of the operand on the chip, {e:?} here"),
                _ => format!("{at}: {c:#010x} ({x:e}) on the chip, {e:#010x} ({y:e}) here, {bound:?}"),
            });
        }
    }
    first.map_or(Ok(()), |first| Err(format!("{kernel}: {different} words differ; word {first}")))
}

/// From which bytes of shared memory the two elements of an output word came, for kernels that show that; none if it is no place.
fn places(kernel: &str, word: u32) -> Option<[u16; 2]> {
    let first = match kernel.strip_prefix("c_left_").or_else(|| kernel.strip_prefix("c_right_"))? {
        half if half.ends_with("_f16") => 0x0400,
        _ => FIRST_PLACE,
    };
    let byte = |bits: u32| (bits as u16).checked_sub(first).filter(|place| *place < 0x4000).map(|place| 2 * place);
    Some([byte(word)?, byte(word >> 16)?])
}

/// A kernel's output as a line of a golden file.
pub fn to_line(kernel: &str, output: &[u32]) -> String {
    let used = output.iter().rposition(|&word| word != UNWRITTEN).map_or(0, |at| at + 1);
    output[..used].iter().fold(kernel.to_string(), |line, word| format!("{line} {word:08x}"))
}

/// The kernel and its output, of that many words, from such a line.
pub fn from_line(line: &str, words: usize) -> Option<(&str, Vec<u32>)> {
    let mut written = line.split_whitespace();
    let kernel = written.next()?;
    let mut output = written.map(|word| u32::from_str_radix(word, 16).ok()).collect::<Option<Vec<u32>>>()?;
    (output.len() <= words).then(|| output.resize(words, UNWRITTEN))?;
    Some((kernel, output))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_an_output() {
        let mut output = vec![UNWRITTEN; 9];
        output[..3].copy_from_slice(&[1, UNWRITTEN, 0xABC]);
        let line = to_line("c_bits", &output);
        assert_eq!(line, "c_bits 00000001 ffffffff 00000abc");
        assert_eq!(from_line(&line, 9), Some(("c_bits", output)));
        assert_eq!(from_line(&line, 2), None);
        assert_eq!(from_line("c_bits no", 9), None);
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

    #[test]
    fn a_difference_names_the_places() {
        let difference = |kernel, chip, here| compare(kernel, &[0, chip, chip], &[0, here, here]).unwrap_err();
        let found = difference("c_left_depth", 0x2009_2008, 0x2001_2000);
        assert_eq!(
            found,
            "c_left_depth: 2 words differ; word 1: bytes [16, 18] of the operand on the chip, [0, 2] here"
        );
        assert!(difference("c_right_across_f16", 0x0409_0408, 0x0401_0400).contains("bytes [16, 18]"));
        assert!(difference("c_left_depth", 0xFFFF_FFFF, 0x2001_2000).contains("0xffffffff"));
    }
}
