// The product that carries every family: C = Σ_segments left·right, whose tile an epilogue finishes.
//
// Operands are 16-bit (bf16 or f16), in one or more planes: a float32 matrix is the sum of three bf16 matrices (8 + 8 + 8 bits), a
// centred or scaled 16-bit one the sum of two. A segment is a pair of planes; all segments run through one loop over depth into the
// same f32 accumulators, so float32 costs six products and is as exact as float32 arithmetic, and bf16 costs one.
//
// Trick: an sm_80 pipeline that runs everywhere. Four stages of cp.async fill 128×32 tiles of both operands; XOR-swizzled 16-byte
// chunks keep ldmatrix free of bank conflicts; eight warps (2×4) compute 64×32 each with mma.m16n8k16. Either operand may have its
// depth contiguous ("Depth") or the other index ("Across", read by ldmatrix.trans), so nothing is ever transposed in memory.
// Ragged edges are zeros that cp.async fills in; every row of an operand starts at a multiple of 16 bytes, which the host sees to.
// The finished tile passes through shared memory, so that an epilogue sees whole rows: warp w has rows 16w to 16w + 15, lane l
// columns 4l to 4l + 3. Stores are then coalesced, row sums are warp shuffles, column sums are registers.
//
// Geometry: 256 threads, 128×128 of C a block, 68 KiB of shared memory, at most 128 registers. Not yet run on hardware.
#pragma once
#include "common.cuh"

constexpr int TILE = 128, TILE_DEPTH = 32, STAGES = 4, WARPS = 8, THREADS = 32 * WARPS;
constexpr int WARP_ROWS = TILE / WARPS;
constexpr uint32_t OPERAND_BYTES = TILE * TILE_DEPTH * 2, STAGE_BYTES = 2 * OPERAND_BYTES;
/// Floats between the rows of the finished tile: 8 more than a row, so that writing fragments has no bank conflicts.
constexpr int TILE_STRIDE = TILE + 8;
constexpr int SHARED_BYTES = TILE * TILE_STRIDE * 4;
static_assert(SHARED_BYTES >= int(STAGES * STAGE_BYTES));
extern __shared__ __align__(16) unsigned char shared_memory[];

/// Which index of an operand is contiguous in memory.
enum class Major { Depth, Across };

/// A 16-bit operand in planes; rows start at multiples of 8 elements.
struct Operand {
    const uint16_t* data;
    int64_t row_stride;
    int64_t plane_stride;
};

/// left [rows, depth] · right [depth, cols].
struct Gemm {
    Operand left, right;
    int32_t rows, cols, depth;
    /// Pairs of planes; four bits each of the two words below say which.
    uint32_t segments;
    uint32_t left_planes, right_planes;
    /// Which tiles there are.
    uint32_t region;
    uint32_t padding;
};

/// All tiles; those on and above the diagonal; those on the diagonal; those on and above it, the former left at zero.
enum Region : uint32_t { FULL = 0, UPPER = 1, DIAGONAL = 2, ABOVE_DIAGONAL = 3 };

/// A finished tile of C in shared memory. Rows and columns beyond the matrix hold zeros.
struct Tile {
    float* data;
    int row0, col0;
    /// Rows and columns within the matrix.
    int rows, cols;
    /// Which tile it is.
    int row_index, col_index;

    __device__ __forceinline__ int lane_col() const { return threadIdx.x % 32 * 4; }
    __device__ __forceinline__ int first_row() const { return threadIdx.x / 32 * WARP_ROWS; }
    /// Columns that this lane has, 0 to 4.
    __device__ __forceinline__ int lane_cols() const {
        const int count = cols - lane_col();
        return count < 0 ? 0 : count < 4 ? count : 4;
    }
    /// This lane's part of a row.
    __device__ __forceinline__ void read(float (&v)[4], int row) const {
        const float4 four = *reinterpret_cast<const float4*>(data + row * TILE_STRIDE + lane_col());
        v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
    }
    /// Replaces this lane's part of a row.
    __device__ __forceinline__ void write(const float (&v)[4], int row) const {
        *reinterpret_cast<float4*>(data + row * TILE_STRIDE + lane_col()) = make_float4(v[0], v[1], v[2], v[3]);
    }
    /// This lane's columns of a vector over the matrix's columns; 0 without one.
    __device__ __forceinline__ void vector(float (&v)[4], const float* from) const {
        load4(v, from + col0 + lane_col(), from == nullptr ? 0 : lane_cols());
    }
    /// slots[col] = Σ over the tile's rows, from each lane's sums over its warp's rows. The tile is used up; `which` tells apart
    /// several such sums of one tile.
    __device__ __forceinline__ void column_sums(const float (&v)[4], double* slots, int which) const {
        float* partial = data + which * WARPS * TILE;
        // A further sum has room of its own, and nobody reads the tile any more.
        if (which == 0) __syncthreads();
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[threadIdx.x / 32 * TILE + lane_col() + i] = v[i];
        __syncthreads();
        if (int(threadIdx.x) < cols) {
            double sum = 0.0;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) sum += double(partial[warp * TILE + threadIdx.x]);
            slots[col0 + threadIdx.x] = sum;
        }
    }
    /// *slot = Σ over all threads. The tile is used up.
    __device__ __forceinline__ void block_sum(double x, double* slot) const {
        double* partial = reinterpret_cast<double*>(data);
        x = warp_sum(x);
        __syncthreads();
        if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
        __syncthreads();
        if (threadIdx.x == 0) {
            double sum = 0.0;
            for (int warp = 0; warp < WARPS; ++warp) sum += partial[warp];
            *slot = sum;
        }
    }
};

