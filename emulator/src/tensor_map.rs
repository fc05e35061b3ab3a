//! Tensor maps: what `cuTensorMapEncodeTiled` makes, in an encoding of the emulator's own.
//!
//! The driver's 128 bytes are opaque, so the emulator has its own, little-endian:
//!
//! | bytes | |
//! |---|---|
//! | 0..8 | the letters `ptxTMAP1` |
//! | 8..16 | global address |
//! | 16..48 | strides of dimensions 1 to 4, in bytes |
//! | 48..68 | sizes of dimensions 0 to 4, less one |
//! | 68..78 | box, in elements |
//! | 78..83 | element strides |
//! | 83, 84, 85 | rank, bytes of an element, swizzle span in bytes / 16 (0 without) |
//! | 86..128 | zero |

use crate::{Argument, DevicePointer};

/// The type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorElement {
    /// `CU_TENSOR_MAP_DATA_TYPE_FLOAT16`
    F16,
    /// `CU_TENSOR_MAP_DATA_TYPE_BFLOAT16`
    Bf16,
    /// `CU_TENSOR_MAP_DATA_TYPE_FLOAT32`
    F32,
}

impl TensorElement {
    fn bytes(self) -> u32 {
        if self == TensorElement::F32 { 4 } else { 2 }
    }
}

/// How chunks of 16 bytes are exchanged in shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Swizzle {
    /// `CU_TENSOR_MAP_SWIZZLE_NONE`
    #[default]
    None,
    /// `CU_TENSOR_MAP_SWIZZLE_32B`
    B32,
    /// `CU_TENSOR_MAP_SWIZZLE_64B`
    B64,
    /// `CU_TENSOR_MAP_SWIZZLE_128B`
    B128,
}

impl Swizzle {
    /// Bytes within which chunks are exchanged; 16, one chunk, without swizzle.
    pub(crate) fn span(self) -> u32 {
        16 << self as u32
    }

    /// Where the byte at a shared address really is: bits 4 and up are XORed with those from bit 7 up. `base` is taken
    /// from the row first, for patterns that do not start at a multiple of their size.
    #[inline]
    pub(crate) fn apply(self, address: u32, base: u32) -> u32 {
        address ^ ((((address >> 7).wrapping_sub(base)) & ((1 << self as u32) - 1)) << 4)
    }
}

/// Why a tensor map is refused: `cuTensorMapEncodeTiled` would answer `CUDA_ERROR_INVALID_VALUE`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorMapError {
    /// Between 1 and 5 dimensions.
    #[error("{0} dimensions: a tensor map has 1 to 5")]
    Rank(usize),
    /// One stride for each dimension but the first, a box size and an element stride for each.
    #[error("{name} has {found} entries for {rank} dimensions, {want} are needed")]
    Count {
        /// Which list.
        name: &'static str,
        /// Its length.
        found: usize,
        /// The length that fits.
        want: usize,
        /// Dimensions.
        rank: usize,
    },
    /// The address must be a multiple of 16.
    #[error("the global address {0:#x} is not a multiple of 16")]
    Address(u64),
    /// Sizes are 1 to 2^32.
    #[error("dimension {dimension} has {size} elements, allowed are 1 to 2^32")]
    Size {
        /// Which.
        dimension: usize,
        /// Its size.
        size: u64,
    },
    /// Strides are multiples of 16 below 2^40.
    #[error("the stride of dimension {dimension} is {stride} bytes, allowed are multiples of 16 below 2^40")]
    Stride {
        /// Which.
        dimension: usize,
        /// Its stride.
        stride: u64,
    },
    /// Boxes are 1 to 256 elements wide.
    #[error("the box has {size} elements in dimension {dimension}, allowed are 1 to 256")]
    Box {
        /// Which.
        dimension: usize,
        /// Its size.
        size: u32,
    },
    /// Element strides are 1 to 8.
    #[error("the element stride of dimension {dimension} is {stride}, allowed are 1 to 8")]
    ElementStride {
        /// Which.
        dimension: usize,
        /// The stride.
        stride: u32,
    },
    /// A row of the box is a multiple of 16 bytes.
    #[error("a row of the box has {0} bytes, not a multiple of 16")]
    RowBytes(u32),
    /// A row of the box must not be longer than the swizzle's span.
    #[error("a row of the box has {bytes} bytes, the swizzle spans {span}: make the box narrower")]
    RowAboveSpan {
        /// Bytes of a row.
        bytes: u32,
        /// The span.
        span: u32,
    },
    /// The driver takes rows shorter than the swizzle's span, but their layout in shared memory is not documented.
    #[error("a row of the box has {bytes} bytes, the swizzle spans {span}: the emulator takes full spans only")]
    RowBelowSpan {
        /// Bytes of a row.
        bytes: u32,
        /// The span.
        span: u32,
    },
}

