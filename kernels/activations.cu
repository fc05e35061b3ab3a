// ActivationSums: row log-sum-exp and column moments of activations that are there already, by the encoder's epilogue.
//
// finish_rows (encode.cu) and fold (reduce.cu) take the slots from there.
//
// Geometry: a block of 256 threads a tile of 128×128, which it reads once. Two blocks, as in the product, for with room for more ptxas saves
// registers on the stack. Not yet run on hardware.
#include "encode.cuh"
#include "pointwise.cuh"

template <class E>
using ActivationSums = Pointwise<E, EncodeEpilogue<E, true>>;
KERNEL __launch_bounds__(THREADS, 2) activation_sums_f32(ARGUMENTS(ActivationSums<float>)) { pointwise(p); }
KERNEL __launch_bounds__(THREADS, 2) activation_sums_bf16(ARGUMENTS(ActivationSums<bf16>)) { pointwise(p); }
KERNEL __launch_bounds__(THREADS, 2) activation_sums_f16(ARGUMENTS(ActivationSums<f16>)) { pointwise(p); }
