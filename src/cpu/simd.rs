//! Instruction sets: one [`Simd`] type each, one choice at run time.
//!
//! Kernels are written once, generic over [`Simd`], in functions marked `inline(always)`. [`Isa::run`] calls them from a
//! function compiled for the instruction set, so that everything below is compiled for it too. A `Simd` value is only made
//! there, which is why its methods may use the instructions.

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
pub(crate) trait Simd: Copy + Send + Sync {
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
    fn add(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn sub(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn mul(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn div(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// x·y + z.
    fn fma(self, x: Self::Vector, y: Self::Vector, z: Self::Vector) -> Self::Vector;
    fn min(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    fn max(self, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// `value`, but 0 where `gate` ≤ 0. A NaN gate lets the value pass.
    fn zero_unless_positive(self, gate: Self::Vector, value: Self::Vector) -> Self::Vector;
    /// x·2ⁿ for integral n in −151 … 129, rounded once.
    fn scale_by_power(self, x: Self::Vector, n: Self::Vector) -> Self::Vector;
    /// The first `count` lanes of x, the others of y.
    fn first_lanes(self, count: usize, x: Self::Vector, y: Self::Vector) -> Self::Vector;
    /// Whether any lane of x is less than that of y.
    fn any_less(self, x: Self::Vector, y: Self::Vector) -> bool;
    fn horizontal_min(self, x: Self::Vector) -> f32;
    fn horizontal_sum(self, x: Self::Vector) -> f32;
    /// The register tiles of products of `f32`.
    const TILES: &'static ProductTiles;
    /// The register tiles of products of pairs of `bf16`, for [`Isa::Avx512Bf16`] alone.
    const PAIR_TILES: Option<&'static ProductTiles>;
    /// Transposes 8×8 elements.
    ///
    /// # Safety
    /// 8 rows of 8 elements are readable, and writable, at the given strides.
    unsafe fn transpose(self, from: *const f32, from_stride: usize, to: *mut f32, to_stride: usize);

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
pub(crate) struct Panels {
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
pub(crate) type ProductTile = unsafe fn(&Panels, *mut f32, bool);

/// The register tiles of 1 to [`Simd::ROWS`] rows, at `[rows − 1]`.
pub(crate) struct ProductTiles {
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
