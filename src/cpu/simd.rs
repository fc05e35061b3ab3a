//! Instruction sets: one [`Simd`] type each, one choice at run time.
//!
//! Kernels are written once, generic over [`Simd`], in functions marked `inline(always)`. [`Isa::run`] calls them from a
//! function compiled for the instruction set, so that everything below is compiled for it too. A `Simd` value is only made
//! there, which is why its methods may use the instructions.

use crate::element::{bf16, f16};
use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

/// Vectors in a row of a register tile.
pub(crate) const TILE_VECTORS: usize = 2;
/// Elements of the largest register tile.
pub(crate) const MAX_TILE: usize = 14 * 32;
/// Elements of the widest row of a register tile.
pub(crate) const MAX_TILE_WIDTH: usize = 32;
/// Elements of the widest vector.
pub(crate) const MAX_LANES: usize = MAX_TILE_WIDTH / TILE_VECTORS;
/// The bits of √½.
const ROOT_OF_HALF: i32 = 0x3f35_04f3;
/// Rows of the block that [`Simd::transpose`] transposes.
pub(crate) const TRANSPOSE: usize = 8;

/// An instruction set that the CPU kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Isa {
    /// AVX-512 as below, with BF16: products of `bf16` by dot products of pairs.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Plain Rust that the compiler vectorises for the target's baseline.
    Portable,
}

impl Isa {
    /// All of them, best first.
    const ALL: [Isa; 4] = [Isa::Avx512Bf16, Isa::Avx512, Isa::Avx2, Isa::Portable];

    /// The best instruction set that this processor has.
    pub fn detect() -> Self {
        *Self::available().first().expect("the portable kernels run everywhere")
    }

    /// The instruction sets that this processor has, best first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => is_x86_feature_detected!("avx512bf16") && Isa::Avx512.is_available(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && Isa::Avx2.is_available()
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx512Bf16 | Isa::Avx512 | Isa::Avx2 => false,
            Isa::Portable => true,
        }
    }

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Avx512Bf16 => "AVX-512 with BF16",
            Isa::Avx512 => "AVX-512",
            Isa::Avx2 => "AVX2+FMA",
            Isa::Portable => "portable",
        }
    }

    /// [`Error::IsaUnavailable`] unless this processor has it.
    pub(crate) fn check(self) -> Result<Self> {
        if self.is_available() { Ok(self) } else { Err(Error::IsaUnavailable { isa: self.name() }) }
    }

    /// Rows and columns of the register tile.
    pub(crate) fn tile(self) -> (usize, usize) {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 => (Avx512::ROWS, TILE_VECTORS * Avx512::LANES),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => (Avx2::ROWS, TILE_VECTORS * Avx2::LANES),
            _ => (Portable::ROWS, TILE_VECTORS * Portable::LANES),
        }
    }

    /// Runs `task` compiled for this instruction set, which the processor must have: [`check`](Self::check) comes first.
    pub(crate) fn run<T: Task>(self, task: T) -> T::Output {
        match self {
            // SAFETY: `Cpu` only holds an instruction set that `check` has let pass.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 | Isa::Avx512 => unsafe { run_avx512(task) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { run_avx2(task) },
            _ => task.run(Portable),
        }
    }
}

/// Work that is compiled for every instruction set. Implementations of `run` are `inline(always)`.
pub(crate) trait Task {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn run_avx512<T: Task>(task: T) -> T::Output {
    task.run(Avx512(()))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn run_avx2<T: Task>(task: T) -> T::Output {
    task.run(Avx2(()))
}

/// A loop without explicit vectors, compiled for the instruction set.
pub(crate) struct Loop<F: FnOnce()>(pub F);

impl<F: FnOnce()> Task for Loop<F> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        (self.0)()
    }
}

/// Vectors of `f32`.
///
/// `min` and `max` return their second operand if either is NaN, as x86 does, so that `max(0, x)` keeps NaN.
pub trait Simd: Copy + Send + Sync {
    type Vector: Copy;
    /// Elements of a vector.
    const LANES: usize;
    /// Rows of the register tile.
    const ROWS: usize;

