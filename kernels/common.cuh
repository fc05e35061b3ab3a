// What all kernels share: storage types, views, reads and writes of four neighbouring elements, warp sums, activations.
#pragma once
#include "ptx.cuh"

using bf16 = __nv_bfloat16;
using f16 = __half;

/// An argument struct by value, in constant memory.
#define KERNEL extern "C" __global__ void
#define ARGUMENTS(Type) const __grid_constant__ Type p

constexpr uint32_t FULL_WARP = 0xffffffffu;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }

template <class E>
__device__ __forceinline__ E narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) { return x; }
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ f16 narrow<f16>(float x) { return __float2half_rn(x); }

__device__ __forceinline__ uint16_t to_bits(bf16 x) { return __bfloat16_as_ushort(x); }
__device__ __forceinline__ uint16_t to_bits(f16 x) { return __half_as_ushort(x); }
template <class E>
__device__ __forceinline__ E from_bits(uint16_t x);
template <>
__device__ __forceinline__ bf16 from_bits<bf16>(uint16_t x) { return __ushort_as_bfloat16(x); }
template <>
__device__ __forceinline__ f16 from_bits<f16>(uint16_t x) { return __ushort_as_half(x); }

/// A row-major matrix whose rows start `row_stride` elements apart.
template <class E>
struct View {
    E* data;
    int64_t row_stride;
    __device__ __forceinline__ E* at(int64_t row, int64_t col) const { return data + row * row_stride + col; }
};

/// Four elements as one access moves them.
__device__ __forceinline__ void move4(float (&v)[4], const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
}
template <class E>
__device__ __forceinline__ void move4(float (&v)[4], const E* from) {
    const uint2 four = *reinterpret_cast<const uint2*>(from);
    const uint32_t pairs[2] = {four.x, four.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = widen(from_bits<E>(uint16_t(pairs[i / 2] >> 16 * (i % 2))));
}
__device__ __forceinline__ void move4(float* to, const float (&v)[4]) {
    store_16(to, {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])});
}
template <class E>
__device__ __forceinline__ void move4(E* to, const float (&v)[4]) {
    uint32_t pairs[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i / 2] |= uint32_t(to_bits(narrow<E>(v[i]))) << 16 * (i % 2);
    store_8(to, pairs);
}

template <class E>
__device__ __forceinline__ bool is_aligned(const E* p) {
    return (reinterpret_cast<uintptr_t>(p) & (4 * sizeof(E) - 1)) == 0;
}

/// Up to four neighbouring elements; 0 for those beyond `count`.
template <class E>
__device__ __forceinline__ void load4(float (&v)[4], const E* from, int count) {
    if (count >= 4 && is_aligned(from)) {
        move4(v, from);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = i < count ? widen(from[i]) : 0.0f;
    }
}

/// Rounds and writes up to four neighbouring elements.
template <class E>
__device__ __forceinline__ void store4(E* to, const float (&v)[4], int count) {
    if (count >= 4 && is_aligned(to)) {
        move4(to, v);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) to[i] = narrow<E>(v[i]);
    }
}

/// Sum over the warp, the same tree each time, in every lane.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(FULL_WARP, x, lane);
    return x;
}
/// The least number of the warp that is not NaN.
template <class T>
__device__ __forceinline__ T warp_min(T x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        const T other = __shfl_xor_sync(FULL_WARP, x, lane);
        x = other < x ? other : x;
    }
    return x;
}

/// As the host numbers them.
enum Activation : uint32_t { RELU = 0, IDENTITY = 1, SOFTPLUS = 2 };

__device__ __forceinline__ float activate(uint32_t activation, float z) {
    const float rectified = max_nan(z, 0.0f);
    if (activation == RELU) return rectified;
    return activation == IDENTITY ? z : rectified + log1pf(expf(-fabsf(z)));
}

/// da·f'(z), from the stored a. A unit that is off passes nothing, not even what is not a number.
__device__ __forceinline__ float through_activation(uint32_t activation, float a, float da) {
    if (activation == RELU) return !(a <= 0.0f) ? da : 0.0f;
    if (activation == IDENTITY) return da;
    const float slope = -expm1f(-a);
    return !(slope <= 0.0f) ? da * slope : 0.0f;
}

/// Columns left from `first` on, at most 4 of which a lane takes; may be negative.
__device__ __forceinline__ int left(int64_t end, int64_t first) { return int(end - first < 4 ? end - first : 4); }
