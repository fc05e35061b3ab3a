// The mainloop of compute capability 9.0: TMA, mbarriers and wgmma, warp-specialised and persistent.
//
// Trick: a thread of the third warpgroup keeps a ring of stages filled by bulk tensor copies; two warpgroups multiply with wgmma, straight
// from shared memory, and give a stage back when the products that read it are done. An operand's part of a stage is pieces of 64×64
// elements, each one copy with a swizzle of 128 bytes, whichever index is contiguous: the same tensor map and the same places serve
// both, only wgmma's descriptors differ. Ragged edges are zeros that the copies fill in.
// A cluster of two blocks computes a square of two tile rows, one block above the other: each copies half of the right operand to both,
// for without that the L2 could not feed the tensor cores. Symmetric products waste nothing but the lower tile of squares on the diagonal.
// Blocks are as many as multiprocessors and go from square to square, so that the ring is filled with the next one's operands while a tile
// is finished. The sums pass through shared memory of their own to the epilogues of tile.cuh.
//
// Squares are computed in one of two ways, as the host says (src/cuda/schedule.rs):
// - Together: squares of 256×256. A warpgroup has 64×256 of the block's two tiles, then both warpgroups finish one tile after the other.
//   32 bytes a clock and multiprocessor come from the L2 (48 without the cluster), but tensor cores wait for the epilogue. For long sums.
// - In turn ("pingpong"): squares of 256×128. A warpgroup has every other square, a tile of its own each time, and its epilogue runs while
//   the other one multiplies. 48 bytes a clock. For short sums, where the epilogue takes about as long as the products, and for few
//   squares, which fill the multiprocessors better where they are half as large.
//
// Roles: warps 0 to 7 multiply and run the epilogue (232 registers), a lane of warp 8 copies (40 registers), the rest is idle.
// Barriers of stage s: full[s], 1 arrival (of this block's copying thread) and the stage's bytes; empty[s], an arrival of each warp of
// both blocks that reads it. Turns of each warpgroup, to multiply and to use the tile: 1 arrival, of the other. Named barrier of each
// group that finishes tiles: around and within an epilogue. A cluster barrier before the first copy and before the end.
//
// Geometry: 384 threads, 128×256 or 128×128 of C a block at a time, depth 64 a stage; 3 stages of 48 KiB or 4 of 32 KiB, a tile (68 KiB).
// Not yet run on hardware.
//
// Rejected: stages under the tile, for then no copy runs ahead under an epilogue; two tiles in shared memory, which leave room for two
// stages only; boxes of 128 or 256 lines where the depth is contiguous, which save copies but need maps and places of their own for
// each case; clusters only where there are many squares: the idle half of a cluster costs nothing where multiprocessors are idle; a
// release of the whole cluster when a stage is given back, a fence of all memory at each stage that orders nothing but reads which have
// been waited for.
#pragma once
#include "tile.cuh"

constexpr int CLUSTER = 2, STAGE_DEPTH = 64, WARPS = 8, THREADS = 32 * WARPS, BLOCK_THREADS = THREADS + 128;
/// A piece of an operand: 64×64 elements, lines of 128 bytes.
constexpr int PIECE = 64;
constexpr uint32_t PIECE_BYTES = PIECE * PIECE * 2;
constexpr int LEFT_PIECES = TILE / PIECE;
/// Shared memory: stages, tile, mbarriers.
constexpr uint32_t STAGES_BYTES = 144 * 1024, TILE_AT = STAGES_BYTES, BARRIERS_AT = TILE_AT + TILE_BYTES;
static_assert(BARRIERS_AT + 12 * 8 <= 227 * 1024);

/// left [rows, depth] · right [depth, cols].
struct Gemm {
    /// Operands as [plane, line, contiguous index], in boxes of a piece.
    TensorMap left, right;
    int32_t rows, cols, depth;
    /// Pairs of planes; four bits each of the two words below say which.
    uint32_t segments;
    uint32_t left_planes, right_planes;
    /// Which tiles there are.
    uint32_t region;
    uint32_t padding;
    /// Squares that hold them, and whether warpgroups compute them in turn.
    int32_t squares;
    uint32_t in_turn;
};