/// The tile of block `block`. Full: groups of 8 tile rows, column by column, so that blocks that run together share operands in L2.
/// Upper: column by column down to the diagonal. Diagonal: along it.
__device__ __forceinline__ void place_tile(const Gemm& p, int block, int& row, int& col) {
    const int rows = (p.rows + TILE - 1) / TILE, cols = (p.cols + TILE - 1) / TILE;
    if (p.region == DIAGONAL) {
        row = col = block;
    } else if (p.region != FULL) {
        col = int((sqrtf(8.0f * float(block) + 1.0f) - 1.0f) * 0.5f);
        // The root is rounded.
        while (int64_t(col) * (col + 1) / 2 > block) --col;
        while (int64_t(col + 1) * (col + 2) / 2 <= block) ++col;
        row = block - int(int64_t(col) * (col + 1) / 2);
    } else {
        const int64_t group_tiles = int64_t(8) * cols;
        const int first = int(block / group_tiles) * 8, within = int(block % group_tiles);
        const int height = rows - first < 8 ? rows - first : 8;
        row = first + within % height;
        col = within / height;
    }
}

/// Where 16-byte chunk `chunk` of a line lies: lines are 64 bytes (Depth) or 256 bytes (Across).
template <Major MAJOR>
__device__ __forceinline__ uint32_t chunk_offset(int line, int chunk) {
    return MAJOR == Major::Depth ? line * 64 + (chunk ^ (line >> 1 & 3)) * 16 : line * 256 + (chunk ^ (line & 7)) * 16;
}

/// Starts the copy of one operand's tile: `first` its first row (or column) across, `depth0` its first depth.
template <Major MAJOR>
__device__ __forceinline__ void fetch_operand(
    uint32_t target, const Operand& operand, int plane, int first, int across, int depth0, int depth
) {
    constexpr int CHUNKS = MAJOR == Major::Depth ? TILE_DEPTH / 8 : TILE / 8;
    const uint16_t* plane_data = operand.data + plane * operand.plane_stride;
#pragma unroll
    for (int i = 0; i < TILE * TILE_DEPTH / 8 / THREADS; ++i) {
        const int index = threadIdx.x + i * THREADS, line = index / CHUNKS, chunk = index % CHUNKS;
        const int line_at = (MAJOR == Major::Depth ? first : depth0) + line, lines = MAJOR == Major::Depth ? across : depth;
        const int at = (MAJOR == Major::Depth ? depth0 : first) + chunk * 8, end = MAJOR == Major::Depth ? depth : across;
        const int live = line_at < lines ? max(0, min(8, end - at)) : 0;
        const uint16_t* source = live > 0 ? plane_data + line_at * operand.row_stride + at : plane_data;
        cp_async_16(target + chunk_offset<MAJOR>(line, chunk), source, live * 2);
    }
}

/// The left operand's fragment of rows row..row + 16, depth 16·step..16·step + 16.
template <Major MAJOR>
__device__ __forceinline__ void left_fragment(uint32_t (&a)[4], uint32_t stage, int row, int step) {
    const int lane = threadIdx.x % 32;
    if (MAJOR == Major::Depth)
        ldmatrix_x4(a, stage + chunk_offset<MAJOR>(row + lane % 16, step * 2 + lane / 16));
    else
        ldmatrix_x4_trans(a, stage + chunk_offset<MAJOR>(step * 16 + lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2));
}

