//! Storage types, and the operations compiled for each.

use super::{Cpu, backward, decode, dual, encode, optimizer, product, redundancy, statistics};
use crate::element::{Element, StorageType, bf16, f16};
use crate::error::Result;
use crate::operations::*;

/// Declares [`CpuElement`] with the operations as methods that are not generic. So the kernels are compiled once, here; generic ones
/// would be compiled again in every crate that calls them.
macro_rules! operations {
    ($($module:ident::$operation:ident($arguments:ident))*) => {
        /// Storage types of the CPU backend: `f32`, `bf16` and `f16`.
        pub trait CpuElement: Element + StorageType {
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
        operations!(@for f32; $($module::$operation($arguments))*);
        operations!(@for bf16; $($module::$operation($arguments))*);
        operations!(@for f16; $($module::$operation($arguments))*);
    };
    (@for $element:ty; $($module:ident::$operation:ident($arguments:ident))*) => {
        impl CpuElement for $element {
            $(fn $operation(cpu: &Cpu<Self>, args: $arguments<'_, Cpu<Self>>) -> Result<()> {
                $module::$operation(&cpu.core, args)
            })*
        }
    };
}

operations! {
    encode::encode(Encode)
    encode::responsibilities(Responsibilities)
    statistics::recentre(Recentre)
    statistics::comoments(Comoments)
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
}
