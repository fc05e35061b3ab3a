// Batch statistics: the moments' shift, comoments, and what the backward pass needs of them.
//
// comoments is the symmetric product of centred operands (prepare.cu), upper tiles only. gram_primal is the same product, turned into M
// by its epilogue while the tile is in shared memory: covariances never reach memory but for the tiles on the diagonal. Those are
// computed first, for the variances must come from the same product: tensor cores may cut instead of round, and a bias that
// covariances and variances share cancels in the gradient of nearly collinear columns. M is written coalesced on both sides of the
// diagonal, exactly symmetric. Comoments of several blocks enter as what the product is added to; a product of depth 0 finishes
// them. Tile sums of q and of the offset have a slot each for rows and for columns.
//
// Geometry: gemm.cuh; block 32×8 for recentre, a thread a column for the others. Not yet run on hardware.
#include "mirror.cuh"
#include "store.cuh"

GEMM_KERNEL(comoments, bf16, Across, Across, StoreEpilogue)

// M_ij = factor·C_ij/(s_i s_j), for tiles on and above the diagonal and their mirror images.
struct CoupleEpilogue {
    /// Comoments of the tiles on the diagonal, and those that the product is added to above it, zeros if missing. May be `coupling`.
    View<const float> diagonal, before;
    View<float> coupling;
    /// Σ(a − c), 1/s (0 for a dead column), μ less its rounded value.
    const double *sum, *inverse_deviation, *residue;
    /// Σ Ĉ² and Σ M·residue of each tile: over a row at [column tile, row], over a column at [row tile, column].
    double *q_rows, *q_cols, *offset_rows, *offset_cols;
    int64_t latents;
    /// 1/N, 1/(N−1), 4 λ_tc/(N−1).
    double inverse_count, inverse_degrees, factor;

    template <class Tile>
    __device__ __forceinline__ void operator()(const Tile& tile) const {
        const bool on_diagonal = tile.row_index == tile.col_index;
        const int col = tile.lane_col(), count = tile.lane_cols();
        const View<const float> given = on_diagonal ? diagonal : before;
        double sum_j[4], inverse_j[4], residue_j[4];
        float q_col[4] = {}, offset_col[4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int64_t j = tile.col0 + (i < count ? col + i : 0);
            sum_j[i] = sum[j], inverse_j[i] = i < count ? inverse_deviation[j] : 0.0, residue_j[i] = residue[j];
        }
        for (int row = tile.first_row(); row < min(tile.first_row() + Tile::WARP_ROWS, tile.rows); ++row) {
            const int64_t at = tile.row0 + row;
            const double mean_i = sum[at] * inverse_count, inverse_i = inverse_deviation[at];
            const double scale = inverse_i * inverse_degrees, residue_i = residue[at];
            float v[4], earlier[4] = {}, q_row = 0.0f, offset_row = 0.0f;
            tile.read(v, row);
            // Within a tile on the diagonal only what lies above counts, or is there at all.
            const int first = on_diagonal ? max(0, row + 1 - col) : 0;
            if (given.data != nullptr) {
                const float* from = given.at(at, tile.col0 + col);
                if (first == 0) {
                    load4(earlier, from, count);
                } else {
#pragma unroll
                    for (int i = 1; i < 4; ++i)
                        if (i >= first && i < count) earlier[i] = from[i];
                }
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const bool live = i >= first && i < count;
                v[i] += earlier[i];
                // A dead column has correlation 0 whatever rounding left in the comoment.
                const double c = live ? (double(v[i]) - mean_i * sum_j[i]) * scale * inverse_j[i] : 0.0;
                v[i] = live ? float(factor * c * inverse_i * inverse_j[i]) : 0.0f;
                const float square = float(c * c);
                q_row += square, q_col[i] += square;
                offset_row = fmaf(v[i], float(residue_j[i]), offset_row);
                offset_col[i] = fmaf(v[i], float(residue_i), offset_col[i]);
            }
            tile.write(v, row);
            const double q = warp_sum(double(q_row)), offset = warp_sum(double(offset_row));
            if (threadIdx.x % 32 == 0)
                q_rows[tile.col_index * latents + at] = q, offset_rows[tile.col_index * latents + at] = offset;
        }
        store_mirrored(tile, coupling);
        tile.column_sums(q_col, q_cols + tile.row_index * latents, 0);
        tile.column_sums(offset_col, offset_cols + tile.row_index * latents, 1);
    }
};
GEMM_KERNEL(gram_primal, bf16, Across, Across, CoupleEpilogue)

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

struct FinishPrimal {
    /// As gram_primal leaves them.
    const double *q_rows, *q_cols, *offset_rows, *offset_cols;
    const double *variance, *inverse_deviation, *residue;
    /// q for the loss.
    double* q;
    float *offset, *scale;
    int64_t latents;
    double count, eps, lambda_var, lambda_tc;
};

KERNEL finish_primal(ARGUMENTS(FinishPrimal)) {
    const int64_t j = int64_t(blockIdx.x) * 256 + threadIdx.x;
    if (j >= p.latents) return;
    double q = 0.0, offset = 0.0;
    const int64_t tiles = (p.latents + TILE - 1) / TILE, own = j / TILE;
    for (int64_t tile = 0; tile <= own; ++tile)
        q += p.q_cols[tile * p.latents + j], offset += p.offset_cols[tile * p.latents + j];
    for (int64_t tile = own; tile < tiles; ++tile)
        q += p.q_rows[tile * p.latents + j], offset += p.offset_rows[tile * p.latents + j];
    p.q[j] = q;
    const double v = p.variance[j];
    const double correlation = v == 0.0 ? 0.0 : 4.0 * p.lambda_tc * q * p.inverse_deviation[j] / sqrt(v);
    const float scale = float(-(correlation + 2.0 * p.lambda_var / (v + p.eps)) / (p.count - 1.0));
    p.scale[j] = scale;
    // Also for the rounding of the mean in (a − μ)·d.
    p.offset[j] = float(offset + double(scale) * p.residue[j]);
}
