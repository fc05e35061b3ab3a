// The mainloop of compute capability 9.0: TMA, mbarriers and wgmma, warp-specialised and persistent.
//
// Trick: a thread of the third warpgroup keeps a ring of stages filled by bulk tensor copies; two warpgroups multiply 64×256 each with
// wgmma, straight from shared memory, and give a stage back when the products that read it are done. An operand's part of a stage is
// pieces of 64×64 elements, each one copy with a swizzle of 128 bytes, whichever index is contiguous: the same tensor map and the same
// places serve both, only wgmma's descriptors differ. Ragged edges are zeros that the copies fill in.
// A cluster of two blocks computes 256×256, one above the other: each copies half of the right operand to both, for without that the
// L2 could not feed the tensor cores (32 bytes instead of 48 a clock and multiprocessor). Squares also make the symmetric products
// waste nothing but the lower quarter of those on the diagonal.
// Blocks are as many as multiprocessors and go from square to square, so that the ring is filled with the next one's operands while
// the tile of the last is finished. The accumulators pass through shared memory of their own, 128 columns after the other, to the
// epilogues of tile.cuh, whose 256 threads are those of the two warpgroups.
//
// Roles: warps 0 to 7 multiply and run the epilogue (232 registers), the first lane of warp 8 copies (40 registers), the rest is idle.
// Barriers of stage s: full[s], 1 arrival (of this block's copying thread) and 48 KiB; empty[s], 16 arrivals (warps of both blocks).
// Named barrier 1: the 256 threads, around and within an epilogue. A cluster barrier before the first copy and before the end.
//
// Geometry: 384 threads, 128×256 of C a block at a time, depth 64 a stage, 3 stages (144 KiB) and a tile (68 KiB). Not yet run on
// hardware.
//
// Rejected: four stages with the tile on top of them, for then no copy runs ahead under an epilogue; a tile of 128×128 a block, which
// asks the L2 for half as much again; boxes of 128 or 256 lines where the depth is contiguous, which save copies but need maps and
// places of their own for each case; clusters only where there are many squares: the idle half of a cluster costs nothing where
// multiprocessors are idle. A pingpong of two tiles, which would hide the epilogue under the other tile's products, needs an epilogue
// of 128 threads with a tile each; it is not there yet.
#pragma once
#include "tile.cuh"

constexpr int CLUSTER = 2, STAGES = 3, STAGE_DEPTH = 64, BLOCK_THREADS = THREADS + 128;
/// Rows and columns of a cluster's square, in tiles.
constexpr int SQUARE = 2;
/// A piece of an operand: 64×64 elements, lines of 128 bytes.
constexpr int PIECE = 64;
constexpr uint32_t PIECE_BYTES = PIECE * PIECE * 2;
constexpr int LEFT_PIECES = TILE / PIECE, RIGHT_PIECES = SQUARE * TILE / PIECE;
constexpr uint32_t STAGE_BYTES = (LEFT_PIECES + RIGHT_PIECES) * PIECE_BYTES;
/// Shared memory: stages, tile, mbarriers.
constexpr uint32_t TILE_AT = STAGES * STAGE_BYTES, FULL_AT = TILE_AT + TILE_BYTES, EMPTY_AT = FULL_AT + 8 * STAGES;
static_assert(EMPTY_AT + 8 * STAGES <= 227 * 1024);

/// left [rows, depth] · right [depth, cols].
struct Gemm {
    /// Operands as [plane, line, contiguous index], in boxes of a piece.
    TensorMap left, right;
    int32_t rows, cols, depth;
    /// Pairs of planes; four bits each of the two words below say which.
    uint32_t segments;
    uint32_t left_planes, right_planes;
    /// Which tiles there are, and the squares that hold them.
    uint32_t region;
    int32_t squares;
};

/// A place in the ring of stages: how often it went round is even or odd.
struct Ring {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};

/// The tiles of this block in turn: those of its cluster's squares in its own tile row.
struct Squares {
    int square = int(blockIdx.x) / CLUSTER;
    int row_index, col_index;
    __device__ __forceinline__ bool next(const Gemm& p) {
        if (square >= p.squares) return false;
        const int rows = (p.rows + SQUARE * TILE - 1) / (SQUARE * TILE), cols = (p.cols + SQUARE * TILE - 1) / (SQUARE * TILE);
        place(p.region, rows, cols, square, row_index, col_index);
        row_index = row_index * SQUARE + int(blockIdx.x) % CLUSTER, col_index *= SQUARE;
        square += int(gridDim.x) / CLUSTER;
        return true;
    }
};