    fn splat(self, x: f32) -> Self::Vector;
    /// # Safety
    /// `LANES` elements are readable.
    unsafe fn load_pointer(self, from: *const f32) -> Self::Vector;
    /// # Safety
    /// `LANES` elements are writable.
    unsafe fn store_pointer(self, to: *mut f32, x: Self::Vector);
    /// Asks for the cache line at an address, which need not be readable, to be brought to L2.
    fn prefetch(self, at: *const u8);
    /// Widens.
    ///
    /// # Safety
    /// `LANES` elements are readable.
    unsafe fn load_bf16(self, from: *const bf16) -> Self::Vector;
    /// Rounds to nearest, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// `LANES` elements are writable.
    unsafe fn store_bf16(self, to: *mut bf16, x: Self::Vector);
    /// Widens.
    ///
    /// # Safety
    /// `LANES` elements are readable.
    unsafe fn load_f16(self, from: *const f16) -> Self::Vector;
    /// Rounds to nearest, ties to even; NaN stays NaN.
    ///
    /// # Safety
    /// `LANES` elements are writable.
    unsafe fn store_f16(self, to: *mut f16, x: Self::Vector);
    fn add(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn sub(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn mul(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn div(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn sqrt(self, x: Self::Vector) -> Self::Vector;
    /// x·y + z.
    fn fma(self, x: Self::Vector, y: Self::Vector, z: Self::Vector) -> Self::Vector;
    fn min(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn max(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// `value`, but 0 where `gate` ≤ 0. A NaN gate lets the value pass.
    fn zero_unless_positive(self, gate: Self::Vector, value: Self::Vector) -> Self::Vector;
    /// x·2ⁿ for integral n in −151 … 129, rounded once.
    fn scale_by_power(self, x: Self::Vector, n: Self::Vector) -> Self::Vector;
    /// (m, n) with x = m·2ⁿ and m from √½ to √2, for positive normal numbers.
    fn split_power(self, x: Self::Vector) -> (Self::Vector, Self::Vector);
    /// `then` where x < y, else `other`, also where either is NaN.
    fn where_less(self, x: Self::Vector, y: Self::Vector, then: Self::Vector, other: Self::Vector) -> Self::Vector;
    /// The first `count` lanes of x, the others of y.
    fn first_lanes(self, count: usize, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// Whether any lane of x is less than that of y.
    fn any_less(self, x: Self::Vector, y: Self::Vector) -> bool;
    fn horizontal_min(self, x: Self::Vector) -> f32;
    fn horizontal_sum(self, x: Self::Vector) -> f32;
    /// The register tiles of products of `f32`.
    const TILES: &'static ProductTiles;
    /// The tile of products of `f32` with a few columns.
    const DOT_TILE: DotTile;
    /// The register tiles of products of pairs of `bf16`, for [`Isa::Avx512Bf16`] alone.
    const PAIR_TILES: Option<&'static ProductTiles>;
    /// Transposes 8×8 elements.
    ///
    /// # Safety
    /// 8 rows of 8 elements are readable, and writable, at the given strides.
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);

    /// x/(√y + z) for y, z ≥ 0, within 2 ulp.
    #[inline(always)]
    fn over_root(self, x: Self::Vector, y: Self::Vector, z: Self::Vector) -> Self::Vector {
        self.div(x, self.add(self.sqrt(y), z))
    }
    /// A vector of the first elements, 0 beyond the end.
    #[inline(always)]
    fn load(self, from: &[f32]) -> Self::Vector {
        if from.len() >= Self::LANES {
            // SAFETY: the slice is long enough.
            unsafe { self.load_pointer(from.as_ptr()) }
        } else {
            let mut padded = [0.0; MAX_TILE_WIDTH];
            padded[..from.len()].copy_from_slice(from);
            // SAFETY: the array is at least as long as a vector.
            unsafe { self.load_pointer(padded.as_ptr()) }
        }
    }
    /// Stores as many elements as there is room for.
    #[inline(always)]
    fn store(self, to: &mut [f32], x: Self::Vector) {
        if to.len() >= Self::LANES {
            // SAFETY: the slice is long enough.
            unsafe { self.store_pointer(to.as_mut_ptr(), x) }
        } else {
            let mut padded = [0.0; MAX_TILE_WIDTH];
            // SAFETY: the array is at least as long as a vector.
            unsafe { self.store_pointer(padded.as_mut_ptr(), x) };
            to.copy_from_slice(&padded[..to.len()]);
        }
    }
}

/// How a left panel lies: value `i` of step `k`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LeftLayout {
    /// At `i·step + k`: the panel's rows run along the depth.
    Across,
    /// At `i + k·step`.
    Along,
}

/// What a register tile multiplies: panels of `steps` steps.
pub struct Panels {
    pub steps: usize,
    pub left: *const f32,
    pub left_step: usize,
    /// Two vectors for each step.
    pub right: *const f32,
    pub right_step: usize,
    /// What will be needed next, a cache line for each step: any address will do.
    pub next: *const u8,
    /// In bytes.
    pub next_step: usize,
}

/// `tile (+)= left · right`, for a tile whose rows are two vectors long; the flag says whether to add.
///
/// # Safety
/// The panels have their steps, the tile as many rows as the function is for, and the processor the instruction set.
pub type ProductTile = unsafe fn(&Panels, *mut f32, bool);

/// The register tiles of 1 to [`Simd::ROWS`] rows, at `[rows − 1]`.
pub struct ProductTiles {
    across: &'static [ProductTile],
    along: &'static [ProductTile],
}

impl ProductTiles {
    #[inline(always)]
    pub(crate) fn of(&self, layout: LeftLayout) -> &'static [ProductTile] {
        match layout {
            LeftLayout::Across => self.across,
            LeftLayout::Along => self.along,
        }
    }
}

/// As [`ProductTile`], for a few columns: both panels' rows run along the depth, which is [`LeftLayout::Across`], `left_step` and
/// `right_step` apart. The second and third argument are the numbers of rows and columns.
///
/// # Safety
/// As [`ProductTile`].
pub type DotTile = unsafe fn(&Panels, usize, usize, *mut f32, bool);

/// Steps of the depth that are summed in registers before they are added to the tile in memory. Shorter sums round less.
const DEPTH_CHUNK: usize = 256;

/// A [`ProductTile`]: outer products of a column of `left` and a row of `right`, `ROWS` × 2 accumulators. `multiply_add` is x·y + z of
/// lanes.
///
/// # Safety
/// As [`ProductTile`].
#[inline(always)]
unsafe fn product_tile<S: Simd, const ROWS: usize, const ACROSS: bool>(
    simd: S,
    panels: &Panels,
    tile: *mut f32,
    mut accumulate: bool,
    multiply_add: impl Fn(S::Vector, S::Vector, S::Vector) -> S::Vector,
) {
    let width = TILE_VECTORS * S::LANES;
    let &Panels { steps, mut left, left_step, mut right, right_step, mut next, next_step } = panels;
    let mut done = 0;
    loop {
        let chunk = (steps - done).min(DEPTH_CHUNK);
        let mut sums = [[simd.splat(0.0); TILE_VECTORS]; ROWS];
        for _ in 0..chunk {
            simd.prefetch(next);
            next = next.wrapping_add(next_step);
            // SAFETY: fewer than `steps` steps were taken, for which the panels have room.
            unsafe {
                let r = [simd.load_pointer(right), simd.load_pointer(right.add(S::LANES))];
                for (i, sums) in sums.iter_mut().enumerate() {
                    let l = simd.splat(*left.add(if ACROSS { i * left_step } else { i }));
                    sums[0] = multiply_add(l, r[0], sums[0]);
                    sums[1] = multiply_add(l, r[1], sums[1]);
                }
                left = left.wrapping_add(if ACROSS { 1 } else { left_step });
                right = right.wrapping_add(right_step);
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            for (v, sum) in sums.iter().enumerate() {
                // SAFETY: the tile has ROWS rows of two vectors.
                unsafe {
                    let to = tile.add(i * width + v * S::LANES);
                    let before = if accumulate { simd.load_pointer(to) } else { simd.splat(0.0) };
                    simd.store_pointer(to, simd.add(before, *sum));
                }
            }
        }
        accumulate = true;
        done += chunk;
        if done == steps {
            return;
        }
    }
}

/// `ROWS` × `COLS` dot products along the depth, whose vectors are added up at the end.
///
/// # Safety
/// As [`DotTile`].
#[inline(always)]
unsafe fn dot_block<S: Simd, const ROWS: usize, const COLS: usize>(
    simd: S,
    panels: &Panels,
    (first_row, first_col): (usize, usize),
    tile: *mut f32,
    accumulate: bool,
) {
    let &Panels { steps, left, left_step, right, right_step, .. } = panels;
    let mut sums = [[simd.splat(0.0); COLS]; ROWS];
    for k in (0..steps).step_by(S::LANES) {
        let count = (steps - k).min(S::LANES);
        // SAFETY: rows and columns of the panels, which have `steps` steps.
        let at = |panel: *const f32, index: usize| unsafe {
            let from = panel.add(index + k);
            if count == S::LANES { simd.load_pointer(from) } else { simd.load(std::slice::from_raw_parts(from, count)) }
        };
        let right: [S::Vector; COLS] = std::array::from_fn(|j| at(right, (first_col + j) * right_step));
        for (i, sums) in sums.iter_mut().enumerate() {
            let left = at(left, (first_row + i) * left_step);
            for (sum, right) in sums.iter_mut().zip(right) {
                *sum = simd.fma(left, right, *sum);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (j, sum) in sums.iter().enumerate() {
            // SAFETY: a row and a column of the tile.
            let out = unsafe { &mut *tile.add((first_row + i) * TILE_VECTORS * S::LANES + first_col + j) };
            *out = if accumulate { *out } else { 0.0 } + simd.horizontal_sum(*sum);
        }
    }
}

/// A [`DotTile`], in blocks of 4×4.
///
/// # Safety
/// As [`DotTile`].
#[inline(always)]
unsafe fn dot_tile<S: Simd>(simd: S, panels: &Panels, rows: usize, cols: usize, tile: *mut f32, accumulate: bool) {
    let (mut row, mut col);
    row = 0;
    while row < rows {
        let tall = rows - row >= 4;
        col = 0;
        while col < cols {
            let wide = cols - col >= 4;
            // SAFETY: the caller's promise.
            unsafe {
                match (tall, wide) {
                    (true, true) => dot_block::<S, 4, 4>(simd, panels, (row, col), tile, accumulate),
                    (true, false) => dot_block::<S, 4, 1>(simd, panels, (row, col), tile, accumulate),
                    (false, true) => dot_block::<S, 1, 4>(simd, panels, (row, col), tile, accumulate),
                    (false, false) => dot_block::<S, 1, 1>(simd, panels, (row, col), tile, accumulate),
                }
            }
            col += if wide { 4 } else { 1 };
        }
        row += if tall { 4 } else { 1 };
    }
}

// The tiles are functions of their own: shared by all epilogues, and inlined between an epilogue's code the portable loop is not
// vectorised and 4 times slower.

/// Functions that are [`product_tile`] compiled for an instruction set, and the table of them.
macro_rules! product_tiles {
    ($table:ident, $function:ident, $simd:expr, $multiply_add:expr, [$($rows:literal)*], $(#[$attribute:meta])*) => {
        /// # Safety
        /// As [`ProductTile`].
        $(#[$attribute])*
        unsafe fn $function<const ROWS: usize, const ACROSS: bool>(
            panels: &Panels,
            tile: *mut f32,
            accumulate: bool,
        ) {
            // SAFETY: the caller's promise.
            unsafe {
                product_tile::<_, ROWS, ACROSS>($simd, panels, tile, accumulate, $multiply_add)
            }
        }
        static $table: ProductTiles =
            ProductTiles { across: &[$($function::<$rows, true>),*], along: &[$($function::<$rows, false>),*] };
    };
}

/// # Safety
/// As [`DotTile`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn dot_avx512(panels: &Panels, rows: usize, cols: usize, tile: *mut f32, accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe { dot_tile(Avx512(()), panels, rows, cols, tile, accumulate) }
}

/// # Safety
/// As [`DotTile`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_avx2(panels: &Panels, rows: usize, cols: usize, tile: *mut f32, accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe { dot_tile(Avx2(()), panels, rows, cols, tile, accumulate) }
}

/// # Safety
/// As [`DotTile`].
#[inline(never)]
unsafe fn dot_portable(panels: &Panels, rows: usize, cols: usize, tile: *mut f32, accumulate: bool) {
    // SAFETY: the caller's promise.
    unsafe { dot_tile(Portable, panels, rows, cols, tile, accumulate) }
}

#[cfg(target_arch = "x86_64")]
product_tiles! {
    TILES_AVX512, tile_avx512, Avx512(()), |x, y, z| Avx512(()).fma(x, y, z),
    [1 2 3 4 5 6 7 8 9 10 11 12 13 14],
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
}

#[cfg(target_arch = "x86_64")]
product_tiles! {
    TILES_AVX512_PAIRS, tile_avx512_pairs, Avx512(()), |x, y, z| dot_pairs(x, y, z),
    [1 2 3 4 5 6 7 8 9 10 11 12 13 14],
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
}

#[cfg(target_arch = "x86_64")]
product_tiles! {
    TILES_AVX2, tile_avx2, Avx2(()), |x, y, z| Avx2(()).fma(x, y, z),
    [1 2 3 4 5 6],
    #[target_feature(enable = "avx2,fma,f16c")]
}

product_tiles! {
    TILES_PORTABLE, tile_portable, Portable, |x, y, z| Portable.fma(x, y, z),
    [1 2 3 4],
    #[inline(never)]
}

/// AVX-512: 14×32, 28 accumulators of the 32 registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// AVX2: 6×16, 12 accumulators of the 16 registers.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Arrays of 4: 4×8, 8 accumulators of the 16 registers of SSE2 or the 32 of NEON.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

// In these implementations every intrinsic's SAFETY is that a value of the type exists only below `Isa::run`.

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx512 {
    type Vector = __m512;
    const LANES: usize = 16;
    const ROWS: usize = 14;
    const TILES: &'static ProductTiles = &TILES_AVX512;
    const DOT_TILE: DotTile = dot_avx512;
    const PAIR_TILES: Option<&'static ProductTiles> = Some(&TILES_AVX512_PAIRS);

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_pointer(self, from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store_pointer(self, to: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, x: __m512) {
        // Not the instruction of AVX512-BF16: it takes subnormal numbers for 0.
        unsafe {
            let bits = _mm512_castps_si512(x);
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
            let rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
            let quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x0040_0000));
            let rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), quiet);
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(rounded)));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, x: __m512) {
        unsafe { _mm256_storeu_si256(to.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    fn add(self, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_add_ps(x, y) }
    }
    #[inline(always)]
    fn sub(self, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(x, y) }
    }
    #[inline(always)]
    fn mul(self, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(x, y) }
    }
    #[inline(always)]
    fn div(self, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_div_ps(x, y) }
    }
    #[inline(always)]
    fn sqrt(self, x: __m512) -> __m512 {
        unsafe { _mm512_sqrt_ps(x) }
    }
    #[inline(always)]
    fn over_root(self, x: __m512, y: __m512, z: __m512) -> __m512 {
        // From 14-bit estimates: the divider takes 50 cycles for the root and the quotient, this takes 20 (Zen 4).
        unsafe {
            let estimate = _mm512_rsqrt14_ps(y);
            let root = _mm512_mul_ps(y, estimate);
            let half = _mm512_mul_ps(estimate, _mm512_set1_ps(0.5));
            let root = _mm512_fmadd_ps(half, _mm512_fnmadd_ps(root, root, y), root);
            // √0 is 0, not 0·∞.
            let root = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(y, _mm512_setzero_ps()), root);
            let d = _mm512_add_ps(root, z);
            let estimate = _mm512_rcp14_ps(d);
            let inverse = _mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(d, estimate, _mm512_set1_ps(1.0)), estimate);
            let quotient = _mm512_mul_ps(x, inverse);
            let rounded = _mm512_fmadd_ps(inverse, _mm512_fnmadd_ps(d, quotient, x), quotient);
            // What is near the limits of the format, or not finite, is left to the divider.
            let ordinary = _mm512_mask_cmp_ps_mask::<_CMP_LT_OQ>(
                _mm512_cmp_ps_mask::<_CMP_GT_OQ>(d, _mm512_set1_ps(1e-12)),
                _mm512_max_ps(d, _mm512_abs_ps(quotient)),
                _mm512_set1_ps(1e18),
            );
            if ordinary == u16::MAX {
                return rounded;
            }
            // Lane by lane: what a number becomes does not depend on its neighbours.
            _mm512_mask_mov_ps(_mm512_div_ps(x, _mm512_add_ps(_mm512_sqrt_ps(y), z)), ordinary, rounded)
        }
    }
    #[inline(always)]
    fn fma(self, x: __m512, y: __m512, z: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(x, y, z) }
    }
    #[inline(always)]
    fn min(self, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_min_ps(x, y) }
    }
    #[inline(always)]
    fn max(self, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_max_ps(x, y) }
    }
    #[inline(always)]
    fn zero_unless_positive(self, gate: __m512, value: __m512) -> __m512 {
        unsafe {
            let open = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(gate, _mm512_setzero_ps());
            _mm512_maskz_mov_ps(open, value)
        }
    }
    #[inline(always)]
    fn scale_by_power(self, x: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(x, n) }
    }
    #[inline(always)]
    fn split_power(self, x: __m512) -> (__m512, __m512) {
        unsafe {
            let bits = _mm512_castps_si512(x);
            let n = _mm512_srai_epi32::<23>(_mm512_sub_epi32(bits, _mm512_set1_epi32(ROOT_OF_HALF)));
            let m = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32::<23>(n)));
            (m, _mm512_cvtepi32_ps(n))
        }
    }
    #[inline(always)]
    fn where_less(self, x: __m512, y: __m512, then: __m512, other: __m512) -> __m512 {
        unsafe { _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, y), then) }
    }
    #[inline(always)]
    fn first_lanes(self, count: usize, x: __m512, y: __m512) -> __m512 {
        let mask = if count >= 16 { u16::MAX } else { (1 << count) - 1 };
        unsafe { _mm512_mask_mov_ps(y, mask, x) }
    }
    #[inline(always)]
    fn any_less(self, x: __m512, y: __m512) -> bool {
        unsafe { _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x, y) != 0 }
    }
    #[inline(always)]
    fn horizontal_min(self, x: __m512) -> f32 {
        unsafe { _mm512_reduce_min_ps(x) }
    }
    #[inline(always)]
    fn horizontal_sum(self, x: __m512) -> f32 {
        unsafe { _mm512_reduce_add_ps(x) }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        unsafe { transpose_avx(from, from_stride, to, to_stride) }
    }
    #[inline(always)]
    fn load(self, from: &[f32]) -> __m512 {
        if from.len() >= 16 {
            return unsafe { _mm512_loadu_ps(from.as_ptr()) };
        }
        unsafe { _mm512_maskz_loadu_ps((1 << from.len()) - 1, from.as_ptr()) }
    }
    #[inline(always)]
    fn store(self, to: &mut [f32], x: __m512) {
        if to.len() >= 16 {
            return unsafe { _mm512_storeu_ps(to.as_mut_ptr(), x) };
        }
        unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), (1 << to.len()) - 1, x) }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(clippy::undocumented_unsafe_blocks)]
