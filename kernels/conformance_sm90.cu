// As conformance.cu, for what only compute capability 9.0 has: the wrappers of ptx.cuh for clusters, mbarriers, bulk copies and wgmma, and
// each field of wgmma's descriptors by itself.
//
// Every kernel is one cluster of two blocks of 384 threads with the same arguments: a tensor map, 6400 input words and 4096 output words,
// all ones before. The map is of the input: two planes of 80 lines of 72 bf16, lines 80 elements apart, in boxes of 64×64 with a swizzle of
// 128 bytes. Plane 0 holds whole numbers from −8 to 8; plane 1 in each element its place, FIRST_PLACE + 80·line + column. A wait that takes
// too long leaves GAVE_UP: one wrong instruction must not hang the others.
//
// c_left_… and c_right_… show from where wgmma takes an operand. It lies in shared memory in which each element holds its place,
// FIRST_PLACE + offset / 2, and is multiplied by a unit matrix, so that the sums are places. Two neighbours share an output word:
// [step][row][depth] of the left operand, [step][depth][column] of the right one.
//
// What they must be: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" (major-ness, strides, matrix descriptor). In the
// terms of CUTLASS's canonical layouts, with SW = Swizzle<3,4,3> and T = 8 elements of 16 bits: contiguous depth is
// SW o ((8,m),(T,2k)) : ((8T,SBO),(1,T)), other index contiguous is SW o ((T,8,m),(8,k)) : ((1,T,LBO),(8T,SBO)).
#include "gemm_sm90.cuh"

#define CHECK extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
#define CHECK_ARGUMENTS const __grid_constant__ TensorMap map, const uint32_t *in, uint32_t *out

constexpr uint32_t GAVE_UP = 0xDEADDEADu;
constexpr int PLACES = 32 * 1024 / 2;

static __device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}
/// Whether the phase of this parity ended before long.
static __device__ __forceinline__ bool wait(uint32_t barrier, uint32_t parity) {
    for (int i = 0; i < 4096; ++i)
        if (mbarrier_try_wait(barrier, parity)) return true;
    return false;
}
/// A barrier that all of the cluster and bulk copies may use.
static __device__ __forceinline__ uint32_t new_barrier(uint32_t count) {
    __shared__ uint64_t barrier;
    const uint32_t at = shared_address(&barrier);
    if (threadIdx.x == 0) {
        mbarrier_init(at, count);
        fence_mbarrier_init();
    }
    cluster_sync();
    return at;
}
static __device__ __forceinline__ uint32_t load_shared_cluster(uint32_t address) {
    uint32_t v;
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}

// Clusters and mbarriers.

// Each block reads what the other wrote.
CHECK c_cluster(CHECK_ARGUMENTS) {
    __shared__ uint32_t words[384];
    const uint32_t rank = cluster_rank();
    words[threadIdx.x] = in[rank * 384 + threadIdx.x];
    cluster_sync();
    out[rank * 384 + threadIdx.x] = load_shared_cluster(map_shared(shared_address(words + threadIdx.x), rank ^ 1));
    // Nobody's memory goes away before.
    cluster_sync();
}

// Four phases of three arrivals, before which words are written and after which they are read; a new barrier's odd phase is over.
CHECK c_mbarrier(CHECK_ARGUMENTS) {
    __shared__ uint32_t words[3];
    const uint32_t at = new_barrier(3), group = threadIdx.x / 128;
    const bool over = mbarrier_try_wait(at, 1);
    // Before any arrives: afterwards the odd phase is the next one.
    __syncthreads();
    for (uint32_t phase = 0; phase < 4; ++phase) {
        if (threadIdx.x % 128 == 0) {
            words[group] = in[phase * 3 + group];
            mbarrier_arrive(at);
        }
        const bool arrived = wait(at, phase % 2);
        const uint32_t sum = words[0] + 3 * words[1] + 5 * words[2];
        if (cluster_rank() == 0) out[phase * 384 + threadIdx.x] = arrived ? sum : GAVE_UP;
        __syncthreads();
    }
    if (cluster_rank() == 0) out[4 * 384 + threadIdx.x] = over;
}

