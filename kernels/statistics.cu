// Batch statistics: the moments' shift, comoments, and what the backward pass needs of them.
//
// comoments is the symmetric product of centred operands (prepare.cu), upper tiles only. couple turns comoments into M block by block
// of 32 rows, reading the upper triangle for both halves, so that M is written once, coalesced and exactly symmetric; q and the
// offset are row sums in float64, one slot a row and chunk of 1024 columns.
//
// Geometry: block 32×8 for couple and recentre, a thread a column for the others. Not yet run on hardware.
#include "store.cuh"

GEMM_KERNEL(comoments, bf16, Across, Across, StoreEpilogue)

template <class E>
struct Recentre {
    View<const E> activations;
    float* shift;
    double *sum, *squares;
    int64_t rows, cols;
    /// A column is summed again if its squared mean is more than this many times its variance.
    double limit;
};

// 32 columns a block. Columns far from 0 are summed again by 8 threads each.
template <class E>
__device__ __forceinline__ void recentre(const Recentre<E>& p) {
    __shared__ double partial[2][8][32];
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
    const int64_t col = int64_t(blockIdx.x) * 32 + lane;
    const bool live = col < p.cols;
    const double count = double(p.rows);
    double sum = live ? p.sum[col] : 0.0, square = live ? p.squares[col] : 0.0;
    if (p.rows == 0) {
        if (live && part == 0) p.shift[col] = 0.0f;
        return;
    }
    const double mean = sum / count;
    const float shift = float(mean);
    const double centre = double(shift);
    // About the exact mean; clamped, for rounding may take it below 0. NaN stays.
    double about_mean = square - sum * mean;
    about_mean = about_mean < 0.0 ? 0.0 : about_mean;
    const bool far = live && mean * mean * count > p.limit * about_mean && mean != 0.0;
    sum -= count * centre;
    square = about_mean + count * (mean - centre) * (mean - centre);
    // Also the barrier between everyone's reads of the sums and their overwriting.
    if (__syncthreads_or(far)) {
        double sum_again = 0.0, square_again = 0.0;
        if (far)
            for (int64_t row = part; row < p.rows; row += 8) {
                const double centred = double(widen(*p.activations.at(row, col))) - centre;
                sum_again += centred;
                square_again += centred * centred;
            }
        partial[0][part][lane] = sum_again, partial[1][part][lane] = square_again;
        __syncthreads();
        if (far && part == 0) {
            sum = 0.0, square = 0.0;
            for (int i = 0; i < 8; ++i) sum += partial[0][i][lane], square += partial[1][i][lane];
        }
    }
    if (live && part == 0) p.shift[col] = shift, p.sum[col] = sum, p.squares[col] = square;
}
KERNEL recentre_f32(ARGUMENTS(Recentre<float>)) { recentre(p); }
KERNEL recentre_bf16(ARGUMENTS(Recentre<bf16>)) { recentre(p); }
KERNEL recentre_f16(ARGUMENTS(Recentre<f16>)) { recentre(p); }

struct Variances {
    /// c, Σ(a − c), and Σ(a − c)² or the comoments with those on the diagonal.
    const float* shift;
    const double *sum, *squares;
    View<const float> comoments;
    /// μ, v, d.
    float *mean, *variance, *scale;
    /// v, 1/s (0 for a dead column), μ less its rounded value, −log(v + ε).
    double *variance_f64, *inverse_deviation, *residue, *loss;
    int64_t latents;
    /// N, ε, λ_var.
    double count, eps, lambda_var;
};

KERNEL variances(ARGUMENTS(Variances)) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (j >= p.latents) return;
    const double squares = p.comoments.data != nullptr ? double(*p.comoments.at(j, j)) : p.squares[j], sum = p.sum[j];
    const double mean = double(p.shift[j]) + sum / p.count;
    double v = (squares - sum * sum / p.count) / (p.count - 1.0);
    v = v < 0.0 ? 0.0 : v;
    p.variance_f64[j] = v;
    p.inverse_deviation[j] = v == 0.0 ? 0.0 : 1.0 / (sqrt(v) + 1e-8);
    p.mean[j] = float(mean);
    p.variance[j] = float(v);
    p.residue[j] = mean - double(float(mean));
    p.loss[j] = -log(v + p.eps);
    p.scale[j] = float(-2.0 * p.lambda_var / (v + p.eps) / (p.count - 1.0));
}