/// A square of COLUMNS columns: 256 by both warpgroups together, 128 by one of them.
template <int COLUMNS>
struct Square {
    static constexpr bool IN_TURN = COLUMNS == TILE;
    static constexpr int RIGHT_PIECES = COLUMNS / PIECE, TILES = COLUMNS / TILE;
    static constexpr uint32_t STAGE_BYTES = (LEFT_PIECES + RIGHT_PIECES) * PIECE_BYTES, STAGES = STAGES_BYTES / STAGE_BYTES;
    /// Warps that read a stage.
    static constexpr int READERS = IN_TURN ? WARPS / 2 : WARPS;
};

/// Addresses of mbarriers.
struct Barriers {
    uint32_t first;
    __device__ __forceinline__ uint32_t full(uint32_t stage) const { return first + 8 * stage; }
    __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return first + 32 + 8 * stage; }
    /// Of a warpgroup, to multiply and to use the tile.
    __device__ __forceinline__ uint32_t multiply_turn(int group) const { return first + 64 + 8 * group; }
    __device__ __forceinline__ uint32_t tile_turn(int group) const { return first + 80 + 8 * group; }
};

/// A place in the ring of stages: how often it went round is even or odd.
template <uint32_t STAGES>
struct Ring {
    uint32_t stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    __device__ __forceinline__ void skip(uint32_t count) {
        stage += count;
        parity ^= stage / STAGES & 1;
        stage %= STAGES;
    }
};