// Both blocks arrive at both blocks' barriers.
CHECK c_mbarrier_cluster(CHECK_ARGUMENTS) {
    const uint32_t at = new_barrier(2);
    if (threadIdx.x < 2) mbarrier_arrive_cluster(map_shared(at, threadIdx.x));
    bool arrived = false;
    for (int i = 0; i < 4096 && !arrived; ++i) arrived = mbarrier_try_wait_cluster(at, 0);
    out[cluster_rank() * 384 + threadIdx.x] = arrived ? 1 : GAVE_UP;
    cluster_sync();
}

// How many lanes of each warp are elected: any one.
CHECK c_elect(CHECK_ARGUMENTS) {
    const uint32_t elected = __ballot_sync(FULL_WARP, elect_lane());
    if (threadIdx.x % 32 == 0) out[cluster_rank() * 12 + threadIdx.x / 32] = __popc(elected);
}

// Two warpgroups get the registers that the third gives, and have a hundred values in them.
CHECK c_registers(CHECK_ARGUMENTS) {
    uint32_t sum = 0;
    if (threadIdx.x < 256) {
        registers_increase<232>();
        uint32_t v[100];
#pragma unroll
        for (int i = 0; i < 100; ++i) asm volatile("ld.global.u32 %0, [%1];" : "=r"(v[i]) : "l"(in + threadIdx.x + i) : "memory");
#pragma unroll
        for (int i = 99; i >= 0; --i) sum = sum * 3 + v[i];
    } else {
        registers_decrease<40>();
        sum = in[threadIdx.x];
    }
    out[cluster_rank() * 384 + threadIdx.x] = sum;
}

// Bulk copies: shared memory as it is after one, word by word.

static __device__ __forceinline__ void show(uint32_t* out, const uint32_t* words, int count, bool arrived) {
    for (int i = threadIdx.x; i < count; i += 384) out[i] = arrived ? words[i] : GAVE_UP;
}
static __device__ __forceinline__ void box(const TensorMap& map, uint32_t* out, int x, int y) {
    __shared__ __align__(1024) uint32_t piece[PIECE_BYTES / 4];
    const uint32_t full = new_barrier(1);
    if (threadIdx.x == 0) {
        prefetch_tensor_map(&map);
        mbarrier_arrive_expect(full, PIECE_BYTES);
        bulk_load_3d(shared_address(piece), &map, x, y, 1, full);
    }
    const bool arrived = wait(full, 0);
    if (cluster_rank() == 0) show(out, piece, PIECE_BYTES / 4, arrived);
}
CHECK c_bulk_load(CHECK_ARGUMENTS) { box(map, out, 0, 0); }
// Beyond the lines' ends and the last line; those bytes count, too.
CHECK c_bulk_load_edge(CHECK_ARGUMENTS) { box(map, out, 48, 40); }

// Each block copies a box to both: 32 lines of both boxes in each block.
CHECK c_bulk_load_multicast(CHECK_ARGUMENTS) {
    __shared__ __align__(1024) uint32_t pieces[2][PIECE_BYTES / 4];
    const uint32_t full = new_barrier(1), rank = cluster_rank();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full, 2 * PIECE_BYTES);
        bulk_load_3d_multicast(shared_address(pieces[rank]), &map, 8 * rank, 4 * rank, 1, full, 3);
    }
    const bool arrived = wait(full, 0);
    for (int i = 0; i < 2; ++i) show(out + rank * 2048 + i * 1024, pieces[i], 1024, arrived);
    cluster_sync();
}

// Rows of 4 to 128 words, every 136 words of shared memory, to every 128 of global memory; each word is its place, and gone once it has been read.
CHECK c_bulk_store(CHECK_ARGUMENTS) {
    __shared__ __align__(16) uint32_t rows[8 * 136];
    uint32_t* to = out + cluster_rank() * 8 * 128;
    for (int i = threadIdx.x; i < 8 * 136; i += 384) rows[i] = i;
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x < 8) bulk_store(to + threadIdx.x * 128, shared_address(rows + threadIdx.x * 136), threadIdx.x < 7 ? 16 + threadIdx.x * 64 : 512);
    bulk_commit();
    bulk_wait_read<0>();
    __syncthreads();
    for (int i = threadIdx.x; i < 8 * 136; i += 384) rows[i] = GAVE_UP;
}

// wgmma: from where it takes an operand.