/// What wgmma needs to know of the operand at `address`: lines of 128 bytes with their swizzle. Depth: eight lines are 1024 bytes, the
/// first field is not used. Across: pieces follow each other along the contiguous index, groups of eight lines along the depth.
template <Major MAJOR>
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
    constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62, GROUP = uint64_t(1024 / 16) << 32;
    constexpr uint64_t LEADING = uint64_t(MAJOR == Major::Depth ? 1 : PIECE_BYTES / 16) << 16;
    return SWIZZLE_128 | GROUP | LEADING | (address & 0x3ffff) / 16;
}
/// From one depth of 16 to the next, in the descriptor's units.
template <Major MAJOR>
constexpr uint64_t DEPTH_STEP = (MAJOR == Major::Depth ? 16 * 2 : 16 * 128) / 16;

/// Starts the copy of a piece: `first` its first row (or column) across, `depth0` its first depth.
template <Major MAJOR>
__device__ __forceinline__ void fetch_piece(uint32_t target, const TensorMap& map, int plane, int first, int depth0, uint32_t barrier) {
    bulk_load_3d(target, &map, MAJOR == Major::Depth ? depth0 : first, MAJOR == Major::Depth ? first : depth0, plane, barrier);
}
/// The same, to both blocks of the cluster.
template <Major MAJOR>
__device__ __forceinline__ void share_piece(uint32_t target, const TensorMap& map, int plane, int first, int depth0, uint32_t barrier) {
    bulk_load_3d_multicast(target, &map, MAJOR == Major::Depth ? depth0 : first, MAJOR == Major::Depth ? first : depth0, plane, barrier,
                           (1 << CLUSTER) - 1);
}

/// The copying thread: fills stages with the operands of all this block's tiles.
template <Major LEFT, Major RIGHT>
__device__ __forceinline__ void produce(const Gemm& p, uint32_t shared, uint32_t rank) {
    // Operands without elements have no map.
    if (p.depth > 0) prefetch_tensor_map(&p.left), prefetch_tensor_map(&p.right);
    Ring ring;
    for (Squares squares; squares.next(p);) {
        const int row0 = squares.row_index * TILE, col0 = squares.col_index * TILE;
        for (uint32_t segment = 0; segment < p.segments; ++segment) {
            const int left_plane = p.left_planes >> 4 * segment & 15, right_plane = p.right_planes >> 4 * segment & 15;
            for (int depth0 = 0; depth0 < p.depth; depth0 += STAGE_DEPTH) {
                const uint32_t full = shared + FULL_AT + 8 * ring.stage, stage = shared + ring.stage * STAGE_BYTES;
                // A new barrier counts as one whose phase of odd parity is over.
                while (!mbarrier_try_wait_cluster(shared + EMPTY_AT + 8 * ring.stage, ring.parity ^ 1)) {}
                mbarrier_arrive_expect(full, STAGE_BYTES);
#pragma unroll
                for (int i = 0; i < LEFT_PIECES; ++i)
                    fetch_piece<LEFT>(stage + i * PIECE_BYTES, p.left, left_plane, row0 + i * PIECE, depth0, full);
#pragma unroll
                for (int i = 0; i < RIGHT_PIECES / CLUSTER; ++i) {
                    const int piece = int(rank) * (RIGHT_PIECES / CLUSTER) + i;
                    share_piece<RIGHT>(stage + (LEFT_PIECES + piece) * PIECE_BYTES, p.right, right_plane, col0 + piece * PIECE, depth0, full);
                }
                ring.advance();
            }
        }
    }
}

