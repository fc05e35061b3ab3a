// The correlation term over pairs of rows: K = ÂÂᵀ/(N−1) mirrored with ‖K‖², then KÂ with P and q in its epilogue.
//
// Â = (a − μ)/s is standardised once into bf16 planes (prepare.cu) and serves both products, first with its depth along the latents,
// then along the rows. gram_tn is the same symmetric product for operands with the other index contiguous (weight redundancy).
//
// Geometry: gemm.cuh; a thread a column for the vectors. Not yet run on hardware.
#include "mirror.cuh"

GEMM_KERNEL(gram_nt, bf16, Depth, Depth, MirrorEpilogue)
GEMM_KERNEL(gram_tn, bf16, Across, Across, MirrorEpilogue)

// product = g·P with P = KÂ − Â·diag(c), and the column sums of Â∘P.
template <class E>
struct DualEpilogue {
    View<const E> activations;
    const float *mean, *inverse_deviation, *gain, *diagonal;
    View<E> product;
    double* slots;
    int64_t cols;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const int col = tile.col0 + tile.lane_col(), count = tile.lane_cols();
        float mu[4], inverse[4], g[4], c[4], sum[4] = {};
        tile.vector(mu, mean);
        tile.vector(inverse, inverse_deviation);
        tile.vector(g, gain);
        tile.vector(c, diagonal);
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            float v[4], a[4];
            tile.read(v, row);
            load4(a, activations.at(tile.row0 + row, col), count);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float standardized = (a[i] - mu[i]) * inverse[i];
                v[i] -= standardized * c[i];
                sum[i] = fmaf(standardized, v[i], sum[i]);
                v[i] *= g[i];
            }
            store4(product.at(tile.row0 + row, col), v, count);
        }
        tile.column_sums(sum, slots + tile.row_index * cols, 0);
    }
};
GEMM_KERNEL(dual_apply_f32, bf16, Depth, Across, DualEpilogue<float>)
GEMM_KERNEL(dual_apply_bf16, bf16, Depth, Across, DualEpilogue<bf16>)
GEMM_KERNEL(dual_apply_f16, bf16, Depth, Across, DualEpilogue<f16>)

struct DualVectors {
    const float* variance;
    /// 1/s (0 for a dead column), g = 4 λ_tc/((N−1) s), c = v/s².
    float *inverse_deviation, *gain, *diagonal;
    int64_t latents;
    double factor;
};

KERNEL dual_vectors(ARGUMENTS(DualVectors)) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (j >= p.latents) return;
    const double v = double(p.variance[j]), inverse = v == 0.0 ? 0.0 : 1.0 / (sqrt(v) + 1e-8);
    p.inverse_deviation[j] = float(inverse);
    p.gain[j] = float(p.factor * inverse);
    p.diagonal[j] = float(v * inverse * inverse);
}

struct DualFinish {
    const float* variance;
    /// Column sums of Â∘P: [row tiles, H].
    const double* slots;
    float* scale;
    /// c², for the loss.
    double* squares;
    int64_t latents, row_tiles;
    /// 4 λ_tc/(N−1), N−1.
    double factor, degrees;
};

KERNEL dual_finish(ARGUMENTS(DualFinish)) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (j >= p.latents) return;
    const double v = double(p.variance[j]), inverse = v == 0.0 ? 0.0 : 1.0 / (sqrt(v) + 1e-8);
    const double c = v * inverse * inverse;
    double q = 0.0;
    for (int64_t tile = 0; tile < p.row_tiles; ++tile) q += p.slots[tile * p.latents + j];
    q /= p.degrees;
    p.squares[j] = c * c;
    const double through_deviation = v == 0.0 ? 0.0 : q * inverse / sqrt(v);
    p.scale[j] = float(double(p.scale[j]) - p.factor * through_deviation);
}