/// A tensor in global memory and the box that one instruction copies: the arguments of `cuTensorMapEncodeTiled` with
/// interleave `NONE` and zeros outside the tensor. Dimension 0 is contiguous.
///
/// ```
/// # use ptx_emulator::{Swizzle, TensorElement, TensorMap};
/// // 100 rows of 200 bf16, 416 bytes apart, in boxes of 64 rows of 64 elements.
/// let map = TensorMap::new(TensorElement::Bf16, 0x7_0000_0000, &[200, 100], &[416], &[64, 64]).swizzle(Swizzle::B128);
/// let argument: ptx_emulator::Argument = map.encode()?;
/// # Ok::<(), ptx_emulator::TensorMapError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorMap {
    element: TensorElement,
    address: DevicePointer,
    dims: Vec<u64>,
    strides: Vec<u64>,
    box_dims: Vec<u32>,
    element_strides: Vec<u32>,
    swizzle: Swizzle,
}

const MAGIC: &[u8; 8] = b"ptxTMAP1";

impl TensorMap {
    /// `dims` in elements, `strides` in bytes for each dimension but the first, `box_dims` in elements; no swizzle.
    pub fn new(
        element: TensorElement,
        address: DevicePointer,
        dims: &[u64],
        strides: &[u64],
        box_dims: &[u32],
    ) -> TensorMap {
        TensorMap {
            element,
            address,
            dims: dims.to_vec(),
            strides: strides.to_vec(),
            box_dims: box_dims.to_vec(),
            element_strides: vec![1; dims.len()],
            swizzle: Swizzle::None,
        }
    }

    /// The same with a swizzle.
    pub fn swizzle(self, swizzle: Swizzle) -> TensorMap {
        TensorMap { swizzle, ..self }
    }

    /// The same with a step along each dimension; that of dimension 0 is ignored, as the driver does.
    pub fn element_strides(self, strides: &[u32]) -> TensorMap {
        TensorMap { element_strides: strides.to_vec(), ..self }
    }

    /// The argument of a kernel, or the rule of `cuTensorMapEncodeTiled` that is broken.
    pub fn encode(&self) -> Result<Argument, TensorMapError> {
        Ok(Argument::bytes(&self.to_bytes()?))
    }

    /// The 128 bytes.
    pub fn to_bytes(&self) -> Result<[u8; 128], TensorMapError> {
        let rank = self.dims.len();
        if !(1..=5).contains(&rank) {
            return Err(TensorMapError::Rank(rank));
        }
        for (name, found, want) in [
            ("strides", self.strides.len(), rank - 1),
            ("box_dims", self.box_dims.len(), rank),
            ("element_strides", self.element_strides.len(), rank),
        ] {
            if found != want {
                return Err(TensorMapError::Count { name, found, want, rank });
            }
        }
        if !self.address.is_multiple_of(16) {
            return Err(TensorMapError::Address(self.address));
        }
        for (dimension, &size) in self.dims.iter().enumerate() {
            if !(1..=1 << 32).contains(&size) {
                return Err(TensorMapError::Size { dimension, size });
            }
        }
        for (i, &stride) in self.strides.iter().enumerate() {
            if !stride.is_multiple_of(16) || stride >= 1 << 40 {
                return Err(TensorMapError::Stride { dimension: i + 1, stride });
            }
        }
        for (dimension, (&size, &stride)) in self.box_dims.iter().zip(&self.element_strides).enumerate() {
            if !(1..=256).contains(&size) {
                return Err(TensorMapError::Box { dimension, size });
            }
            if !(1..=8).contains(&stride) {
                return Err(TensorMapError::ElementStride { dimension, stride });
            }
        }
        let (bytes, span) = (self.box_dims[0] * self.element.bytes(), self.swizzle.span());
        if !bytes.is_multiple_of(16) {
            return Err(TensorMapError::RowBytes(bytes));
        }
        if self.swizzle != Swizzle::None && bytes > span {
            return Err(TensorMapError::RowAboveSpan { bytes, span });
        }
        if self.swizzle != Swizzle::None && bytes < span {
            return Err(TensorMapError::RowBelowSpan { bytes, span });
        }
        let mut out = [0; 128];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(8, &self.address.to_le_bytes());
        for (i, stride) in self.strides.iter().enumerate() {
            put(16 + 8 * i, &stride.to_le_bytes());
        }
        for i in 0..rank {
            put(48 + 4 * i, &((self.dims[i] - 1) as u32).to_le_bytes());
            put(68 + 2 * i, &(self.box_dims[i] as u16).to_le_bytes());
            put(78 + i, &[if i == 0 { 1 } else { self.element_strides[i] as u8 }]);
        }
        put(83, &[rank as u8, self.element.bytes() as u8, self.swizzle as u8]);
        Ok(out)
    }
}

