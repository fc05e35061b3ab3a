//! Element types: what matrices are stored in and what sums are kept in.

use bytemuck::Pod;
pub use half::{bf16, f16};

/// A floating-point type that matrices can be stored in: `f32`, `bf16`, `f16`, and `f64` for the reference.
pub trait Element: Pod + Send + Sync + PartialEq + PartialOrd + std::fmt::Debug + std::fmt::Display {
    /// Name as safetensors and NumPy's users know it.
    const NAME: &'static str;
    /// Unit roundoff: half the distance from 1 to the next number.
    const UNIT_ROUNDOFF: f64;
    /// Exact for every element type.
    fn to_f64(self) -> f64;
    /// Rounds to nearest, ties to even.
    fn from_f64(value: f64) -> Self;
    /// Exact for all but `f64`.
    fn to_f32(self) -> f32;
    /// Rounds to nearest, ties to even.
    fn from_f32(value: f32) -> Self;
    /// Widens `source` into `target`; both have the same length.
    fn widen(source: &[Self], target: &mut [f32]) {
        for (t, s) in target.iter_mut().zip(source) {
            *t = s.to_f32();
        }
    }
    /// Rounds `source` into `target`; both have the same length.
    fn narrow(source: &[f32], target: &mut [Self]) {
        for (t, s) in target.iter_mut().zip(source) {
            *t = Self::from_f32(*s);
        }
    }
}

/// What the backends but the reference store: `f32`, `bf16` and `f16`. Nobody else can name it, so their lists of types are closed.
pub trait StorageType {}
impl StorageType for f32 {}
impl StorageType for bf16 {}
impl StorageType for f16 {}

impl Element for f64 {
    const NAME: &'static str = "f64";
    const UNIT_ROUNDOFF: f64 = f64::EPSILON / 2.0;
    fn to_f64(self) -> f64 {
        self
    }
    fn from_f64(value: f64) -> Self {
        value
    }
    fn to_f32(self) -> f32 {
        self as f32
    }
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    const UNIT_ROUNDOFF: f64 = f32::EPSILON as f64 / 2.0;
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
    fn widen(source: &[Self], target: &mut [f32]) {
        target.copy_from_slice(source);
    }
    fn narrow(source: &[f32], target: &mut [Self]) {
        target.copy_from_slice(source);
    }
}

macro_rules! half_element {
    ($type:ty, $name:literal, $mantissa_bits:literal) => {
        impl Element for $type {
            const NAME: &'static str = $name;
            const UNIT_ROUNDOFF: f64 = 1.0 / (1u64 << $mantissa_bits) as f64;
            fn to_f64(self) -> f64 {
                self.to_f64()
            }
            fn from_f64(value: f64) -> Self {
                Self::from_f32(round_to_odd(value))
            }
            fn to_f32(self) -> f32 {
                self.to_f32()
            }
            fn from_f32(value: f32) -> Self {
                Self::from_f32(value)
            }
            fn widen(source: &[Self], target: &mut [f32]) {
                half::slice::HalfFloatSliceExt::convert_to_f32_slice(source, target);
            }
            fn narrow(source: &[f32], target: &mut [Self]) {
                half::slice::HalfFloatSliceExt::convert_from_f32_slice(target, source);
            }
        }
    };
}
half_element!(bf16, "bf16", 8);
half_element!(f16, "f16", 11);

/// Rounds to `f32` so that rounding again, to fewer digits, gives what one rounding of `value` would: an inexact result is cut off
/// and its last digit set.
fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || !nearest.is_finite() {
        return nearest;
    }
    let cut = if f64::from(nearest).abs() > value.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    f32::from_bits(cut | 1)
}
