// Epilogue of the encoder: a = f(z + b) rounded to storage, row log-sum-exp parts, column moments. See encode.cu; and activations.cu, where
// the tile holds a already.
#pragma once
#include "gemm.cuh"

template <class E, bool GIVEN = false>
struct EncodeEpilogue {
    const float* bias;
    /// c of the moments, if any.
    const float* shift;
    /// a, if wanted.
    View<E> activations;
    /// (m, s) with Σ exp(−a) = s·exp(−m) for each row and column tile, if wanted.
    float2* row_slots;
    /// Σ(a − c) and Σ(a − c)² for each row tile and column, if wanted.
    double *sums, *squares;
    /// H and column tiles.
    int64_t cols, col_tiles;
    uint32_t activation, padding;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const int col = tile.lane_col(), count = tile.lane_cols();
        float b[4], c[4], sum[4] = {}, square[4] = {};
        tile.vector(b, GIVEN ? nullptr : bias);
        tile.vector(c, shift);
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            float a[4];
            tile.read(a, row);
            float least = INFINITY;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                // Everything below is of the stored value.
                if (!GIVEN) a[i] = widen(narrow<E>(activate(activation, a[i] + b[i])));
                sum[i] += a[i] - c[i];
                square[i] = fmaf(a[i] - c[i], a[i] - c[i], square[i]);
            }
            if (!GIVEN && activations.data != nullptr) store4(activations.at(tile.row0 + row, tile.col0 + col), a, count);
            if (row_slots != nullptr) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    a[i] = i < count ? a[i] : INFINITY;
                    least = a[i] < least ? a[i] : least;
                }
                // Kept finite, so that infinite a need no case of their own.
                least = fminf(fmaxf(warp_min(least), -3.402823466e38f), 3.402823466e38f);
                float s = 0.0f;
#pragma unroll
                for (int i = 0; i < 4; ++i) s += i < count ? expf(least - a[i]) : 0.0f;
                s = warp_sum(s);
                if (threadIdx.x % 32 == 0)
                    row_slots[(tile.row0 + row) * col_tiles + tile.col_index] = make_float2(least, s);
            }
        }
        if (sums != nullptr) {
            tile.column_sums(sum, sums + tile.row_index * cols, 0);
            tile.column_sums(square, squares + tile.row_index * cols, 1);
        }
    }
};
