// Epilogue that stores or adds the product.
#pragma once
#include "gemm.cuh"

struct StoreEpilogue {
    View<float> out;
    uint32_t accumulate;
    /// Whether what lies below the diagonal is left alone.
    uint32_t upper;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const int col = tile.col0 + tile.lane_col(), count = tile.lane_cols();
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            float v[4];
            tile.read(v, row);
            float* to = out.at(tile.row0 + row, col);
            if (upper && tile.row0 + row > col) {
                // This lane's columns cross the diagonal, or lie below it.
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    if (i < count && col + i >= tile.row0 + row) to[i] = accumulate ? to[i] + v[i] : v[i];
                continue;
            }
            if (accumulate) {
                float before[4];
                load4(before, to, count);
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] += before[i];
            }
            store4(to, v, count);
        }
    }
};
