// Epilogue of a symmetric product: factor·C − diagonal·I, one triangle computed, both written, with the sum of squares of all.
#pragma once
#include "gemm.cuh"

/// Writes a tile on or above the diagonal and its mirror image; what lies below the diagonal within a tile on it is not used.
template <class Tile>
__device__ __forceinline__ void store_mirrored(const Tile& tile, const View<float>& out) {
    const bool on_diagonal = tile.row_index == tile.col_index;
    const int col = tile.lane_col();
    tile.sync();
    for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
        float v[4];
        tile.read(v, row);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (on_diagonal && row > col + i) v[i] = tile.data[(col + i) * TILE_STRIDE + row];
        store4(out.at(tile.row0 + row, tile.col0 + col), v, tile.lane_cols());
    }
    if (on_diagonal) return;
    for (int mirrored = tile.first_row(); mirrored < min(tile.first_row() + Tile::WARP_ROWS, tile.cols); ++mirrored) {
        float v[4];
        // Above the diagonal every tile has all its rows.
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = tile.data[(col + i) * TILE_STRIDE + mirrored];
        store4(out.at(tile.col0 + mirrored, tile.row0 + col), v, 4);
    }
}

struct MirrorEpilogue {
    View<float> out;
    /// Σ of squares of each tile on and above the diagonal, its mirror image included; by its number.
    double* slots;
    float factor, diagonal;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const bool on_diagonal = tile.row_index == tile.col_index;
        const int col = tile.lane_col();
        double squares = 0.0;
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            float v[4];
            tile.read(v, row);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                v[i] *= factor;
                if (on_diagonal && row == col + i) v[i] -= diagonal;
                // Below the diagonal stands the same number but for rounding: the one above counts, twice.
                const double weight = !on_diagonal || row < col + i ? 2.0 : row == col + i ? 1.0 : 0.0;
                if (col + i < tile.cols && weight != 0.0) squares += weight * double(v[i]) * double(v[i]);
            }
            tile.write(v, row);
        }
        store_mirrored(tile, out);
        tile.block_sum(squares, slots + tile.index);
    }
};
