// A finished tile of a product as epilogues see it, the same under every mainloop, and in what order tiles are computed.
//
// The tile lies in shared memory, so that an epilogue sees whole rows: of eight warps, warp w has rows 16w to 16w + 15, lane l columns
// 4l to 4l + 3. Stores are then coalesced, row sums are warp shuffles, column sums are registers. Slots of sums are in units of this
// tile, however many warps finish it.
#pragma once
#include "common.cuh"

constexpr int TILE = 128;
/// Floats between the rows of the finished tile: 8 more than a row, so that writing fragments has no bank conflicts.
constexpr int TILE_STRIDE = TILE + 8;
constexpr int TILE_BYTES = TILE * TILE_STRIDE * 4;
// As bulk copies with a swizzle of 128 bytes need it.
extern __shared__ __align__(1024) unsigned char shared_memory[];

/// Which index of an operand is contiguous in memory.
enum class Major { Depth, Across };

/// All tiles; those on and above the diagonal; those on the diagonal; those on and above it, the former left at zero.
enum Region : uint32_t { FULL = 0, UPPER = 1, DIAGONAL = 2, ABOVE_DIAGONAL = 3 };

/// Whether an epilogue stores parts of the tile by bulk copies: they see what threads have written to it.
template <class Epilogue>
constexpr bool STORES_BY_COPIES = false;

/// A finished tile of C in shared memory, for a group of W warps; the block may have several such groups. Rows and columns beyond the
/// matrix hold zeros.
template <int W>
struct TileOf {
    static constexpr int WARPS = W, THREADS = 32 * W, WARP_ROWS = TILE / W;
    float* data;
    int row0, col0;
    /// Rows and columns within the matrix.
    int rows, cols;
    /// Which tile it is, and its own number among the product's.
    int row_index, col_index, index;

    /// This thread's group; eight warps are the only one.
    __device__ __forceinline__ static int group() { return W == 8 ? 0 : int(threadIdx.x) / THREADS; }
    /// This thread's number in its group.
    __device__ __forceinline__ static int thread() { return int(threadIdx.x) - group() * THREADS; }
    /// Barrier of the group.
    __device__ __forceinline__ static void sync() { named_barrier_sync(1 + group(), THREADS); }
    __device__ __forceinline__ int lane_col() const { return threadIdx.x % 32 * 4; }
    __device__ __forceinline__ int first_row() const { return thread() / 32 * WARP_ROWS; }
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
        if (which == 0) sync();
#pragma unroll
        for (int i = 0; i < 4; ++i) partial[thread() / 32 * TILE + lane_col() + i] = v[i];
        sync();
        if (thread() < cols) {
            double sum = 0.0;
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) sum += double(partial[warp * TILE + thread()]);
            slots[col0 + thread()] = sum;
        }
    }
    /// *slot = Σ over the group. The tile is used up.
    __device__ __forceinline__ void block_sum(double x, double* slot) const {
        double* partial = reinterpret_cast<double*>(data);
        x = warp_sum(x);
        sync();
        if (threadIdx.x % 32 == 0) partial[thread() / 32] = x;
        sync();
        if (thread() == 0) {
            double sum = 0.0;
            for (int warp = 0; warp < WARPS; ++warp) sum += partial[warp];
            *slot = sum;
        }
    }
};

/// Where block `index` of a region of rows×cols blocks lies. Full: groups of 8 block rows, column by column, so that blocks that run
/// together share operands in L2. Upper: column by column down to the diagonal. Diagonal: along it.
__device__ __forceinline__ void place(uint32_t region, int rows, int cols, int index, int& row, int& col) {
    if (region == DIAGONAL) {
        row = col = index;
    } else if (region != FULL) {
        col = int((sqrtf(8.0f * float(index) + 1.0f) - 1.0f) * 0.5f);
        // The root is rounded.
        while (int64_t(col) * (col + 1) / 2 > index) --col;
        while (int64_t(col + 1) * (col + 2) / 2 <= index) ++col;
        row = index - int(int64_t(col) * (col + 1) / 2);
    } else {
        const int64_t group_tiles = int64_t(8) * cols;
        const int first = int(index / group_tiles) * 8, within = int(index % group_tiles);
        const int height = rows - first < 8 ? rows - first : 8;
        row = first + within % height;
        col = within / height;
    }
}
