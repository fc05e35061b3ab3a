// The standard autoencoder's decoder: x̂ = a W + b with the squared error and its gradient; and the way back through it.
//
// decode_backward_* is residual·Wᵀ with the epilogue of the decoder-free backward pass (gradient.cuh), which adds l1·sign(a).
//
// Geometry: gemm.cuh. Not yet run on hardware.
#include "gradient.cuh"

template <class E>
struct DecodeEpilogue {
    const float* bias;
    View<const E> x;
    /// x̂ and w (x̂ − x), if wanted.
    View<float> reconstruction;
    View<E> residual;
    /// Σ (x̂ − x)² of each tile, by its number.
    double* slots;
    float residual_weight;
    uint32_t padding;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const int col = tile.col0 + tile.lane_col(), count = tile.lane_cols();
        float b[4];
        double squares = 0.0;
        tile.vector(b, bias);
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            float v[4], target[4], part = 0.0f;
            tile.read(v, row);
            load4(target, x.at(tile.row0 + row, col), count);
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] += b[i];
            if (reconstruction.data != nullptr) store4(reconstruction.at(tile.row0 + row, col), v, count);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i] -= target[i];
                part = i < count ? fmaf(v[i], v[i], part) : part;
                v[i] *= residual_weight;
            }
            squares += double(part);
            if (residual.data != nullptr) store4(residual.at(tile.row0 + row, col), v, count);
        }
        tile.block_sum(squares, slots + tile.index);
    }
};
GEMM_KERNEL(decode_f32, bf16, Depth, Across, DecodeEpilogue<float>)
GEMM_KERNEL(decode_bf16, bf16, Depth, Across, DecodeEpilogue<bf16>)
GEMM_KERNEL(decode_f16, f16, Depth, Across, DecodeEpilogue<f16>)

GEMM_KERNEL(decode_backward_f32, bf16, Depth, Depth, GradientEpilogue<float>)
GEMM_KERNEL(decode_backward_bf16, bf16, Depth, Depth, GradientEpilogue<bf16>)
GEMM_KERNEL(decode_backward_f16, f16, Depth, Depth, GradientEpilogue<f16>)
