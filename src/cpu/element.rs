//! Storage types, and the operations compiled for each.

use super::simd::Simd;
use super::{Cpu, backward, decode, dual, encode, optimizer, packed, product, redundancy, statistics};
use crate::element::{Element, StorageType, bf16, f16};
use crate::error::Result;
use crate::operations::*;

/// Declares [`CpuElement`] with the operations as methods that are not generic. So the kernels are compiled once, here; generic ones
/// would be compiled again in every crate that calls them.
macro_rules! operations {
    ($($module:ident::$operation:ident($arguments:ident))*) => {
        /// Storage types of the CPU backend: `f32`, `bf16` and `f16`.
        pub trait CpuElement: Element + StorageType {
            /// Whether two values make a lane of a dot product.
            #[doc(hidden)]
            const PAIRS: bool;
            /// # Safety
            /// A vector's elements are readable.
            #[doc(hidden)]
            unsafe fn load_vector<S: Simd>(s: S, from: *const Self) -> S::Vector;
            /// # Safety
            /// A vector's elements are writable.
            #[doc(hidden)]
            unsafe fn store_vector<S: Simd>(s: S, to: *mut Self, x: S::Vector);
            /// The slice itself, if it holds `f32`.
            #[doc(hidden)]
            #[inline(always)]
            fn as_f32(slice: &[Self]) -> Option<&[f32]> {
                (size_of::<Self>() == size_of::<f32>()).then(|| bytemuck::cast_slice(slice))
            }
            /// The slice itself, if it holds `f32`.
            #[doc(hidden)]
            #[inline(always)]
            fn as_f32_mut(slice: &mut [Self]) -> Option<&mut [f32]> {
                (size_of::<Self>() == size_of::<f32>()).then(|| bytemuck::cast_slice_mut(slice))
            }
            $(#[doc(hidden)]
            fn $operation(cpu: &Cpu<Self>, args: $arguments<'_, Cpu<Self>>) -> Result<()>;)*
        }
        operations!(@for f32, false, load_pointer, store_pointer; $($module::$operation($arguments))*);
        operations!(@for bf16, true, load_bf16, store_bf16; $($module::$operation($arguments))*);
        operations!(@for f16, false, load_f16, store_f16; $($module::$operation($arguments))*);
    };
    (@for $element:ty, $pairs:literal, $load:ident, $store:ident; $($module:ident::$operation:ident($arguments:ident))*) => {
        impl CpuElement for $element {
            const PAIRS: bool = $pairs;
            #[inline(always)]
            unsafe fn load_vector<S: Simd>(s: S, from: *const Self) -> S::Vector {
                // SAFETY: the caller's promise.
                unsafe { s.$load(from) }
            }
            #[inline(always)]
            unsafe fn store_vector<S: Simd>(s: S, to: *mut Self, x: S::Vector) {
                // SAFETY: the caller's promise.
                unsafe { s.$store(to, x) }
            }
            $(fn $operation(cpu: &Cpu<Self>, args: $arguments<'_, Cpu<Self>>) -> Result<()> {
                $module::$operation(&cpu.core, args)
            })*
        }
    };
}

operations! {
    encode::encode(Encode)
    encode::activation_sums(ActivationSums)
    encode::responsibilities(Responsibilities)
    statistics::recentre(Recentre)
    statistics::comoments(Comoments)
    packed::pack_statistics(PackStatistics)
    packed::unpack_statistics(UnpackStatistics)
    statistics::finish_statistics(FinishStatistics)
    dual::correlation_dual(CorrelationDual)
    backward::backward_dz(BackwardDz)
    product::product(Product)
    product::column_sums(ColumnSums)
    redundancy::weight_redundancy(WeightRedundancy)
    decode::decode(Decode)
    decode::decode_backward(DecodeBackward)
    optimizer::sgd(Sgd)
    optimizer::adam(Adam)
    optimizer::product_update(ProductUpdate)
}
