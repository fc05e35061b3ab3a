// FusedStep: the whole step of a small batch in one cooperative launch, from the product x·Wᵀ to the updated weights.
//
// A small step is bound by launches and by what they wait for, not by arithmetic: 128×784×64 is 14 million multiply-adds, half a
// microsecond of an H100's f32 units, in more than twenty kernels one after the other. Here it is four phases with three barriers of the whole
// grid between them; all that goes from one to the next lies in the L2.
//
// | phase | a block's unit of work | leaves |
// |---|---|---|
// | encode | a square of 8×8 of z, four warps, each 4×4 | a, column sums of four rows |
// | statistics | four latents against all; or eight rows | M, shift, d, offset; ℓ |
// | gradient | a square of 8×8 of dZ; the last block also adds up the losses | dZ |
// | weights | four latents by 128 inputs | dW and db, or the updated parameters |
//
// Trick: products are f32 multiply-adds, exact for every storage type, so nothing is split into planes, and the sum of a product is
// cut over lanes (depth contiguous) or over warps (rows) and folded in a fixed tree. How work is cut does not depend on the grid, so any
// number of blocks gives the same bits. A group of four latents is read against all latents: its column of M, q and the offset are whole
// within a block, in slots with one writer. Each such block finds all means and variances anew, which costs reading a once more instead
// of one more barrier. Sums of squares about a rounded mean come from the same order of rows as the comoments, so the variances are the
// diagonal of the same matrix.
//
// Geometry: 256 threads, at most two blocks a multiprocessor (128 registers, 18 KiB of shared memory), as many blocks as there are units.
// All blocks must run at the same time. At most 256 latents: a thread each.
//
// Predicted for an H100 and 128×784×64, f32, in microseconds: launch 3 to 4; encode 1.5 (seven steps of 128 in depth, an L2 latency and
// a half each); statistics 2; gradient 0.8; weights 1.5; three barriers of an atomic, a few polls and two latencies 2.5; in all 12.
// Not yet run on hardware.
#include "optimizer.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;
/// Columns that a warp has at a time, four a lane.
constexpr int WARP_COLS = 128;

/// As the host numbers them.
enum Rule : uint32_t { GRADIENT = 0, SGD = 1, ADAM = 2 };

/// What becomes of a gradient that stands in registers.
template <class E>
struct Outlet {
    /// The gradient itself, for GRADIENT.
    View<float> gradient;
    Sgd<E> sgd;
    Adam<E> adam;
    uint32_t rule, padding;

    /// Four neighbours of a row, the first of them parameter number `at`.
    __device__ __forceinline__ void take(int row, int col, int64_t at, int count, const float (&v)[4]) const {
        if (rule == GRADIENT)
            store4(gradient.at(row, col), v, count);
        else if (rule == SGD)
            sgd.update(at, count, v);
        else
            adam.update(at, count, v);
    }
};

template <class E>
struct TinyStep {
    View<const E> x, weight;
    const float* bias;
    /// a and dZ as stored, if wanted.
    View<E> activations, dz;
    float* row_loss;
    /// Σℓ; L_var and L_tc.
    double *row_loss_sum, *losses;
    /// Zero before the first launch, then left alone.
    uint32_t* barrier;

    // Scratch. Matrices over latents have rows of a multiple of four, with zeros beyond the latents.
    /// a as it is stored, widened, and dZ: [rows up to a multiple of four, latents]. M: [latents up to a multiple of four, latents].
    float *a, *gradient, *coupling;
    /// Σ a of four rows each: [rows/4, latents].
    float* column_sums;
    /// c near μ, d, M(μ − c) + d·(μ − c).
    float *shift, *scale, *offset;
    /// ℓ; −log(v + ε) and q of each latent.
    double *row_losses, *variance_losses, *q;

    Outlet<E> weight_outlet, bias_outlet;
    double eps, lambda_var, lambda_tc;
    int32_t rows, inputs, latents;
    float row_weight;
    uint32_t activation;
    /// Whether there is more to do than the losses.
    uint32_t backward;

    /// Floats between the rows of a matrix over latents.
    __device__ __forceinline__ int width() const { return (latents + 3) / 4 * 4; }
    __device__ __forceinline__ bool has_statistics() const { return lambda_var != 0.0 || lambda_tc != 0.0; }
};

