// Plain products C = left·right or C += left·right, with either operand transposed, and column sums.
//
// Bodies: gemm.cuh with an epilogue that stores f32. Long sums over rows (Tn) are cut by the host into launches, which
// bounds the rounding of the f32 accumulators.
//
// Geometry: gemm.cuh; column_sums: four columns a thread, 128 rows a slot. Not yet run on hardware.
#include "store.cuh"

GEMM_KERNEL(product_nn_bf16, bf16, Depth, Across, StoreEpilogue)
GEMM_KERNEL(product_nt_bf16, bf16, Depth, Depth, StoreEpilogue)
GEMM_KERNEL(product_tn_bf16, bf16, Across, Across, StoreEpilogue)
GEMM_KERNEL(product_nn_f16, f16, Depth, Across, StoreEpilogue)
GEMM_KERNEL(product_nt_f16, f16, Depth, Depth, StoreEpilogue)
GEMM_KERNEL(product_tn_f16, f16, Across, Across, StoreEpilogue)

template <class E>
struct ColumnSums {
    View<const E> matrix;
    /// [rows/128, cols]
    double* slots;
    int64_t rows, cols;
};

template <class E>
__device__ __forceinline__ void column_sums(const ColumnSums<E>& p) {
    const int64_t col = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4;
    if (col >= p.cols) return;
    const int count = left(p.cols, col);
    const int64_t groups = (p.rows + 127) / 128;
    for (int64_t group = blockIdx.y; group < groups; group += gridDim.y) {
        double sum[4] = {};
        for (int64_t row = group * 128; row < min(p.rows, (group + 1) * 128); ++row) {
            float v[4];
            load4(v, p.matrix.at(row, col), count);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += double(v[i]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < count) p.slots[group * p.cols + col + i] = sum[i];
    }
}
KERNEL column_sums_f32(ARGUMENTS(ColumnSums<float>)) { column_sums(p); }
KERNEL column_sums_bf16(ARGUMENTS(ColumnSums<bf16>)) { column_sums(p); }
KERNEL column_sums_f16(ARGUMENTS(ColumnSums<f16>)) { column_sums(p); }