/// The multiplying warpgroups: the products of a tile row of a square, then the epilogue of each of its tiles, for all squares.
template <class T, Major LEFT, Major RIGHT, class Epilogue>
__device__ __forceinline__ void consume(const Gemm& p, const Epilogue& epilogue, uint32_t shared, int group) {
    const int lane = threadIdx.x % 32;
    const int stages = (p.depth + STAGE_DEPTH - 1) / STAGE_DEPTH * int(p.segments);
    float* data = reinterpret_cast<float*>(shared_memory + TILE_AT);
    Ring ring, used;
    // Gives the stage that was multiplied longest ago back to both blocks' copying threads, which both fill it.
    auto release = [&] {
        if (lane < CLUSTER) mbarrier_arrive_cluster(map_shared(shared + EMPTY_AT + 8 * used.stage, lane));
        used.advance();
    };
    for (Squares squares; squares.next(p);) {
        float sums[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
        for (int done = 0; done < stages; ++done) {
            while (!mbarrier_try_wait(shared + FULL_AT + 8 * ring.stage, ring.parity)) {}
            const uint32_t stage = shared + ring.stage * STAGE_BYTES;
            const uint64_t left = descriptor<LEFT>(stage + group * PIECE_BYTES);
            const uint64_t right = descriptor<RIGHT>(stage + LEFT_PIECES * PIECE_BYTES);
#pragma unroll
            for (int i = 0; i < 128; ++i) pin(sums[i]);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < STAGE_DEPTH / 16; ++step)
                wgmma_m64n256k16<LEFT == Major::Across, RIGHT == Major::Across>(
                    sums, left + step * DEPTH_STEP<LEFT>, right + step * DEPTH_STEP<RIGHT>, T());
            wgmma_commit();
            // All but this stage's products are done.
            wgmma_wait<1>();
            if (done > 0) release();
            ring.advance();
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 128; ++i) pin(sums[i]);
        if (stages > 0) release();

        const int row_index = squares.row_index, row0 = row_index * TILE;
        // One epilogue for both halves, so the accumulators move; they are registers.
#pragma unroll 1
        for (int half = 0; half < SQUARE; ++half) {
            const int col_index = squares.col_index + half, col0 = col_index * TILE;
            const bool on_diagonal = row_index == col_index;
            const bool wanted = p.region == FULL || (p.region == DIAGONAL ? on_diagonal : row_index <= col_index);
            if (wanted && row0 < p.rows && col0 < p.cols) {
                const bool cleared = p.region == ABOVE_DIAGONAL && on_diagonal;
                const int first_row = threadIdx.x / 32 * 16 + lane / 4, first_col = lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < 16; ++j)
#pragma unroll
                    for (int h = 0; h < 2; ++h)
                        *reinterpret_cast<float2*>(data + (first_row + h * 8) * TILE_STRIDE + first_col + j * 8) =
                            cleared ? make_float2(0.0f, 0.0f) : make_float2(sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
                const int index =
                    p.region == FULL ? row_index * ((p.cols + TILE - 1) / TILE) + col_index : col_index * (col_index + 1) / 2 + row_index;
                const Tile tile{data,      row0,      col0, min(TILE, p.rows - row0), min(TILE, p.cols - col0),
                                row_index, col_index, index};
                tile.sync();
                epilogue(tile);
                // The tile's memory is written again.
                tile.sync();
            }
#pragma unroll
            for (int i = 0; i < 64; ++i) sums[i] = sums[64 + i];
        }
    }
}

/// All tiles of this block.
template <class T, Major LEFT, Major RIGHT, class Epilogue>
__device__ __forceinline__ void gemm(const Gemm& p, const Epilogue& epilogue) {
    const uint32_t shared = shared_address(shared_memory), rank = cluster_rank();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int i = 0; i < STAGES; ++i) {
            mbarrier_init(shared + FULL_AT + 8 * i, 1);
            mbarrier_init(shared + EMPTY_AT + 8 * i, WARPS * CLUSTER);
        }
        fence_mbarrier_init();
    }
    // So that the compiler sees that it is the same in the whole warp.
    const int warp = __shfl_sync(FULL_WARP, int(threadIdx.x) / 32, 0);
    // The other block's copies and arrivals find barriers.
    cluster_arrive();
    cluster_wait();
    if (warp < WARPS) {
        registers_increase<232>();
        consume<T, LEFT, RIGHT>(p, epilogue, shared, warp / 4);
    } else {
        registers_decrease<40>();
        if (warp == WARPS && elect_lane()) produce<LEFT, RIGHT>(p, shared, rank);
    }
    // Nobody's shared memory goes away while the other block still arrives there.
    cluster_arrive();
    cluster_wait();
}

#define GEMM_GEOMETRY __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
