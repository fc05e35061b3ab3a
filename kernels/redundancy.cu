// Weight redundancy: row norms, then (after gram_nt or gram_tn of dual.cu) G·Ŵ or Ŵ·P added to the gradient by its epilogue, and the
// part of the gradient that goes through the norms.
//
// Geometry: gemm.cuh; one warp a row for the others. Not yet run on hardware.
#include "gemm.cuh"

// grad += λ·dŴ/divisor, and dŴ·W of each row and column tile.
template <class E>
struct RedundancyEpilogue {
    View<const E> weight;
    /// 1/divisor of each row.
    const float* inverse;
    View<float> grad;
    /// [H, column tiles]
    double* slots;
    int64_t col_tiles;
    float lambda;
    /// Whether the product still lacks −Ŵ.
    uint32_t less_unit;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const int col = tile.col0 + tile.lane_col(), count = tile.lane_cols();
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            float v[4], w[4], g[4], dot = 0.0f;
            tile.read(v, row);
            load4(w, weight.at(tile.row0 + row, col), count);
            load4(g, grad.at(tile.row0 + row, col), count);
            const float scale = inverse[tile.row0 + row];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float grad_unit = 4.0f * (v[i] - (less_unit ? w[i] * scale : 0.0f));
                g[i] = fmaf(grad_unit * scale, lambda, g[i]);
                dot = fmaf(grad_unit, w[i], dot);
            }
            store4(grad.at(tile.row0 + row, col), g, count);
            const double along = warp_sum(double(dot));
            if (threadIdx.x % 32 == 0) slots[(tile.row0 + row) * col_tiles + tile.col_index] = along;
        }
    }
};
GEMM_KERNEL(redundancy_primal_f32, bf16, Depth, Across, RedundancyEpilogue<float>)
GEMM_KERNEL(redundancy_primal_bf16, bf16, Depth, Across, RedundancyEpilogue<bf16>)
GEMM_KERNEL(redundancy_primal_f16, bf16, Depth, Across, RedundancyEpilogue<f16>)
GEMM_KERNEL(redundancy_dual_f32, bf16, Depth, Depth, RedundancyEpilogue<float>)
GEMM_KERNEL(redundancy_dual_bf16, bf16, Depth, Depth, RedundancyEpilogue<bf16>)
GEMM_KERNEL(redundancy_dual_f16, bf16, Depth, Depth, RedundancyEpilogue<f16>)

template <class E>
struct RowNorms {
    View<const E> weight;
    double* norm;
    float* inverse;
    /// (norm/divisor)².
    double* unit_squares;
    int64_t rows, cols;
    uint32_t normalize, padding;
};

template <class E>
__device__ __forceinline__ void row_norms(const RowNorms<E>& p) {
    const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    double sum = 0.0;
    for (int64_t col = threadIdx.x % 32 * 4; col < p.cols; col += 128) {
        float w[4];
        load4(w, p.weight.at(row, col), left(p.cols, col));
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += double(w[i]) * double(w[i]);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
        const double norm = sqrt(sum);
        const float inverse = p.normalize ? float(1.0 / (norm + 1e-8)) : 1.0f;
        p.norm[row] = norm;
        p.inverse[row] = inverse;
        p.unit_squares[row] = norm * double(inverse) * (norm * double(inverse));
    }
}
KERNEL row_norms_f32(ARGUMENTS(RowNorms<float>)) { row_norms(p); }
KERNEL row_norms_bf16(ARGUMENTS(RowNorms<bf16>)) { row_norms(p); }
KERNEL row_norms_f16(ARGUMENTS(RowNorms<f16>)) { row_norms(p); }

template <class E>
struct ThroughNorms {
    View<const E> weight;
    const double *norm, *slots;
    View<float> grad;
    int64_t rows, cols, col_tiles;
    double lambda;
};

// grad −= λ W (dŴ·W)/(‖W‖ (‖W‖ + 1e-8)²), row by row; nothing for a zero row.
template <class E>
__device__ __forceinline__ void through_norms(const ThroughNorms<E>& p) {
    const int64_t row = int64_t(blockIdx.x) * 8 + threadIdx.x / 32;
    if (row >= p.rows) return;
    const double norm = p.norm[row];
    if (norm == 0.0) return;
    double along = 0.0;
    for (int64_t tile = 0; tile < p.col_tiles; ++tile) along += p.slots[row * p.col_tiles + tile];
    const float factor = float(p.lambda * along / (norm * (norm + 1e-8) * (norm + 1e-8)));
    for (int64_t col = threadIdx.x % 32 * 4; col < p.cols; col += 128) {
        const int count = left(p.cols, col);
        float g[4], w[4];
        load4(g, p.grad.at(row, col), count);
        load4(w, p.weight.at(row, col), count);
#pragma unroll
        for (int i = 0; i < 4; ++i) g[i] -= factor * w[i];
        store4(p.grad.at(row, col), g, count);
    }
}
KERNEL through_norms_f32(ARGUMENTS(ThroughNorms<float>)) { through_norms(p); }
KERNEL through_norms_bf16(ARGUMENTS(ThroughNorms<bf16>)) { through_norms(p); }
KERNEL through_norms_f16(ARGUMENTS(ThroughNorms<f16>)) { through_norms(p); }
