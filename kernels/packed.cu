// Sums over a batch that merge by addition: a block's moments and comoments into them, and back.
//
// Packed: N, Σℓ, Σ(a − c') [H], then Σ(a − c')² [H] or the rows of the upper triangle of Σ(a − c')(a − c')ᵀ, all f64. With δ = c − c' the sums
// about c become sum_i + N δ_i, and the products S_ij + δ_i sum_j + (sum_i + N δ_i) δ_j. Bound by memory: 4 bytes of a comoment and 8 or 16 of its sum.
//
// Geometry: a block of 256 threads a latent, along its row of the triangle. Not yet run on hardware.
#include "common.cuh"

/// Where a latent's products with itself and those behind it begin.
__device__ __forceinline__ int64_t products_of(int64_t latents, bool full, int64_t i) {
    return 2 + latents + (full ? i * (2 * latents + 1 - i) / 2 : i);
}

/// c_j, 0 if there is none.
__device__ __forceinline__ double shift_of(const float* shift, int64_t j) { return shift != nullptr ? double(shift[j]) : 0.0; }

struct PackStatistics {
    const double* row_loss_sum;
    const float* shift;
    const double *sum, *squares;
    /// May be missing: then squares are packed.
    View<const float> comoments;
    /// May be missing: 0.
    const float* packed_shift;
    double* packed;
    int64_t latents;
    double count;
    uint32_t accumulate, padding;

    __device__ __forceinline__ double delta(int64_t j) const { return double(shift[j]) - shift_of(packed_shift, j); }
    __device__ __forceinline__ void add(int64_t at, double term) const {
        packed[at] = term + (accumulate ? packed[at] : 0.0);
    }
};

KERNEL pack_statistics(ARGUMENTS(PackStatistics)) {
    const int64_t i = blockIdx.x;
    const bool full = p.comoments.data != nullptr;
    const double delta = p.delta(i), moved = p.sum[i] + p.count * delta;
    const int64_t end = full ? p.latents : i + 1, to = products_of(p.latents, full, i) - i;
#pragma unroll 1
    for (int64_t j = i + threadIdx.x; j < end; j += 256) {
        const double product = full ? double(*p.comoments.at(i, j)) : p.squares[i];
        p.add(to + j, product + (delta * p.sum[j] + moved * p.delta(j)));
    }
    if (threadIdx.x == 0) {
        p.add(2 + i, moved);
        if (i == 0) p.add(0, p.count), p.add(1, *p.row_loss_sum);
    }
}

struct UnpackStatistics {
    const double* packed;
    /// May be missing: 0.
    const float* packed_shift;
    double* row_loss_sum;
    float* shift;
    double *sum, *squares;
    /// May be missing.
    View<float> comoments;
    int64_t latents;
    /// Whether there are comoments among the packed.
    uint32_t full, padding;

    __device__ __forceinline__ float mean(int64_t j, double inverse_count) const {
        return inverse_count == 0.0 ? 0.0f : float(shift_of(packed_shift, j) + packed[2 + j] * inverse_count);
    }
    __device__ __forceinline__ double delta(int64_t j, double inverse_count) const {
        return shift_of(packed_shift, j) - double(mean(j, inverse_count));
    }
};

KERNEL unpack_statistics(ARGUMENTS(UnpackStatistics)) {
    const int64_t i = blockIdx.x;
    const double count = p.packed[0], inverse_count = count == 0.0 ? 0.0 : 1.0 / count;
    const double delta = p.delta(i, inverse_count), moved = p.packed[2 + i] + count * delta;
    const int64_t end = p.comoments.data != nullptr ? p.latents : i + 1, from = products_of(p.latents, p.full, i) - i;
#pragma unroll 1
    for (int64_t j = i + threadIdx.x; j < end; j += 256) {
        const double product = p.packed[from + j] + (delta * p.packed[2 + j] + moved * p.delta(j, inverse_count));
        if (j == i) p.squares[i] = product;
        if (p.comoments.data != nullptr) *p.comoments.at(i, j) = float(product);
    }
    if (threadIdx.x == 0) {
        p.shift[i] = p.mean(i, inverse_count), p.sum[i] = moved;
        if (i == 0) *p.row_loss_sum = p.packed[1];
    }
}
