// Encode: z = x Wᵀ + b, a = f(z), row log-sum-exp and column moments in one pass over x; and the responsibilities.
//
// Trick: a row's log-sum-exp is kept as (m, s) with Σ exp(−a) = s·exp(−m), m the least a: each column tile leaves one pair a row and
// each row tile one sum a column, in slots with a single writer; finish_rows folds the pairs in order, in float64.
// Masked columns are set to infinity by a select: relu(b) ≠ 0 and exp(−0) = 1, so a zero-filled edge would count.
//
// Geometry: gemm.cuh; finish_rows: one warp a row. Not yet run on hardware.
#include "encode.cuh"

GEMM_KERNEL(encode_f32, bf16, Depth, Depth, EncodeEpilogue<float>)
GEMM_KERNEL(encode_bf16, bf16, Depth, Depth, EncodeEpilogue<bf16>)
GEMM_KERNEL(encode_f16, f16, Depth, Depth, EncodeEpilogue<f16>)

struct FinishRows {
    const float2* slots;
    double* losses;
    /// The same in f32, if wanted.
    float* row_loss;
    int64_t rows, col_tiles;
};

// ℓ = m − log Σ s·exp(m − m_tile), for each row.
KERNEL finish_rows(ARGUMENTS(FinishRows)) {
    const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    const float2* slots = p.slots + row * p.col_tiles;
    float least = 3.402823466e38f;
    for (int64_t tile = threadIdx.x % 32; tile < p.col_tiles; tile += 32) least = fminf(least, slots[tile].x);
    least = warp_min(least);
    double sum = 0.0;
    for (int64_t tile = threadIdx.x % 32; tile < p.col_tiles; tile += 32) {
        const float2 slot = slots[tile];
        sum += double(slot.y) * exp(double(least) - double(slot.x));
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        const double loss = double(least) - log(sum);
        p.losses[row] = loss;
        if (p.row_loss != nullptr) p.row_loss[row] = float(loss);
    }
}

template <class E>
struct Responsibilities {
    View<const E> activations;
    const float* row_loss;
    View<float> out;
    int64_t rows, cols;
};

// r = exp(ℓ − a); block 32×8, four columns a lane.
template <class E>
__device__ __forceinline__ void responsibilities(const Responsibilities<E>& p) {
    const int64_t col = (int64_t(blockIdx.x) * 32 + threadIdx.x % 32) * 4;
    if (col >= p.cols) return;
    for (int64_t row = int64_t(blockIdx.y) * 8 + threadIdx.x / 32; row < p.rows; row += int64_t(gridDim.y) * 8) {
        float a[4];
        const int count = left(p.cols, col);
        load4(a, p.activations.at(row, col), count);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = expf(p.row_loss[row] - a[i]);
        store4(p.out.at(row, col), a, count);
    }
}
KERNEL responsibilities_f32(ARGUMENTS(Responsibilities<float>)) { responsibilities(p); }
KERNEL responsibilities_bf16(ARGUMENTS(Responsibilities<bf16>)) { responsibilities(p); }
KERNEL responsibilities_f16(ARGUMENTS(Responsibilities<f16>)) { responsibilities(p); }