template <class T>
constexpr uint16_t FIRST_PLACE = 0x2000;
template <>
constexpr uint16_t FIRST_PLACE<__half> = 0x0400;
template <class T>
constexpr uint16_t ONE = 0x3F80;
template <>
constexpr uint16_t ONE<__half> = 0x3C00;

/// A place from a sum; 0xFFFF if it is no single element.
static __device__ __forceinline__ uint32_t place_of(float sum, __nv_bfloat16) {
    const uint32_t bits = __float_as_uint(sum);
    return bits & 0xFFFF ? 0xFFFF : bits >> 16;
}
static __device__ __forceinline__ uint32_t place_of(float sum, __half) {
    const __half h = __float2half_rn(sum);
    return __half2float(h) == sum ? __half_as_ushort(h) : 0xFFFF;
}

/// Shared memory with places, and the descriptor of a unit matrix of 16×16 with zeros around it.
template <class T>
static __device__ __forceinline__ uint32_t places(uint64_t& unit) {
    __shared__ __align__(1024) uint16_t elements[PLACES];
    __shared__ __align__(1024) uint16_t units[256 * 16];
    for (int i = threadIdx.x; i < PLACES; i += 384) elements[i] = FIRST_PLACE<T> + i;
    // Without a swizzle, in 8×8 matrices of 128 bytes. The first and the fourth are ones: that is the unit matrix whichever stride is
    // which and whichever index is contiguous, so that it is right before anything else is.
    for (int i = threadIdx.x; i < 256 * 16; i += 384) units[i] = (i / 64 == 0 || i / 64 == 3) && i % 64 % 9 == 0 ? ONE<T> : 0;
    fence_proxy_async();
    __syncthreads();
    unit = uint64_t(256 / 16) << 32 | uint64_t(128 / 16) << 16 | (shared_address(units) & 0x3FFFF) / 16;
    return shared_address(elements);
}

/// A descriptor with another distance in bytes in one of its fields.
constexpr int LEADING = 16, STRIDE = 32;
static __device__ __forceinline__ uint64_t with(uint64_t descriptor, int field, uint64_t bytes) {
    return (descriptor & ~(uint64_t(0x3FFF) << field)) | bytes / 16 << field;
}
template <int N>
static __device__ __forceinline__ void start_sums(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
        sums[i] = 0;
        pin(sums[i]);
    }
    wgmma_fence();
}
template <int N>
static __device__ __forceinline__ void finish_sums(float (&sums)[N]) {
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < N; ++i) pin(sums[i]);
}

template <class T, Major MAJOR>
static __device__ __forceinline__ void left_places(uint32_t* out, uint64_t stride) {
    uint64_t unit;
    const uint64_t left = with(descriptor<MAJOR>(places<T>(unit)), STRIDE, stride);
    if (threadIdx.x >= 128 || cluster_rank() != 0) return;
#pragma unroll 1
    for (int step = 0; step < 4; ++step) {
        float sums[64];
        start_sums(sums);
        wgmma_m64n128k16<MAJOR == Major::Across, 0>(sums, left + step * DEPTH_STEP<MAJOR>, unit, T());
        finish_sums(sums);
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h, pair = 4 * j + threadIdx.x % 4;
                const float* two = sums + 4 * j + 2 * h;
                out[(step * 64 + row) * 8 + pair] = place_of(two[0], T()) | place_of(two[1], T()) << 16;
            }
    }
}
CHECK c_left_depth(CHECK_ARGUMENTS) { left_places<__nv_bfloat16, Major::Depth>(out, 1024); }
CHECK c_left_depth_stride(CHECK_ARGUMENTS) { left_places<__nv_bfloat16, Major::Depth>(out, 3072); }
CHECK c_left_across(CHECK_ARGUMENTS) { left_places<__nv_bfloat16, Major::Across>(out, 1024); }
CHECK c_left_across_stride(CHECK_ARGUMENTS) { left_places<__nv_bfloat16, Major::Across>(out, 3072); }
CHECK c_left_across_f16(CHECK_ARGUMENTS) { left_places<__half, Major::Across>(out, 1024); }