/// All threads of all blocks: what was written before it is seen after it.
///
/// The number's upper bit turns when all blocks have arrived, for one of them adds what the others leave to it. The lower bits are
/// zero again then.
__device__ __forceinline__ void grid_barrier(uint32_t* barrier) {
    __syncthreads();
    if (threadIdx.x == 0) {
        constexpr uint32_t TURN = 1u << 31;
        fence_device();
        const uint32_t before = atomic_add_relaxed(barrier, blockIdx.x == 0 ? TURN - (gridDim.x - 1) : 1);
        while (((load_relaxed(barrier) ^ before) & TURN) == 0) {
        }
        fence_device();
    }
    __syncthreads();
}

/// Tiles of 4×4 that this warp computes: four warps take a square of two tiles each way, which share what they read, blocks take squares
/// in turn.
template <class F>
__device__ __forceinline__ void each_tile(int row_tiles, int col_tiles, F compute) {
    const int across = (col_tiles + 1) / 2, squares = (row_tiles + 1) / 2 * across, warp = threadIdx.x / 32;
    for (int square = blockIdx.x + gridDim.x * (warp / 4); square < squares; square += 2 * gridDim.x) {
        const int row = square / across * 2 + warp / 2 % 2, col = square % across * 2 + warp % 2;
        if (row < row_tiles && col < col_tiles) compute(row, col);
    }
}

/// sums[4i + j] += left_i·right_j for this lane's four of the depth.
__device__ __forceinline__ void multiply(float (&sums)[16], const float (&left)[4][4], const float (&right)[4][4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums[4 * i + j] = fmaf(left[i][k], right[j][k], sums[4 * i + j]);
}

/// Sums over the warp, each by the same tree; lane l is left with that of v[l / 2]. Lanes that are 2·HALF apart share out their 2·HALF sums.
template <int HALF = 8>
__device__ __forceinline__ float warp_sum_16(float (&v)[16]) {
    const bool upper = threadIdx.x & 2 * HALF;
#pragma unroll
    for (int i = 0; i < HALF; ++i) {
        const float give = upper ? v[i] : v[i + HALF];
        v[i] = (upper ? v[i + HALF] : v[i]) + __shfl_xor_sync(FULL_WARP, give, 2 * HALF);
    }
    if constexpr (HALF > 1)
        return warp_sum_16<HALF / 2>(v);
    else
        return v[0] + __shfl_xor_sync(FULL_WARP, v[0], 1);
}

template <class E>
__device__ __forceinline__ bool is_aligned(const View<E>& view) {
    return is_aligned(view.data) && view.row_stride % 4 == 0;
}

template <class E>
__device__ __forceinline__ void encode(const TinyStep<E>& p) {
    const int lane = threadIdx.x % 32, width = p.width();
    const bool aligned = is_aligned(p.x) && is_aligned(p.weight);
    each_tile((p.rows + 3) / 4, width / 4, [&](int row_tile, int col_tile) {
        const int row0 = row_tile * 4, col0 = col_tile * 4;
        float sums[16] = {}, left_part[4][4], right_part[4][4];
        int depth = 0;
        if (aligned && row0 + 4 <= p.rows && col0 + 4 <= p.latents) {
#pragma unroll 1
            for (; depth + WARP_COLS <= p.inputs; depth += WARP_COLS) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    move4(left_part[i], p.x.at(row0 + i, depth + lane * 4));
                    move4(right_part[i], p.weight.at(col0 + i, depth + lane * 4));
                }
                multiply(sums, left_part, right_part);
            }
        }
        for (; depth < p.inputs; depth += WARP_COLS) {
            const int k = depth + lane * 4, count = left(p.inputs, k);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                load4(left_part[i], p.x.at(row0 + i, k), row0 + i < p.rows ? count : 0);
                load4(right_part[i], p.weight.at(col0 + i, k), col0 + i < p.latents ? count : 0);
            }
            multiply(sums, left_part, right_part);
        }
        const float z = warp_sum_16(sums);
        const int row = row0 + lane / 8, col = col0 + lane / 2 % 4;
        const bool live = row < p.rows && col < p.latents;
        // Everything downstream is of the stored value.
        const float a = live ? widen(narrow<E>(activate(p.activation, z + p.bias[col]))) : 0.0f;
        float sum = a;
        sum += __shfl_xor_sync(FULL_WARP, sum, 8);
        sum += __shfl_xor_sync(FULL_WARP, sum, 16);
        if (lane % 2 == 0) {
            p.a[row * width + col] = a;
            if (lane < 8) p.column_sums[row_tile * width + col] = sum;
        } else if (live && p.activations.data != nullptr) {
            *p.activations.at(row, col) = narrow<E>(a);
        }
    });
}

