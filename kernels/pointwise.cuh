// An epilogue of the product on tiles that are read instead of computed.
#pragma once
#include "gemm.cuh"

template <class E, class Epilogue>
struct Pointwise {
    /// What stands for the product; zeros if missing.
    View<const E> source;
    int32_t rows, cols;
    Epilogue epilogue;
};

template <class E, class Epilogue>
__device__ __forceinline__ void pointwise(const Pointwise<E, Epilogue>& p) {
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
