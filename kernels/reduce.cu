// Folds of slots, in a fixed order: bitwise the same each time, without atomics.
//
// Every partial sum of the other kernels has a slot with one writer. fold adds up the rows of a matrix of slots, sum a vector.
//
// Geometry: fold: a thread a column; sum: one block. Not yet run on hardware.
#include "common.cuh"

struct Fold {
    /// [groups, cols]
    const double* slots;
    /// One of the two.
    double* out;
    float* out_f32;
    int64_t groups, cols;
    uint32_t accumulate, padding;
};

// out_j (+)= Σ_g slots_gj
KERNEL fold(ARGUMENTS(Fold)) {
    const int64_t col = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (col >= p.cols) return;
    double sum = 0.0;
    if (p.accumulate) sum = p.out != nullptr ? p.out[col] : double(p.out_f32[col]);
    for (int64_t group = 0; group < p.groups; ++group) sum += p.slots[group * p.cols + col];
    if (p.out != nullptr)
        p.out[col] = sum;
    else
        p.out_f32[col] = float(sum);
}

struct Sum {
    const double* values;
    double* out;
    int64_t count;
    double factor;
    /// What the sum is added to, if not to `out`.
    double base;
    uint32_t accumulate, padding;
};

// *out = (*out or base) + factor·Σ values
KERNEL __launch_bounds__(1024) sum(ARGUMENTS(Sum)) {
    __shared__ double partial[32];
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < p.count; i += 1024) sum += p.values[i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = warp_sum(partial[threadIdx.x]);
        if (threadIdx.x == 0) *p.out = (p.accumulate ? *p.out : p.base) + p.factor * sum;
    }
}