impl Simd for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;
    const ROWS: usize = 6;
    const TILES: &'static ProductTiles = &TILES_AVX2;
    const DOT_TILE: DotTile = dot_avx2;
    const PAIR_TILES: Option<&'static ProductTiles> = None;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_pointer(self, from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store_pointer(self, to: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(to, x) }
    }
    #[inline(always)]
    fn prefetch(self, at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m256 {
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, x: __m256) {
        unsafe {
            let bits = _mm256_castps_si256(x);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let nan = _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x);
            let rounded = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
            let words = _mm256_srli_epi32::<16>(_mm256_castps_si256(rounded));
            // Packed within each half; the halves' first quarters are the result.
            let packed = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(words, words));
            _mm_storeu_si128(to.cast(), _mm256_castsi256_si128(packed));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, x: __m256) {
        unsafe { _mm_storeu_si128(to.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    fn add(self, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_add_ps(x, y) }
    }
    #[inline(always)]
    fn sub(self, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(x, y) }
    }
    #[inline(always)]
    fn mul(self, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(x, y) }
    }
    #[inline(always)]
    fn div(self, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_div_ps(x, y) }
    }
    #[inline(always)]
    fn sqrt(self, x: __m256) -> __m256 {
        unsafe { _mm256_sqrt_ps(x) }
    }
    #[inline(always)]
    fn fma(self, x: __m256, y: __m256, z: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(x, y, z) }
    }
    #[inline(always)]
    fn min(self, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_min_ps(x, y) }
    }
    #[inline(always)]
    fn max(self, x: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_max_ps(x, y) }
    }
    #[inline(always)]
    fn zero_unless_positive(self, gate: __m256, value: __m256) -> __m256 {
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLE_UQ>(gate, _mm256_setzero_ps()), value) }
    }
    #[inline(always)]
    fn scale_by_power(self, x: __m256, n: __m256) -> __m256 {
        // In two halves, each of which is the exponent of a normal number; only the last product rounds.
        unsafe {
            let n = _mm256_cvtps_epi32(n);
            let half = _mm256_srai_epi32::<1>(n);
            let bias = _mm256_set1_epi32(127);
            let power = |n| _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(n, bias)));
            _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(n, half)))
        }
    }
    #[inline(always)]
    fn split_power(self, x: __m256) -> (__m256, __m256) {
        unsafe {
            let bits = _mm256_castps_si256(x);
            let n = _mm256_srai_epi32::<23>(_mm256_sub_epi32(bits, _mm256_set1_epi32(ROOT_OF_HALF)));
            let m = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32::<23>(n)));
            (m, _mm256_cvtepi32_ps(n))
        }
    }
    #[inline(always)]
    fn where_less(self, x: __m256, y: __m256, then: __m256, other: __m256) -> __m256 {
        unsafe { _mm256_blendv_ps(other, then, _mm256_cmp_ps::<_CMP_LT_OQ>(x, y)) }
    }
    #[inline(always)]
    fn first_lanes(self, count: usize, x: __m256, y: __m256) -> __m256 {
        unsafe {
            let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            let mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count.min(8) as i32), lanes);
            _mm256_blendv_ps(y, x, _mm256_castsi256_ps(mask))
        }
    }
    #[inline(always)]
    fn any_less(self, x: __m256, y: __m256) -> bool {
        unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, y)) != 0 }
    }
    #[inline(always)]
    fn horizontal_min(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_min_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_min_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_min_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    fn horizontal_sum(self, x: __m256) -> f32 {
        unsafe {
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        }
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        unsafe { transpose_avx(from, from_stride, to, to_stride) }
    }
}