/// ℓ = m − log Σ exp(m − a), m the least a; by a warp.
template <class E>
__device__ __forceinline__ void row_loss(const TinyStep<E>& p, int row) {
    const int lane = threadIdx.x % 32;
    float a[2][4] = {}, least = INFINITY, sum = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int col = half * WARP_COLS + lane * 4, count = left(p.latents, col);
        if (count > 0) move4(a[half], p.a + row * p.width() + col);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[half][i] = i < count ? a[half][i] : INFINITY;
            least = a[half][i] < least ? a[half][i] : least;
        }
    }
    // Kept finite, so that infinite a need no case of their own.
    least = fminf(fmaxf(warp_min(least), -3.402823466e38f), 3.402823466e38f);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum += expf(least - a[half][i]);
    const double loss = double(least) - log(warp_sum(double(sum)));
    if (lane == 0) p.row_losses[row] = loss, p.row_loss[row] = float(loss);
}

/// A column's numbers, for the four latents of a group.
struct Column {
    double sum, variance, inverse_deviation, residue;
};

/// What the threads of a block share within a phase.
struct alignas(16) Shared {
    /// Parts of sums, a warp each.
    float parts[WARPS * 4 * WARP_COLS];
    float shift[THREADS];
    Column columns[4];
    double q[WARPS][4], offset[WARPS][4];
    float bias[WARPS][4];
};
// As the host asks for it.
static_assert(sizeof(Shared) == 18176);
extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ __forceinline__ void keep4(float* shared, const float (&v)[4]) {
    *reinterpret_cast<float4*>(shared) = make_float4(v[0], v[1], v[2], v[3]);
}