struct Couple {
    View<const float> comoments;
    const double *sum, *inverse_deviation, *residue;
    View<float> coupling;
    /// Row sums of Ĉ² and M·residue for each chunk of columns: [chunks, H].
    double *q_slots, *offset_slots;
    int64_t latents;
    /// 1/N, 1/(N−1), 4 λ_tc/(N−1).
    double inverse_count, inverse_degrees, factor;
};

constexpr int SIDE = 32, CHUNK = 1024;

// M_ij = factor·C_ij/(s_i s_j) for 32 rows i and a chunk of columns j. Every factor is symmetric in i and j to the last bit.
KERNEL couple(ARGUMENTS(Couple)) {
    __shared__ float tile[SIDE][SIDE + 1];
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
    const int64_t i0 = int64_t(blockIdx.x) * SIDE, h = p.latents;
    const int64_t end = min(h, (int64_t(blockIdx.y) + 1) * CHUNK);
    double q[4] = {}, offset[4] = {};
    for (int64_t j0 = int64_t(blockIdx.y) * CHUNK; j0 < end; j0 += SIDE) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int line = part + 8 * k;
            if (j0 >= i0) {
                // On and above the diagonal: as it stands. Below the diagonal of the diagonal block it is fetched mirrored.
                const int64_t i = i0 + line, j = j0 + lane;
                if (i < h && j < h) tile[line][lane] = *p.comoments.at(min(i, j), max(i, j));
            } else {
                const int64_t j = j0 + line, i = i0 + lane;
                if (i < h && j < h) tile[lane][line] = *p.comoments.at(j, i);
            }
        }
        __syncthreads();
        const int64_t j = j0 + lane;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int64_t i = i0 + part + 8 * k;
            if (i >= h || j >= h) continue;
            const double inverse = p.inverse_deviation[i] * p.inverse_deviation[j];
            const double covariance = (double(tile[part + 8 * k][lane]) - p.sum[i] * p.sum[j] * p.inverse_count) * p.inverse_degrees;
            // A dead column has correlation 0 whatever rounding left in the comoment.
            const double c = i == j ? 0.0 : covariance * inverse;
            const double m = i == j ? 0.0 : p.factor * c * inverse;
            *p.coupling.at(i, j) = float(m);
            q[k] += c * c;
            offset[k] += m * p.residue[j];
        }
        __syncthreads();
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int64_t i = i0 + part + 8 * k;
        const double row_q = warp_sum(q[k]), row_offset = warp_sum(offset[k]);
        if (lane == 0 && i < h) p.q_slots[blockIdx.y * h + i] = row_q, p.offset_slots[blockIdx.y * h + i] = row_offset;
    }
}

struct FinishPrimal {
    const double *q_slots, *offset_slots;
    const double *variance, *inverse_deviation, *residue;
    /// q for the loss.
    double* q;
    float *offset, *scale;
    int64_t latents, chunks;
    double count, eps, lambda_var, lambda_tc;
};

KERNEL finish_primal(ARGUMENTS(FinishPrimal)) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (j >= p.latents) return;
    double q = 0.0, offset = 0.0;
    for (int64_t chunk = 0; chunk < p.chunks; ++chunk)
        q += p.q_slots[chunk * p.latents + j], offset += p.offset_slots[chunk * p.latents + j];
    p.q[j] = q;
    const double v = p.variance[j];
    const double correlation = v == 0.0 ? 0.0 : 4.0 * p.lambda_tc * q * p.inverse_deviation[j] / sqrt(v);
    const float scale = float(-(correlation + 2.0 * p.lambda_var / (v + p.eps)) / (p.count - 1.0));
    p.scale[j] = scale;
    // Also for the rounding of the mean in (a − μ)·d.
    p.offset[j] = float(offset + double(scale) * p.residue[j]);
}