/// Steps of 128 columns, or half as many of 256.
template <int COLUMNS, class T, Major MAJOR>
static __device__ __forceinline__ void right_places(uint32_t* out, uint64_t leading, uint64_t stride) {
    uint64_t unit;
    const uint64_t right = with(with(descriptor<MAJOR>(places<T>(unit)), LEADING, leading), STRIDE, stride);
    if (threadIdx.x >= 128 || cluster_rank() != 0) return;
#pragma unroll 1
    for (int step = 0; step < 512 / COLUMNS; ++step) {
        float sums[COLUMNS / 2];
        start_sums(sums);
        const uint64_t from = right + step * DEPTH_STEP<MAJOR>;
        if constexpr (COLUMNS == 128)
            wgmma_m64n128k16<0, MAJOR == Major::Across>(sums, unit, from, T());
        else
            wgmma_m64n256k16<0, MAJOR == Major::Across>(sums, unit, from, T());
        finish_sums(sums);
        if (threadIdx.x >= 32) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int depth = threadIdx.x / 4 + 8 * h, pair = 4 * j + threadIdx.x % 4;
                const float* two = sums + 4 * j + 2 * h;
                out[(step * 16 + depth) * (COLUMNS / 2) + pair] = place_of(two[0], T()) | place_of(two[1], T()) << 16;
            }
    }
}
CHECK c_right_depth_128(CHECK_ARGUMENTS) { right_places<128, __nv_bfloat16, Major::Depth>(out, 16, 1024); }
CHECK c_right_depth_256(CHECK_ARGUMENTS) { right_places<256, __nv_bfloat16, Major::Depth>(out, 16, 1024); }
CHECK c_right_depth_stride(CHECK_ARGUMENTS) { right_places<128, __nv_bfloat16, Major::Depth>(out, 16, 2048); }
CHECK c_right_across_128(CHECK_ARGUMENTS) { right_places<128, __nv_bfloat16, Major::Across>(out, 8192, 1024); }
CHECK c_right_across_256(CHECK_ARGUMENTS) { right_places<256, __nv_bfloat16, Major::Across>(out, 8192, 1024); }
CHECK c_right_across_leading(CHECK_ARGUMENTS) { right_places<128, __nv_bfloat16, Major::Across>(out, 24 * 1024, 1024); }
CHECK c_right_across_stride(CHECK_ARGUMENTS) { right_places<128, __nv_bfloat16, Major::Across>(out, 16 * 1024, 3072); }
CHECK c_right_across_f16(CHECK_ARGUMENTS) { right_places<128, __half, Major::Across>(out, 8192, 1024); }

// All of it together: a stage as the mainloop fills and multiplies it, 128×128×64 of plane 0 with ragged ends. Whole numbers, so sums are
// exact; two a word, of every other eight columns.
template <Major LEFT, Major RIGHT>
static __device__ __forceinline__ void stage_product(const TensorMap& map, uint32_t* out) {
    __shared__ __align__(1024) unsigned char stage[4 * PIECE_BYTES];
    const uint32_t full = new_barrier(1), at = shared_address(stage);
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(full, 4 * PIECE_BYTES);
        for (int i = 0; i < 2; ++i) {
            fetch_piece<LEFT>(at + i * PIECE_BYTES, map, 0, 7 + i * PIECE, 16, full);
            fetch_piece<RIGHT>(at + (2 + i) * PIECE_BYTES, map, 0, i * PIECE, 16, full);
        }
    }
    const bool arrived = wait(full, 0);
    if (threadIdx.x >= 128 || cluster_rank() != 0) return;
    float sums[128];
    start_sums(sums);
    multiply<__nv_bfloat16, LEFT, RIGHT, TILE>(sums, at, 0);
    finish_sums(sums);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int j = 0; j < 16; j += 2)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = half * 64 + threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h, pair = 2 * j + threadIdx.x % 4;
                const float* two = sums + half * 64 + 4 * j + 2 * h;
                out[row * 32 + pair] = arrived ? (int(two[0]) & 0xFFFF) | int(two[1]) << 16 : GAVE_UP;
            }
}
CHECK c_product_depth_depth(CHECK_ARGUMENTS) { stage_product<Major::Depth, Major::Depth>(map, out); }
CHECK c_product_depth_across(CHECK_ARGUMENTS) { stage_product<Major::Depth, Major::Across>(map, out); }
CHECK c_product_across_depth(CHECK_ARGUMENTS) { stage_product<Major::Across, Major::Depth>(map, out); }
CHECK c_product_across_across(CHECK_ARGUMENTS) { stage_product<Major::Across, Major::Across>(map, out); }