/// Sums over warps, of eight columns a lane; thread t is left with that of column t. Calls take turns with the two halves of the parts:
/// whoever comes back to a half knows by the barrier of the other that it is read.
__device__ __forceinline__ float over_warps(Shared& shared, int turn, const float (&v)[2][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* parts = shared.parts + turn % 2 * WARPS * THREADS;
#pragma unroll
    for (int half = 0; half < 2; ++half) keep4(parts + warp * THREADS + half * WARP_COLS + lane * 4, v[half]);
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum += parts[i * THREADS + threadIdx.x];
    return sum;
}

/// M, q, d and offset of four latents, by a block.
template <class E>
__device__ __forceinline__ void statistics(const TinyStep<E>& p, Shared& shared, int group) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = p.width(), first = group * 4;
    const bool coupled = p.lambda_tc != 0.0;
    // This thread's column.
    const int j = threadIdx.x;
    const double count = double(p.rows);

    // Moments about any number near the mean lose nothing.
    float total = 0.0f;
    if (j < width)
        for (int tile = 0; tile < (p.rows + 3) / 4; ++tile) total += p.column_sums[tile * width + j];
    shared.shift[j] = total / float(p.rows);
    __syncthreads();

    float shift[2][4], own_shift[4], sum[2][4] = {}, square[2][4] = {}, product[4][2][4] = {};
    int cols[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        // Lanes without columns do those of others.
        cols[half] = min(half * WARP_COLS + lane * 4, width - 4);
        move4(shift[half], &shared.shift[cols[half]]);
    }
    move4(own_shift, &shared.shift[first]);
#pragma unroll 2
    for (int row = warp; row < p.rows; row += WARPS) {
        const float* a = p.a + row * width;
        float own[4], other[2][4];
        move4(own, a + first);
#pragma unroll
        for (int half = 0; half < 2; ++half) move4(other[half], a + cols[half]);
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i] -= own_shift[i];
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const float centred = other[half][k] - shift[half][k];
                sum[half][k] += centred;
                square[half][k] = fmaf(centred, centred, square[half][k]);
#pragma unroll
                for (int i = 0; i < 4; ++i) product[i][half][k] = fmaf(own[i], centred, product[i][half][k]);
            }
    }
    const double sum_j = double(over_warps(shared, 0, sum)), square_j = double(over_warps(shared, 1, square));
    float comoment[4] = {};
    if (coupled) {
#pragma unroll
        for (int i = 0; i < 4; ++i) comoment[i] = over_warps(shared, i, product[i]);
    }

    // Clamped, for rounding may take it below 0. NaN stays.
    double variance = (square_j - sum_j * sum_j / count) / (count - 1.0);
    variance = variance < 0.0 ? 0.0 : variance;
    const double inverse = variance == 0.0 ? 0.0 : 1.0 / (sqrt(variance) + 1e-8), residue = sum_j / count;
    if (j / 4 == group) {
        shared.columns[j % 4] = {sum_j, variance, inverse, residue};
        p.shift[j] = shared.shift[j];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Column own = shared.columns[i];
        const bool live = coupled && first + i < p.latents && j < p.latents && first + i != j;
        // A dead column has correlation 0 whatever rounding left in the comoment.
        const double both = inverse * own.inverse_deviation;
        const double c = live ? (double(comoment[i]) - own.sum * sum_j / count) * both / (count - 1.0) : 0.0;
        const float m = live ? float(4.0 * p.lambda_tc / (count - 1.0) * c * both) : 0.0f;
        if (j < width) p.coupling[(first + i) * width + j] = m;
        const double q = warp_sum(c * c), offset = warp_sum(live ? double(m) * residue : 0.0);
        if (lane == 0) shared.q[warp][i] = q, shared.offset[warp][i] = offset;
    }
    __syncthreads();
    if (j < 4) {
        const Column own = shared.columns[j];
        double q = 0.0, offset = 0.0;
        for (int i = 0; i < WARPS; ++i) q += shared.q[i][j], offset += shared.offset[i][j];
        const double v = own.variance;
        const double correlation = v == 0.0 ? 0.0 : 4.0 * p.lambda_tc * q * own.inverse_deviation / sqrt(v);
        const float scale = float(-(correlation + 2.0 * p.lambda_var / (v + p.eps)) / (count - 1.0));
        p.scale[first + j] = scale;
        // Also for what is left of the mean in (a − c)·d.
        p.offset[first + j] = float(offset + double(scale) * own.residue);
        p.q[first + j] = q;
        p.variance_losses[first + j] = -log(v + p.eps);
    }
}

/// dZ = [(a − c)·M − offset + (a − c)·d + w·exp(ℓ − a)] ⊙ f'(z)
template <class E>
__device__ __forceinline__ void gradient(const TinyStep<E>& p) {
    const int lane = threadIdx.x % 32, width = p.width();
    each_tile((p.rows + 3) / 4, width / 4, [&](int row_tile, int col_tile) {
        const int row0 = row_tile * 4, col0 = col_tile * 4;
        float sums[16] = {};
        if (p.lambda_tc != 0.0)
            for (int k = lane * 4; k < width; k += WARP_COLS) {
                float shift[4], left_part[4][4], right_part[4][4];
                move4(shift, p.shift + k);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    move4(left_part[i], p.a + (row0 + i) * width + k);
                    // M is symmetric: its rows are its columns.
                    move4(right_part[i], p.coupling + (col0 + i) * width + k);
#pragma unroll
                    for (int of = 0; of < 4; ++of) left_part[i][of] -= shift[of];
                }
                multiply(sums, left_part, right_part);
            }
        float da = warp_sum_16(sums);
        const int row = row0 + lane / 8, col = col0 + lane / 2 % 4;
        const bool live = row < p.rows && col < p.latents;
        if (live) {
            const float a = p.a[row * width + col];
            if (p.has_statistics()) da = fmaf(a - p.shift[col], p.scale[col], da - p.offset[col]);
            if (p.row_weight != 0.0f) da = fmaf(p.row_weight, expf(p.row_loss[row] - a), da);
            da = through_activation(p.activation, a, da);
        }
        if (lane % 2 == 0)
            p.gradient[row * width + col] = live ? da : 0.0f;
        else if (live && p.dz.data != nullptr)
            *p.dz.at(row, col) = narrow<E>(da);
    });
}

