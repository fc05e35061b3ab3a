// BackwardDz: dZ = [(a − μ)·M − offset + (a − μ)·d + w·exp(ℓ − a)] ⊙ f'(z) and db = Σ dZ, one product with one epilogue.
//
// The left operand is a − μ, centred by prepare.cu; M is symmetric, so its rows serve as columns and both operands have their depth
// contiguous. The diagonal d stays out of the product. Without a correlation term, or in its dual form (the product stands in dZ
// already), pointwise_* runs the same epilogue on a tile that it loads instead of computing it.
//
// Geometry: gemm.cuh. Not yet run on hardware.
#include "gradient.cuh"

GEMM_KERNEL(backward_f32, bf16, Depth, Depth, GradientEpilogue<float>)
GEMM_KERNEL(backward_bf16, bf16, Depth, Depth, GradientEpilogue<bf16>)
GEMM_KERNEL(backward_f16, bf16, Depth, Depth, GradientEpilogue<f16>)

template <class E>
struct Pointwise {
    /// What stands for the product; zeros if missing.
    View<const E> source;
    GradientEpilogue<E> epilogue;
    int32_t rows, cols;
};

template <class E>
__device__ __forceinline__ void pointwise(const Pointwise<E>& p) {
    const int col_tiles = (p.cols + TILE - 1) / TILE;
    const int row_index = blockIdx.x / col_tiles, col_index = blockIdx.x % col_tiles;
    const int row0 = row_index * TILE, col0 = col_index * TILE;
    const TileOf<8> tile{reinterpret_cast<float*>(shared_memory), row0, col0, min(TILE, p.rows - row0), min(TILE, p.cols - col0),
                    row_index, col_index, int(blockIdx.x)};
    for (int row = tile.first_row(); row < min(tile.first_row() + tile.WARP_ROWS, tile.rows); ++row) {
        float v[4];
        load4(v, p.source.at(row0 + row, col0 + tile.lane_col()), p.source.data == nullptr ? 0 : tile.lane_cols());
        // Each lane reads back what it wrote: no barrier.
        tile.write(v, row);
    }
    p.epilogue(tile);
}
KERNEL __launch_bounds__(256) pointwise_f32(ARGUMENTS(Pointwise<float>)) { pointwise(p); }
KERNEL __launch_bounds__(256) pointwise_bf16(ARGUMENTS(Pointwise<bf16>)) { pointwise(p); }
KERNEL __launch_bounds__(256) pointwise_f16(ARGUMENTS(Pointwise<f16>)) { pointwise(p); }
