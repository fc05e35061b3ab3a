// C[M, N] = A B, 16-bit in, f32 out, for sm_90a: TMA through a ring of mbarriers, one warpgroup that produces, two that
// multiply with wgmma, 128 x 64 x 64 at a time. Every size may be ragged.
#include "hopper.cuh"

namespace {
constexpr int BM = 128, BN = 64, BK = 64, THREADS = 384;

enum Fault {
  NONE,
  NO_EMPTY_WAIT,    // stages are refilled without asking
  WRONG_PARITY,     // the empty barriers are waited for one phase too early
  EARLY_RELEASE,    // a stage is given back while wgmma may still read it
  NO_FULL_WAIT,     // a stage is read without waiting for its copies
  FEW_BYTES,        // fewer bytes are expected than come
  MANY_BYTES,       // more
  NO_INIT_FENCE,    // nothing makes the mbarriers visible to the async proxy
  NO_INIT_BARRIER,  // and nothing to the other threads
  NO_WGMMA_FENCE,
  NO_WGMMA_WAIT,    // accumulators are read on their way
  NO_PROXY_FENCE,   // the tile of C is stored without one
  NO_STORE_WAIT,    // the block ends while its tile is read
  NO_LAST_BARRIER,  // the tile is stored before all have written it
  NO_LAST_CLUSTER,  // a block ends while the other may still arrive at its mbarriers
  NO_FIRST_CLUSTER, // a block uses the other's mbarriers without knowing them to be there
  LOCAL_RELEASE,    // a stage is given back to its own block only
  TOO_MANY_REGISTERS,
  WRONG_SWIZZLE,    // the descriptor says another
};

// How operand tiles lie in shared memory: panels whose rows are one swizzle span. Depth: rows are lines, panels follow the
// depth. Across: rows are depths, panels follow the lines.
template <int SPAN, bool ACROSS, int LINES>
struct Operand {
  static constexpr int W = SPAN / 2, PANELS = ACROSS ? LINES / W : BK / W, ROWS = ACROSS ? BK : LINES;
  static constexpr int PANEL_BYTES = ROWS * SPAN, BYTES = LINES * BK * 2;
  static constexpr uint64_t MODE = SPAN == 128 ? 1 : SPAN == 64 ? 2 : SPAN == 32 ? 3 : 0;
  static_assert(PANELS * PANEL_BYTES == BYTES);