/// Sums of the losses, a warp each.
template <class E>
__device__ __forceinline__ void losses(const TinyStep<E>& p) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (warp > 2 || (warp > 0 && !p.has_statistics())) return;
    const double* values = warp == 0 ? p.row_losses : warp == 1 ? p.variance_losses : p.q;
    double sum = 0.0;
    for (int i = lane; i < (warp == 0 ? p.rows : p.latents); i += 32) sum += values[i];
    sum = warp_sum(sum);
    if (lane == 0) *(warp == 0 ? p.row_loss_sum : p.losses + (warp - 1)) = sum;
}

/// dW = dZᵀ x and db = Σ dZ, a block four latents and 128 inputs at a time; and what becomes of them.
template <class E>
__device__ __forceinline__ void weights(const TinyStep<E>& p, Shared& shared) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = p.width();
    // Without inputs there still is a bias.
    const int col_tiles = max(1, (p.inputs + WARP_COLS - 1) / WARP_COLS);
    for (int unit = blockIdx.x; unit < width / 4 * col_tiles; unit += gridDim.x) {
        const int first = unit / col_tiles * 4, col0 = unit % col_tiles * WARP_COLS;
        const int col = col0 + lane * 4, count = left(p.inputs, col);
        float sums[4][4] = {}, bias[4] = {};
        auto add = [&](int row, const float(&x)[4]) {
            float dz[4];
            move4(dz, p.gradient + row * width + first);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                bias[i] += dz[i];
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[i][k] = fmaf(dz[i], x[k], sums[i][k]);
            }
        };
        float x[4];
        if (is_aligned(p.x) && col0 + WARP_COLS <= p.inputs) {
            // Nothing to decide, so that several rows are on their way at a time.
#pragma unroll 4
            for (int row = warp; row < p.rows; row += WARPS) move4(x, p.x.at(row, col)), add(row, x);
        } else {
            for (int row = warp; row < p.rows; row += WARPS) load4(x, p.x.at(row, col), count), add(row, x);
        }
        // Nobody reads the parts of the unit before any more.
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; ++i) keep4(&shared.parts[(warp * 4 + i) * WARP_COLS + lane * 4], sums[i]);
        if (lane == 0) keep4(shared.bias[warp], bias);
        __syncthreads();
        // A warp a latent; the next one four biases.
        float total[4] = {};
        if (warp < 4) {
            for (int from = 0; from < WARPS; ++from) {
                float part[4];
                move4(part, &shared.parts[(from * 4 + warp) * WARP_COLS + lane * 4]);
#pragma unroll
                for (int k = 0; k < 4; ++k) total[k] += part[k];
            }
            const int latent = first + warp;
            if (latent < p.latents && count > 0)
                p.weight_outlet.take(latent, col, int64_t(latent) * p.inputs + col, count, total);
        } else if (warp == 4 && lane == 0 && col0 == 0) {
            for (int from = 0; from < WARPS; ++from)
#pragma unroll
                for (int i = 0; i < 4; ++i) total[i] += shared.bias[from][i];
            p.bias_outlet.take(0, first, first, left(p.latents, first), total);
        }
    }
}

template <class E>
__device__ __forceinline__ void tiny_step(const TinyStep<E>& p) {
    Shared& shared = *reinterpret_cast<Shared*>(shared_memory);
    encode(p);
    grid_barrier(p.barrier);
    const int groups = p.has_statistics() ? p.width() / 4 : 0;
    for (int unit = blockIdx.x; unit < groups + (p.rows + WARPS - 1) / WARPS; unit += gridDim.x) {
        const int row = (unit - groups) * WARPS + int(threadIdx.x / 32);
        if (unit < groups)
            statistics(p, shared, unit);
        else if (row < p.rows)
            row_loss(p, row);
    }
    grid_barrier(p.barrier);
    if (blockIdx.x == gridDim.x - 1) losses(p);
    if (!p.backward) return;
    gradient(p);
    grid_barrier(p.barrier);
    weights(p, shared);
}
KERNEL __launch_bounds__(THREADS, 2) tiny_step_f32(ARGUMENTS(TinyStep<float>)) { tiny_step(p); }
KERNEL __launch_bounds__(THREADS, 2) tiny_step_bf16(ARGUMENTS(TinyStep<bf16>)) { tiny_step(p); }
KERNEL __launch_bounds__(THREADS, 2) tiny_step_f16(ARGUMENTS(TinyStep<f16>)) { tiny_step(p); }