/// Every `stride`-th square of this block's cluster, and this block's tile row and first tile column of it.
template <int COLUMNS>
struct Squares {
    int square, stride;
    int row_index, col_index;
    __device__ __forceinline__ Squares(int first, int stride)
        : square(int(blockIdx.x) / CLUSTER + first * clusters()), stride(stride * clusters()) {}
    __device__ __forceinline__ static int clusters() { return int(gridDim.x) / CLUSTER; }
    __device__ __forceinline__ bool next(const Gemm& p) {
        if (square >= p.squares) return false;
        const int rows = (p.rows + CLUSTER * TILE - 1) / (CLUSTER * TILE), cols = (p.cols + COLUMNS - 1) / COLUMNS;
        if (COLUMNS == TILE && p.region == DIAGONAL) {
            row_index = square / 2, col_index = square;
        } else if (COLUMNS == TILE && p.region != FULL) {
            // Columns i and i + 1 both have 1 + i / 2 squares.
            int pair;
            place(p.region, rows, rows, square / 2, row_index, pair);
            const int height = pair + 1, within = square - pair * height;
            row_index = within < height ? within : within - height;
            col_index = 2 * pair + (within < height ? 0 : 1);
        } else {
            place(p.region, rows, cols, square, row_index, col_index);
            col_index *= COLUMNS / TILE;
        }
        row_index = row_index * CLUSTER + int(blockIdx.x) % CLUSTER;
        square += stride;
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

/// The copying thread: fills stages with the operands of all this cluster's squares.
template <Major LEFT, Major RIGHT, int COLUMNS>
__device__ __forceinline__ void produce(const Gemm& p, uint32_t shared, const Barriers& barriers) {
    using S = Square<COLUMNS>;
    constexpr int OWN_PIECES = S::RIGHT_PIECES / CLUSTER;
    const int first_own = int(cluster_rank()) * OWN_PIECES;
    // Operands without elements have no map.
    if (p.depth > 0) prefetch_tensor_map(&p.left), prefetch_tensor_map(&p.right);
    Ring<S::STAGES> ring;
    for (Squares<COLUMNS> squares(0, 1); squares.next(p);) {
        const int row0 = squares.row_index * TILE, col0 = squares.col_index * TILE;
        for (uint32_t segment = 0; segment < p.segments; ++segment) {
            const int left_plane = p.left_planes >> 4 * segment & 15, right_plane = p.right_planes >> 4 * segment & 15;
            for (int depth0 = 0; depth0 < p.depth; depth0 += STAGE_DEPTH) {
                const uint32_t full = barriers.full(ring.stage), stage = shared + ring.stage * S::STAGE_BYTES;
                // A new barrier counts as one whose phase of odd parity is over.
                while (!mbarrier_try_wait_cluster(barriers.empty(ring.stage), ring.parity ^ 1)) {}
                mbarrier_arrive_expect(full, S::STAGE_BYTES);
#pragma unroll
                for (int i = 0; i < LEFT_PIECES; ++i)
                    fetch_piece<LEFT>(stage + i * PIECE_BYTES, p.left, left_plane, row0 + i * PIECE, depth0, full);
#pragma unroll
                for (int i = first_own; i < first_own + OWN_PIECES; ++i)
                    share_piece<RIGHT>(stage + (LEFT_PIECES + i) * PIECE_BYTES, p.right, right_plane, col0 + i * PIECE, depth0, full);
                ring.advance();
            }
        }
    }
}

/// Starts the products of a stage. `sums`: 128 columns each of 64 rows of this warpgroup's, or of rows 0 to 63 and 64 to 127.
template <class T, Major LEFT, Major RIGHT, int COLUMNS>
__device__ __forceinline__ void multiply(float (&sums)[128], uint32_t stage, int group) {
    constexpr int TRANSPOSE_LEFT = LEFT == Major::Across, TRANSPOSE_RIGHT = RIGHT == Major::Across;
    const uint64_t left = descriptor<LEFT>(stage + (COLUMNS == TILE ? 0 : group * PIECE_BYTES));
    const uint64_t right = descriptor<RIGHT>(stage + LEFT_PIECES * PIECE_BYTES);
#pragma unroll
    for (int step = 0; step < STAGE_DEPTH / 16; ++step) {
        const uint64_t a = left + step * DEPTH_STEP<LEFT>, b = right + step * DEPTH_STEP<RIGHT>;
        if (COLUMNS == TILE) {
            wgmma_m64n128k16<TRANSPOSE_LEFT, TRANSPOSE_RIGHT>(reinterpret_cast<float(&)[64]>(sums[0]), a, b, T());
            wgmma_m64n128k16<TRANSPOSE_LEFT, TRANSPOSE_RIGHT>(reinterpret_cast<float(&)[64]>(sums[64]), a + PIECE_BYTES / 16, b, T());
        } else {
            wgmma_m64n256k16<TRANSPOSE_LEFT, TRANSPOSE_RIGHT>(sums, a, b, T());
        }
    }
}

/// Writes 64×128 sums of a warpgroup to the tile, from `row` on.
__device__ __forceinline__ void write_sums(float* data, const float* sums, int row, bool cleared) {
    const int first_row = row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4, first_col = threadIdx.x % 4 * 2;
#pragma unroll
    for (int j = 0; j < 16; ++j)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            *reinterpret_cast<float2*>(data + (first_row + h * 8) * TILE_STRIDE + first_col + j * 8) =
                cleared ? make_float2(0.0f, 0.0f) : make_float2(sums[4 * j + 2 * h], sums[4 * j + 2 * h + 1]);
}

/// A multiplying warpgroup: the products of this block's part of a square and the epilogue of each of its tiles, for all squares or, in
/// turn, for every other one.
template <class T, Major LEFT, Major RIGHT, int COLUMNS, class Epilogue>
__device__ __forceinline__ void consume(
    const Gemm& p, const Epilogue& epilogue, uint32_t shared, const Barriers& barriers, int group
) {
    using S = Square<COLUMNS>;
    using Tile = TileOf<S::READERS>;
    const int lane = threadIdx.x % 32;
    const int stages = (p.depth + STAGE_DEPTH - 1) / STAGE_DEPTH * int(p.segments);
    float* data = reinterpret_cast<float*>(shared_memory + TILE_AT);
    Ring<S::STAGES> ring;
    // The second warpgroup's stages come after the first's. Its barriers too: the first need not wait for its first turn.
    uint32_t turn_parity = group ^ 1;
    if (S::IN_TURN && group == 1) ring.skip(stages);
    Ring<S::STAGES> used = ring;
    // Gives the stage that was multiplied longest ago back to both blocks' copying threads, which both fill it.
    auto release = [&] {
        if (lane < CLUSTER) mbarrier_arrive_cluster(map_shared(barriers.empty(used.stage), lane));
        used.advance();
    };
    for (Squares<COLUMNS> squares(S::IN_TURN ? group : 0, S::IN_TURN ? 2 : 1); squares.next(p);) {
        float sums[128];
#pragma unroll
        for (int i = 0; i < 128; ++i) sums[i] = 0.0f;
        // Tensor cores work for one warpgroup at a time, and what a stage's parity means is clear.
        if (S::IN_TURN) {
            while (!mbarrier_try_wait(barriers.multiply_turn(group), turn_parity)) {}
        }
        for (int done = 0; done < stages; ++done) {
            while (!mbarrier_try_wait(barriers.full(ring.stage), ring.parity)) {}
#pragma unroll
            for (int i = 0; i < 128; ++i) pin(sums[i]);
            wgmma_fence();
            multiply<T, LEFT, RIGHT, COLUMNS>(sums, shared + ring.stage * S::STAGE_BYTES, group);
            wgmma_commit();
            // All but this stage's products are done.
            wgmma_wait<1>();
            if (done > 0) release();
            ring.advance();
        }
        if (S::IN_TURN && Tile::thread() == 0) mbarrier_arrive(barriers.multiply_turn(group ^ 1));
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 128; ++i) pin(sums[i]);
        if (stages > 0) release();
        if (S::IN_TURN) {
            // The other warpgroup's stages.
            ring.skip(stages), used.skip(stages);
            while (!mbarrier_try_wait(barriers.tile_turn(group), turn_parity)) {}
        }

        const int row_index = squares.row_index, row0 = row_index * TILE;
        // One epilogue for both tiles, so the accumulators move; they are registers.
#pragma unroll 1
        for (int i = 0; i < S::TILES; ++i) {
            const int col_index = squares.col_index + i, col0 = col_index * TILE;
            const bool on_diagonal = row_index == col_index;
            const bool wanted = p.region == FULL || (p.region == DIAGONAL ? on_diagonal : row_index <= col_index);
            if (wanted && row0 < p.rows && col0 < p.cols) {
                const bool cleared = p.region == ABOVE_DIAGONAL && on_diagonal;
                write_sums(data, sums, S::IN_TURN ? 0 : group * PIECE, cleared);
                if (S::IN_TURN) write_sums(data, sums + 64, PIECE, cleared);
                const int index =
                    p.region == FULL ? row_index * ((p.cols + TILE - 1) / TILE) + col_index : col_index * (col_index + 1) / 2 + row_index;
                const Tile tile{data,      row0,      col0, min(TILE, p.rows - row0), min(TILE, p.cols - col0),
                                row_index, col_index, index};
                if (STORES_BY_COPIES<Epilogue>) fence_proxy_async();
                tile.sync();
                epilogue(tile);
                // The tile's memory is written again.
                tile.sync();
            }
            if (!S::IN_TURN) {
#pragma unroll
                for (int j = 0; j < 64; ++j) sums[j] = sums[64 + j];
            }
        }
        if (S::IN_TURN) {
            if (Tile::thread() == 0) mbarrier_arrive(barriers.tile_turn(group ^ 1));
            turn_parity ^= 1;
        }
    }
}

/// All tiles of this block.
template <class T, Major LEFT, Major RIGHT, int COLUMNS, class Epilogue>
__device__ __forceinline__ void gemm_in_squares(const Gemm& p, const Epilogue& epilogue) {
    using S = Square<COLUMNS>;
    const uint32_t shared = shared_address(shared_memory);
    const Barriers barriers{shared + BARRIERS_AT};
    if (threadIdx.x == 0) {
#pragma unroll
        for (uint32_t i = 0; i < S::STAGES; ++i) {
            mbarrier_init(barriers.full(i), 1);
            mbarrier_init(barriers.empty(i), S::READERS * CLUSTER);
        }
        if (S::IN_TURN) {
#pragma unroll
            for (int group = 0; group < 2; ++group) {
                mbarrier_init(barriers.multiply_turn(group), 1);
                mbarrier_init(barriers.tile_turn(group), 1);
            }
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
        consume<T, LEFT, RIGHT, COLUMNS>(p, epilogue, shared, barriers, warp / 4);
    } else {
        registers_decrease<40>();
        if (warp == WARPS && elect_lane()) produce<LEFT, RIGHT, COLUMNS>(p, shared, barriers);
    }
    // Nobody's shared memory goes away while the other block still arrives there.
    cluster_arrive();
    cluster_wait();
}

template <class T, Major LEFT, Major RIGHT, class Epilogue>
__device__ __forceinline__ void gemm(const Gemm& p, const Epilogue& epilogue) {
    if (p.in_turn)
        gemm_in_squares<T, LEFT, RIGHT, TILE>(p, epilogue);
    else
        gemm_in_squares<T, LEFT, RIGHT, 2 * TILE>(p, epilogue);
}

#define GEMM_GEOMETRY __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(BLOCK_THREADS, 1)