  static FN uint64_t descriptor(uint32_t tile, int line, int depth, uint64_t mode = MODE) {
    const uint32_t start = ACROSS ? tile + line / W * PANEL_BYTES + depth * SPAN
                                  : tile + depth / W * PANEL_BYTES + line * SPAN + depth % W * 2;
    // Without swizzle, eight rows of 16 bytes are a core matrix: `leading` is the step along the depth, `stride` along lines.
    const uint64_t leading = SPAN == 16 ? (ACROSS ? 128 : PANEL_BYTES) : (ACROSS ? PANEL_BYTES : 16);
    const uint64_t stride = SPAN == 16 ? (ACROSS ? PANEL_BYTES : 128) : 8 * SPAN;
    return uint64_t((start & 0x3FFFF) >> 4) | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62;
  }
};

// Shared memory: `stages` of A and B, the tile of C in two panels of 32 columns for each half, the mbarriers.
template <int STAGES>
struct Layout {
  static constexpr int A = 0, B = A + STAGES * BM * BK * 2, C = B + STAGES * BN * BK * 2, FULL = C + BM * BN * 4;
  static constexpr int EMPTY = FULL + 8 * STAGES;
};

template <int SPAN, bool ACROSS_A, bool ACROSS_B, bool HALF, int STAGES, int CLUSTER, int F>
FN void gemm(const CUtensorMap* map_a, const CUtensorMap* map_b, const CUtensorMap* map_c, int K) {
  using OA = Operand<SPAN, ACROSS_A, BM>;
  using OB = Operand<SPAN, ACROSS_B, BN>;
  using L = Layout<STAGES>;
  extern __shared__ __align__(1024) unsigned char memory[];
  const uint32_t base = shared_address(memory);
  const int group = threadIdx.x / 128, tid = threadIdx.x % 128, steps = (K + BK - 1) / BK;
  const int m0 = blockIdx.x * BM, n0 = blockIdx.y * BN;
  const uint32_t rank = CLUSTER > 1 ? cluster_rank() : 0;
  auto full = [&](int s) { return base + L::FULL + 8 * (s % STAGES); };
  auto empty = [&](int s) { return base + L::EMPTY + 8 * (s % STAGES); };

  if (threadIdx.x == 0) {
    prefetch(map_a);
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full(s), 1);
      mbarrier_init(empty(s), 2 * CLUSTER);
    }
    if (F != NO_INIT_FENCE) mbarrier_init_fence();
  }
  if (F != NO_INIT_BARRIER) __syncthreads();
  if (CLUSTER > 1 && F != NO_FIRST_CLUSTER) {
    cluster_arrive();
    cluster_wait();
  }

  if (group == 0) {
    registers_down<40>();
    if (threadIdx.x < 32 && elect()) {
      for (int s = 0; s < steps; ++s) {
        if (F != NO_EMPTY_WAIT) mbarrier_wait(empty(s), (s / STAGES & 1) ^ (F == WRONG_PARITY && s >= STAGES ? 0 : 1));
        constexpr int BYTES = OA::BYTES + OB::BYTES + (F == FEW_BYTES ? -OB::BYTES : F == MANY_BYTES ? 16 : 0);
        mbarrier_arrive_expect(full(s), BYTES);
        const uint32_t a = base + L::A + s % STAGES * OA::BYTES, b = base + L::B + s % STAGES * OB::BYTES;
        for (int p = 0; p < OA::PANELS; ++p) {
          const int at = p * OA::W;
          tensor_load(a + p * OA::PANEL_BYTES, map_a, ACROSS_A ? m0 + at : s * BK + at, ACROSS_A ? s * BK : m0, full(s));
        }
        for (int p = 0; p < OB::PANELS; ++p) {
          const int at = p * OB::W;
          if (CLUSTER == 1) {
            tensor_load(b + p * OB::PANEL_BYTES, map_b, ACROSS_B ? n0 + at : s * BK + at, ACROSS_B ? s * BK : n0, full(s));
          } else {  // every block brings its share of the rows to all
            constexpr int SHARE = OB::ROWS / CLUSTER;
            const int first = rank * SHARE;
            tensor_load_all(b + p * OB::PANEL_BYTES + first * SPAN, map_b, ACROSS_B ? n0 + at : s * BK + at,
                            (ACROSS_B ? s * BK : n0) + first, full(s), (1 << CLUSTER) - 1);
          }
        }
      }
    }
  } else {
    registers_up<F == TOO_MANY_REGISTERS ? 240 : 232>();
    const int half = group - 1, lane = tid % 32, row0 = tid / 32 * 16 + lane / 4;
    float sum[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) sum[i] = 0;
    auto release = [&](int s) {
      if (CLUSTER == 1 || F == LOCAL_RELEASE) {
        if (tid == 0) F == LOCAL_RELEASE ? mbarrier_arrive_count(empty(s), CLUSTER) : mbarrier_arrive(empty(s));
      } else if (tid < CLUSTER) {
        mbarrier_arrive_in_cluster(in_block(empty(s), tid));
      }
    };
    for (int s = 0; s < steps; ++s) {
      if (F != NO_FULL_WAIT) mbarrier_wait(full(s), s / STAGES & 1);
      const uint32_t a = base + L::A + s % STAGES * OA::BYTES, b = base + L::B + s % STAGES * OB::BYTES;
      if (F != NO_WGMMA_FENCE) wgmma_fence();
#pragma unroll
      for (int k = 0; k < BK; k += 16) {
        const uint64_t da = OA::descriptor(a, half * 64, k, F == WRONG_SWIZZLE ? 2 : OA::MODE), db = OB::descriptor(b, 0, k);
        if (HALF) wgmma_f16<ACROSS_A, ACROSS_B>(sum, da, db, true);
        else wgmma_bf16<ACROSS_A, ACROSS_B>(sum, da, db, true);
      }
      wgmma_commit();
      if (F == EARLY_RELEASE) release(s);
      wgmma_wait<1>();
      if (F != EARLY_RELEASE && s > 0) release(s - 1);
    }
    if (F != NO_WGMMA_WAIT) wgmma_wait<0>();
    if (F != EARLY_RELEASE && steps > 0) release(steps - 1);

    float* tile = reinterpret_cast<float*>(memory + L::C) + half * 64 * BN;
#pragma unroll
    for (int i = 0; i < 32; ++i) {  // 128-byte swizzle: rows of 32 floats, chunks of four exchanged by the row
      const int row = row0 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2, c = column % 32;
      tile[column / 32 * (64 * 32) + row * 32 + ((c / 4 ^ row % 8) * 4 + c % 4)] = sum[i];
    }
    if (F != NO_PROXY_FENCE) async_fence_shared();
    if (F != NO_LAST_BARRIER) barrier_sync(1 + half, 128);
    if (tid == 0) {
      for (int p = 0; p < 2; ++p) tensor_store(map_c, n0 + p * 32, m0 + half * 64, shared_address(tile + p * 64 * 32));
      bulk_commit();
      if (F != NO_STORE_WAIT) bulk_wait_read<0>();
    }
  }
  if (CLUSTER > 1 && F != NO_LAST_CLUSTER) {
    cluster_arrive();
    cluster_wait();
  }
}
}  // namespace