/// x·y + z for lanes of two `bf16` each in x and y: both products are added, the second value's first. Subnormal numbers count as 0.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn dot_pairs(x: __m512, y: __m512, z: __m512) -> __m512 {
    // SAFETY: both are vectors of 512 bits.
    unsafe {
        _mm512_dpbf16_ps(z, std::mem::transmute::<__m512, __m512bh>(x), std::mem::transmute::<__m512, __m512bh>(y))
    }
}

/// 8×8 by pairs, then fours, then halves.
///
/// # Safety
/// As [`Simd::transpose`]; the processor has AVX.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[allow(clippy::undocumented_unsafe_blocks)] // The caller's promise covers the whole body.
unsafe fn transpose_avx(from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
    unsafe {
        let zero = _mm256_setzero_ps();
        let (mut pairs, mut fours) = ([zero; 8], [zero; 8]);
        for i in 0..4 {
            let top = _mm256_loadu_ps(from.add(2 * i * from_stride));
            let bottom = _mm256_loadu_ps(from.add((2 * i + 1) * from_stride));
            pairs[2 * i] = _mm256_unpacklo_ps(top, bottom);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(top, bottom);
        }
        for i in 0..2 {
            let p = &pairs[4 * i..4 * i + 4];
            fours[4 * i] = _mm256_shuffle_ps::<0x44>(p[0], p[2]);
            fours[4 * i + 1] = _mm256_shuffle_ps::<0xee>(p[0], p[2]);
            fours[4 * i + 2] = _mm256_shuffle_ps::<0x44>(p[1], p[3]);
            fours[4 * i + 3] = _mm256_shuffle_ps::<0xee>(p[1], p[3]);
        }
        for i in 0..4 {
            let (top, bottom) = (fours[i], fours[i + 4]);
            _mm256_storeu_ps(to.add(i * to_stride), _mm256_permute2f128_ps::<0x20>(top, bottom));
            _mm256_storeu_ps(to.add((i + 4) * to_stride), _mm256_permute2f128_ps::<0x31>(top, bottom));
        }
    }
}

