// BackwardDz: dZ = [(a − μ)·M − offset + (a − μ)·d + w·exp(ℓ − a)] ⊙ f'(z) and db = Σ dZ, one product with one epilogue.
//
// The left operand is a − μ, centred by prepare.cu; M is symmetric, so its rows serve as columns and both operands have their depth
// contiguous. The diagonal d stays out of the product. Without a correlation term, or in its dual form (the product stands in dZ
// already), pointwise_* runs the same epilogue on a tile that it loads instead of computing it.
//
// Geometry: gemm.cuh. Not yet run on hardware.
#include "gradient.cuh"
#include "pointwise.cuh"

GEMM_KERNEL(backward_f32, bf16, Depth, Depth, GradientEpilogue<float>)
GEMM_KERNEL(backward_bf16, bf16, Depth, Depth, GradientEpilogue<bf16>)
GEMM_KERNEL(backward_f16, bf16, Depth, Depth, GradientEpilogue<f16>)

template <class E>
using GradientPointwise = Pointwise<E, GradientEpilogue<E>>;
KERNEL __launch_bounds__(THREADS) pointwise_f32(ARGUMENTS(GradientPointwise<float>)) { pointwise(p); }
KERNEL __launch_bounds__(THREADS) pointwise_bf16(ARGUMENTS(GradientPointwise<bf16>)) { pointwise(p); }
KERNEL __launch_bounds__(THREADS) pointwise_f16(ARGUMENTS(GradientPointwise<f16>)) { pointwise(p); }
