// The product that carries every family: C = Σ_segments left·right, whose tiles an epilogue finishes.
//
// Operands are 16-bit (bf16 or f16), in one or more planes: a float32 matrix is the sum of three bf16 matrices (8 + 8 + 8 bits), a
// centred or scaled 16-bit one the sum of two. A segment is a pair of planes; all segments run through one loop over depth into the
// same f32 accumulators, so float32 costs six products and is as exact as float32 arithmetic, and bf16 costs one. Either operand may
// have its depth contiguous ("Depth") or the other index ("Across"), so nothing is ever transposed in memory.
//
// There are two mainloops with the same epilogues: gemm_sm80.cuh, and gemm_sm90.cuh in a file compiled for compute_90a with
// SAE_KERNELS_SM90 defined. A kernel has the same name in both.
#pragma once
#ifdef SAE_KERNELS_SM90
#include "gemm_sm90.cuh"
#else
#include "gemm_sm80.cuh"
#endif

/// A kernel's argument: the product and its epilogue.
template <class Epilogue>
struct Fused {
    Gemm gemm;
    Epilogue epilogue;
};

#define GEMM_KERNEL(NAME, T, LEFT, RIGHT, ...)                                                       \
    KERNEL GEMM_GEOMETRY NAME(ARGUMENTS(Fused<__VA_ARGS__>)) {                                       \
        gemm<T, Major::LEFT, Major::RIGHT>(p.gemm, p.epilogue);                                      \
    }
