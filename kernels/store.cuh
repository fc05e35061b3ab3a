// Epilogue that stores or adds the product.
//
// On compute capability 9.0 what is only stored leaves the tile by bulk copies, a lane issues a row's: nothing passes through registers. A copy
// takes a multiple of 16 bytes at such an address; columns beyond, and other matrices, are stored by threads. Predicted: 16 or 32 copies that
// a warp issues one after the other, half the time of its 16-byte stores. Not yet run on hardware.
//
// Rejected: a tensor map of the output, one copy a tile, for it wants a tile without the padding that keeps writing fragments free of bank
// conflicts.
#pragma once
#include "gemm.cuh"

struct StoreEpilogue;
#ifdef SAE_KERNELS_SM90
template <>
constexpr bool STORES_BY_COPIES<StoreEpilogue> = true;
#endif

struct StoreEpilogue {
    View<float> out;
    uint32_t accumulate;
    /// Whether what lies below the diagonal is left alone.
    uint32_t upper;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const bool by_copies = STORES_BY_COPIES<StoreEpilogue> && !accumulate && (!upper || tile.row_index < tile.col_index) &&
                               is_aligned(out.data) && out.row_stride % 4 == 0;
        if (by_copies) {
            const int lane = threadIdx.x % 32, row = tile.first_row() + lane, bytes = tile.cols / 4 * 16;
            if (lane < Tile::WARP_ROWS && row < tile.rows && bytes > 0)
                bulk_store(out.at(tile.row0 + row, tile.col0), shared_address(tile.data + row * TILE_STRIDE), bytes);
            bulk_commit();
        }
        const int col = tile.col0 + tile.lane_col(), count = by_copies ? tile.lane_cols() % 4 : tile.lane_cols();
        const int end = by_copies && count == 0 ? 0 : min(tile.first_row() + Tile::WARP_ROWS, tile.rows);
        for (int row = tile.first_row(); row < end; ++row) {
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
        // The tile may be written again.
        if (by_copies) bulk_wait_read<0>();
    }
};
