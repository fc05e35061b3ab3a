// The mainloop of compute capability 8.0, which runs everywhere.
//
// Trick: four stages of cp.async fill 128×32 tiles of both operands; XOR-swizzled 16-byte chunks keep ldmatrix free of bank conflicts;
// eight warps (2×4) compute 64×32 each with mma.m16n8k16. An operand with its depth contiguous is read by ldmatrix, one with the other
// index contiguous by ldmatrix.trans. Ragged edges are zeros that cp.async fills in; every row of an operand starts at a multiple of 16
// bytes, which the host sees to.
//
// Geometry: 256 threads, 128×128 of C a block, 68 KiB of shared memory, at most 128 registers. Not yet run on hardware.
#pragma once
#include "tile.cuh"

constexpr int TILE_DEPTH = 32, STAGES = 4, WARPS = 8, THREADS = 32 * WARPS;
constexpr uint32_t OPERAND_BYTES = TILE * TILE_DEPTH * 2, STAGE_BYTES = 2 * OPERAND_BYTES;
static_assert(TILE_BYTES >= int(STAGES * STAGE_BYTES));

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
    place(p.region, (p.rows + TILE - 1) / TILE, (p.cols + TILE - 1) / TILE, blockIdx.x, row_index, col_index);
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
    epilogue(TileOf<WARPS>{data, row0, col0, min(TILE, p.rows - row0), min(TILE, p.cols - col0), row_index, col_index,
                  int(blockIdx.x)});
}

#define GEMM_GEOMETRY __launch_bounds__(THREADS, 2)
