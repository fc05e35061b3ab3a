// Epilogue of the backward passes: dA from the product in the tile, dZ = dA ⊙ f'(z), and its column sums.
#pragma once
#include "gemm.cuh"

template <class E>
struct GradientEpilogue {
    View<const E> activations;
    /// Adds row_weight·exp(ℓ − a), if given.
    const float* row_loss;
    /// Adds (a − μ)·d − offset, if given. The offset may be missing.
    const float *mean, *scale, *offset;
    View<E> dz;
    /// Column sums of each row tile.
    double* slots;
    int64_t cols;
    float row_weight;
    /// Adds l1·sign(a).
    float l1;
    uint32_t activation, padding;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const int col = tile.col0 + tile.lane_col(), count = tile.lane_cols();
        float mu[4], d[4], less[4], sum[4] = {};
        tile.vector(mu, mean);
        tile.vector(d, scale);
        tile.vector(less, offset);
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            float da[4], a[4];
            tile.read(da, row);
            load4(a, activations.at(tile.row0 + row, col), count);
            const float loss = row_loss == nullptr ? 0.0f : row_loss[tile.row0 + row];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (mean != nullptr) da[i] = fmaf(a[i] - mu[i], d[i], da[i] - less[i]);
                if (row_loss != nullptr) da[i] = fmaf(row_weight, expf(loss - a[i]), da[i]);
                // sign(NaN) is NaN, sign(0) is 0.
                if (l1 != 0.0f) da[i] = fmaf(l1, a[i] > 0.0f ? 1.0f : a[i] < 0.0f ? -1.0f : a[i], da[i]);
                da[i] = through_activation(activation, a[i], da[i]);
                sum[i] += da[i];
            }
            store4(dz.at(tile.row0 + row, col), da, count);
        }
        tile.column_sums(sum, slots + tile.row_index * cols, 0);
    }
};