/// The right operand's fragments of columns col..col + 8 and col + 8..col + 16.
template <Major MAJOR>
__device__ __forceinline__ void right_fragment(uint32_t (&b)[4], uint32_t stage, int col, int step) {
    const int lane = threadIdx.x % 32;
    if (MAJOR == Major::Depth)
        ldmatrix_x4(b, stage + chunk_offset<MAJOR>(col + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
    else
        ldmatrix_x4_trans(b, stage + chunk_offset<MAJOR>(step * 16 + lane / 8 % 2 * 8 + lane % 8, col / 8 + lane / 16));
}

/// One tile of the product, then its epilogue.
template <class T, Major LEFT, Major RIGHT, class Epilogue>
__device__ __forceinline__ void gemm(const Gemm& p, const Epilogue& epilogue) {
    int row_index, col_index;
    place_tile(p, blockIdx.x, row_index, col_index);
    const int row0 = row_index * TILE, col0 = col_index * TILE;
    const int warp_row = threadIdx.x / 128 * 64, warp_col = threadIdx.x / 32 % 4 * 32;
    const int depth_tiles = (p.depth + TILE_DEPTH - 1) / TILE_DEPTH;
    const int total = p.region == ABOVE_DIAGONAL && row_index == col_index ? 0 : depth_tiles * int(p.segments);
    const uint32_t stages = shared_address(shared_memory);

    int fetched = 0, segment = 0, depth_tile = 0;
    auto fetch = [&] {
        if (fetched < total) {
            const uint32_t stage = stages + fetched % STAGES * STAGE_BYTES;
            const int left_plane = p.left_planes >> 4 * segment & 15, right_plane = p.right_planes >> 4 * segment & 15;
            fetch_operand<LEFT>(stage, p.left, left_plane, row0, p.rows, depth_tile * TILE_DEPTH, p.depth);
            fetch_operand<RIGHT>(stage + OPERAND_BYTES, p.right, right_plane, col0, p.cols, depth_tile * TILE_DEPTH, p.depth);
            if (++depth_tile == depth_tiles) depth_tile = 0, ++segment;
        }
        ++fetched;
        // A group each time, empty or not, so that the wait below always counts the same.
        cp_async_commit();
    };
    for (int i = 0; i < STAGES - 1; ++i) fetch();

    float sums[4][4][4] = {};
    for (int done = 0; done < total; ++done) {
        cp_async_wait<STAGES - 2>();
        // Everyone's copies of this stage have landed, and nobody reads any more the stage that is filled next.
        __syncthreads();
        fetch();
        const uint32_t stage = stages + done % STAGES * STAGE_BYTES;
#pragma unroll
        for (int step = 0; step < TILE_DEPTH / 16; ++step) {
            uint32_t a[4][4], b[4][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) left_fragment<LEFT>(a[i], stage, warp_row + i * 16, step);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                uint32_t pair[4];
                right_fragment<RIGHT>(pair, stage + OPERAND_BYTES, warp_col + j * 16, step);
                b[2 * j][0] = pair[0], b[2 * j][1] = pair[1], b[2 * j + 1][0] = pair[2], b[2 * j + 1][1] = pair[3];
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) mma_m16n8k16(sums[i][j], a[i], b[j], T());
        }
    }

    // The stages' memory becomes the tile's. No copy is under way: the last wait left only empty groups.
    __syncthreads();
    float* data = reinterpret_cast<float*>(shared_memory);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = warp_row + i * 16 + half * 8 + lane / 4, col = warp_col + j * 8 + lane % 4 * 2;
                *reinterpret_cast<float2*>(data + row * TILE_STRIDE + col) =
                    make_float2(sums[i][j][2 * half], sums[i][j][2 * half + 1]);
            }
    __syncthreads();
    epilogue(Tile{data, row0, col0, min(TILE, p.rows - row0), min(TILE, p.cols - col0), row_index, col_index});
}

/// A kernel's argument: the product and its epilogue.
template <class Epilogue>
struct Fused {
    Gemm gemm;
    Epilogue epilogue;
};

#define GEMM_KERNEL(NAME, T, LEFT, RIGHT, ...)                                                       \
    KERNEL __launch_bounds__(THREADS, 2) NAME(ARGUMENTS(Fused<__VA_ARGS__>)) {                       \
        gemm<T, Major::LEFT, Major::RIGHT>(p.gemm, p.epilogue);                                      \
    }
