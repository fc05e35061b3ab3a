// Turns a matrix into an operand of gemm.cuh: 16-bit planes whose rows start at multiples of 8 elements, centred and scaled on the way.
//
// v = (m − shift_col)·scale_col·scale_row is split as v = Σ planes: the first is v rounded to bf16, the next what that left, and so on.
// Two planes keep 16 bits of v, three all 24. What is not finite stands in the first plane alone, and one more plane is the first
// without it: the host pairs lower planes with that one, so that an infinity meets each factor once, not once a plane with signs that
// cancel to NaN. The gaps between rows are zeros.
//
// Geometry: block 32×8, four columns a lane, rows by a grid-stride loop. Not yet run on hardware.
#include "common.cuh"

template <class E>
struct Prepare {
    View<const E> source;
    /// Over columns and rows; absent ones are null.
    const float *shift, *scale, *row_scale;
    uint16_t* out;
    int64_t row_stride, plane_stride;
    int64_t rows, cols;
    uint32_t planes, padding;
};

/// The largest finite bf16, to which no rounding may add.
constexpr float MOST_BF16 = 3.38953139e38f;

/// T: what the planes hold.
template <class T, class E>
__device__ __forceinline__ void prepare(const Prepare<E>& p) {
    const int64_t col = (int64_t(blockIdx.x) * 32 + threadIdx.x % 32) * 4;
    if (col >= p.row_stride) return;
    const int count = left(p.cols, col);
    float shift[4], scale[4];
    load4(shift, p.shift + col, p.shift == nullptr ? 0 : count);
    load4(scale, p.scale + col, p.scale == nullptr ? 0 : count);
    for (int64_t row = int64_t(blockIdx.y) * 8 + threadIdx.x / 32; row < p.rows; row += int64_t(gridDim.y) * 8) {
        float v[4];
        load4(v, p.source.at(row, col), count);
        const float row_scale = p.row_scale == nullptr ? 1.0f : p.row_scale[row];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[i] = (v[i] - shift[i]) * row_scale;
            if (p.scale != nullptr) v[i] *= scale[i];
        }
        T* out = reinterpret_cast<T*>(p.out) + row * p.row_stride + col;
        if (p.planes == 1) {
            store4(out, v, 4);
            continue;
        }
        float finite[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) finite[i] = fabsf(v[i]) < INFINITY ? fminf(fmaxf(v[i], -MOST_BF16), MOST_BF16) : 0.0f;
        store4(out + p.planes * p.plane_stride, finite, 4);
        for (uint32_t plane = 0; plane < p.planes; ++plane, out += p.plane_stride) {
            float head[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool is_finite = fabsf(v[i]) < INFINITY;
                head[i] = is_finite ? fminf(fmaxf(v[i], -MOST_BF16), MOST_BF16) : v[i];
                v[i] = is_finite ? v[i] - widen(narrow<T>(head[i])) : 0.0f;
            }
            store4(out, head, 4);
        }
    }
}
KERNEL prepare_f32(ARGUMENTS(Prepare<float>)) { prepare<bf16>(p); }
KERNEL prepare_bf16(ARGUMENTS(Prepare<bf16>)) { prepare<bf16>(p); }
KERNEL prepare_f16(ARGUMENTS(Prepare<f16>)) { prepare<bf16>(p); }
// An f16 matrix as one plane of f16.
KERNEL align_f16(ARGUMENTS(Prepare<f16>)) { prepare<f16>(p); }