#define GEMM(name, span, across_a, across_b, half, stages, cluster, fault)                                        \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                              \
      name(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,                                \
           const __grid_constant__ CUtensorMap c, int K) {                                      \
    gemm<span, across_a, across_b, half, stages, cluster, fault>(&a, &b, &c, K);                         \
  }
// Depth or across for each operand, and every swizzle.
GEMM(dd16, 16, false, false, false, 2, 1, NONE)
GEMM(dd32, 32, false, false, false, 2, 1, NONE)
GEMM(dd64, 64, false, false, false, 2, 1, NONE)
GEMM(dd128, 128, false, false, false, 2, 1, NONE)
GEMM(da128, 128, false, true, false, 2, 1, NONE)
GEMM(ad128, 128, true, false, false, 2, 1, NONE)
GEMM(aa16, 16, true, true, false, 2, 1, NONE)
GEMM(aa32, 32, true, true, false, 2, 1, NONE)
GEMM(aa64, 64, true, true, false, 2, 1, NONE)
GEMM(aa128, 128, true, true, false, 2, 1, NONE)
GEMM(half128, 128, false, true, true, 3, 1, NONE)
// And B for two blocks at once.
GEMM(gemm, 128, false, false, false, 3, 1, NONE)
GEMM(gemm_cluster, 128, false, false, false, 3, 2, NONE)

#define FAULT(name, cluster, fault) GEMM(name, 128, false, false, false, 3, cluster, fault)
FAULT(no_empty_wait, 1, NO_EMPTY_WAIT)
FAULT(wrong_parity, 1, WRONG_PARITY)
FAULT(early_release, 1, EARLY_RELEASE)
FAULT(no_full_wait, 1, NO_FULL_WAIT)
FAULT(few_bytes, 1, FEW_BYTES)
FAULT(many_bytes, 1, MANY_BYTES)
FAULT(no_init_fence, 1, NO_INIT_FENCE)
FAULT(no_init_barrier, 1, NO_INIT_BARRIER)
FAULT(no_wgmma_fence, 1, NO_WGMMA_FENCE)
FAULT(no_wgmma_wait, 1, NO_WGMMA_WAIT)
FAULT(no_proxy_fence, 1, NO_PROXY_FENCE)
FAULT(no_store_wait, 1, NO_STORE_WAIT)
FAULT(no_last_barrier, 1, NO_LAST_BARRIER)
FAULT(no_last_cluster, 2, NO_LAST_CLUSTER)
FAULT(no_first_cluster, 2, NO_FIRST_CLUSTER)
FAULT(local_release, 2, LOCAL_RELEASE)
FAULT(too_many_registers, 1, TOO_MANY_REGISTERS)
FAULT(wrong_swizzle, 1, WRONG_SWIZZLE)