/// x·y + z in one rounding where the target has it; elsewhere a call to the library would cost more than it gives.
#[inline(always)]
fn fused(x: f32, y: f32, z: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) { x.mul_add(y, z) } else { x * y + z }
}

macro_rules! lanes {
    (|$i:ident| $e:expr) => {{
        let mut out = [0.0f32; 4];
        for $i in 0..4 {
            out[$i] = $e;
        }
        out
    }};
}

impl Simd for Portable {
    type Vector = [f32; 4];
    const LANES: usize = 4;
    const ROWS: usize = 4;
    const TILES: &'static ProductTiles = &TILES_PORTABLE;
    const DOT_TILE: DotTile = dot_portable;
    const PAIR_TILES: Option<&'static ProductTiles> = None;

    #[inline(always)]
    fn splat(self, x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load_pointer(self, from: *const f32) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_pointer(self, to: *mut f32, x: [f32; 4]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(x) }
    }
    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[bf16; 4]>().read_unaligned() }.map(bf16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_bf16(self, to: *mut bf16, x: [f32; 4]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[bf16; 4]>().write_unaligned(x.map(bf16::from_f32)) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { from.cast::<[f16; 4]>().read_unaligned() }.map(f16::to_f32)
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut f16, x: [f32; 4]) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f16; 4]>().write_unaligned(x.map(f16::from_f32)) }
    }
    #[inline(always)]
    fn add(self, x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        lanes!(|i| x[i] + y[i])
    }
    #[inline(always)]
    fn sub(self, x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        lanes!(|i| x[i] - y[i])
    }
    #[inline(always)]
    fn mul(self, x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        lanes!(|i| x[i] * y[i])
    }
    #[inline(always)]
    fn div(self, x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        lanes!(|i| x[i] / y[i])
    }
    #[inline(always)]
    fn sqrt(self, x: [f32; 4]) -> [f32; 4] {
        lanes!(|i| x[i].sqrt())
    }
    #[inline(always)]
    fn fma(self, x: [f32; 4], y: [f32; 4], z: [f32; 4]) -> [f32; 4] {
        lanes!(|i| fused(x[i], y[i], z[i]))
    }
    #[inline(always)]
    fn min(self, x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        lanes!(|i| if x[i] < y[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn max(self, x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        lanes!(|i| if x[i] > y[i] { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn zero_unless_positive(self, gate: [f32; 4], value: [f32; 4]) -> [f32; 4] {
        lanes!(|i| if gate[i] <= 0.0 { 0.0 } else { value[i] })
    }
    #[inline(always)]
    fn scale_by_power(self, x: [f32; 4], n: [f32; 4]) -> [f32; 4] {
        // As for AVX2.
        let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
        lanes!(|i| {
            let n = n[i] as i32;
            x[i] * power(n >> 1) * power(n - (n >> 1))
        })
    }
    #[inline(always)]
    fn split_power(self, x: [f32; 4]) -> ([f32; 4], [f32; 4]) {
        // Also for what is no positive normal number, whose lanes are thrown away.
        let power = |x: f32| (x.to_bits() as i32).wrapping_sub(ROOT_OF_HALF) >> 23;
        let mantissa = |x: f32| f32::from_bits(x.to_bits().wrapping_sub((power(x) as u32) << 23));
        (x.map(mantissa), lanes!(|i| power(x[i]) as f32))
    }
    #[inline(always)]
    fn where_less(self, x: [f32; 4], y: [f32; 4], then: [f32; 4], other: [f32; 4]) -> [f32; 4] {
        lanes!(|i| if x[i] < y[i] { then[i] } else { other[i] })
    }
    #[inline(always)]
    fn first_lanes(self, count: usize, x: [f32; 4], y: [f32; 4]) -> [f32; 4] {
        lanes!(|i| if i < count { x[i] } else { y[i] })
    }
    #[inline(always)]
    fn any_less(self, x: [f32; 4], y: [f32; 4]) -> bool {
        x.iter().zip(&y).any(|(x, y)| x < y)
    }
    #[inline(always)]
    fn horizontal_min(self, x: [f32; 4]) -> f32 {
        x[0].min(x[1]).min(x[2].min(x[3]))
    }
    #[inline(always)]
    fn horizontal_sum(self, x: [f32; 4]) -> f32 {
        (x[0] + x[2]) + (x[1] + x[3])
    }
    #[inline(always)]
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize) {
        for i in 0..TRANSPOSE {
            for j in 0..TRANSPOSE {
                // SAFETY: the caller's promise.
                unsafe { *to.add(j * to_stride + i) = *from.add(i * from_stride + j) };
            }
        }
    }
}