/// A piece of a box: at most 16 bytes, a power of two, aligned on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Shared address, swizzled.
    pub shared: u32,
    /// Global address; none outside the tensor.
    pub global: Option<u64>,
    pub bytes: u8,
}

/// A tensor map as the machine reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Decoded {
    pub rank: usize,
    pub swizzle: Swizzle,
    address: u64,
    strides: [u64; 5],
    dims: [u64; 5],
    /// Elements of the box that are copied.
    counts: [u32; 5],
    steps: [u32; 5],
}

impl Decoded {
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Decoded> {
        if bytes.len() != 128 || &bytes[..8] != MAGIC {
            return None;
        }
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let rank = usize::from(bytes[83]);
        let swizzle = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128][usize::from(bytes[85])];
        let (mut strides, mut dims, mut counts, mut steps) = ([bytes[84].into(); 5], [1; 5], [1; 5], [1; 5]);
        for i in 0..rank {
            if i > 0 {
                strides[i] = u64_at(8 + 8 * i);
            }
            dims[i] = 1 + (u64_at(48 + 4 * i) & 0xFFFF_FFFF);
            steps[i] = bytes[78 + i].into();
            let size = u32::from(bytes[68 + 2 * i]) + u32::from(bytes[69 + 2 * i]) * 256;
            counts[i] = size.div_ceil(steps[i]);
        }
        Some(Decoded { rank, swizzle, address: u64_at(8), strides, dims, counts, steps })
    }

    /// Bytes in shared memory, and of a transaction.
    pub(crate) fn bytes(&self) -> u32 {
        self.counts.iter().product::<u32>() * self.strides[0] as u32
    }

    /// The box at these coordinates, which starts at shared address `to`.
    pub(crate) fn pieces(&self, to: u32, at: [i32; 5]) -> Vec<Piece> {
        let (element, row_bytes) = (self.strides[0], self.counts[0] * self.strides[0] as u32);
        let mut pieces = Vec::with_capacity(self.bytes() as usize / 16);
        let rows: u32 = self.counts[1..].iter().product();
        for row in 0..rows {
            // The row's place in the tensor, if it is inside.
            let mut global = Some(self.address);
            let mut left = row;
            for i in 1..5 {
                let place = i64::from(at[i]) + i64::from(left % self.counts[i] * self.steps[i]);
                left /= self.counts[i];
                let inside = place >= 0 && (place as u64) < self.dims[i];
                global = global.filter(|_| inside).map(|g| g + place as u64 * self.strides[i]);
            }
            for chunk in (0..row_bytes).step_by(16) {
                let shared = self.swizzle.apply(to + row * row_bytes + chunk, 0);
                // First and last byte of the chunk that are inside, from its start.
                let start = i64::from(at[0]) * element as i64 + i64::from(chunk);
                let (first, last) = ((-start).clamp(0, 16), ((self.dims[0] * element) as i64 - start).clamp(0, 16));
                let (first, last) = if global.is_some() && first < last { (first, last) } else { (16, 16) };
                let mut done = 0i64;
                while done < 16 {
                    let inside = done >= first && done < last;
                    let end = if done < first {
                        first
                    } else if inside {
                        last
                    } else {
                        16
                    };
                    let source = global.filter(|_| inside).map(|g| g.wrapping_add((start + done) as u64));
                    let mut bytes = 16i64;
                    while done % bytes != 0 || done + bytes > end || source.is_some_and(|g| g % bytes as u64 != 0) {
                        bytes /= 2;
                    }
                    pieces.push(Piece { shared: shared + done as u32, global: source, bytes: bytes as u8 });
                    done += bytes;
                }
            }
        }
        pieces
    }
}

/// A stretch of memory in pieces of 16 bytes.
pub(crate) fn linear(shared: u32, global: u64, bytes: u32) -> Vec<Piece> {
    (0..bytes)
        .step_by(16)
        .map(|i| Piece { shared: shared + i, global: Some(global + u64::from(i)), bytes: 16 })
        .collect()
}
