// One small kernel for each sm_90a instruction or form, and for each rule a planted fault.
#include "hopper.cuh"

#define K extern "C" __global__ void
#define MAP const __grid_constant__ CUtensorMap

namespace {
FN uint32_t barrier(int count) {  // one mbarrier, ready for the async proxy and the block
  __shared__ uint64_t bar;
  const uint32_t at = shared_address(&bar);
  if (threadIdx.x == 0) {
    mbarrier_init(at, count);
    mbarrier_init_fence();
  }
  __syncthreads();
  return at;
}
FN void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
}  // namespace

// ---------------------------------------------------------------- mbarriers
K states(int* p, int n) {  // each thread publishes, arrives, waits for its own state
  __shared__ int s[64];
  const uint32_t bar = barrier(64);
  for (int i = 0; i < 3; ++i) {
    s[threadIdx.x] = n + i;
    const uint64_t state = mbarrier_arrive_state(bar);
    while (!mbarrier_test_state(bar, state)) {}
    p[threadIdx.x] = s[threadIdx.x ^ 32];
    mbarrier_arrive(bar);
    while (!mbarrier_try_parity_for(bar, 1, 100)) {}
  }
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_invalidate(bar), mbarrier_init(bar, 1);
}
K counted(int* p, int n) {  // one thread arrives for all
  __shared__ int s[64];
  const uint32_t bar = barrier(64);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 64; ++i) s[i] = n;
    mbarrier_arrive_count(bar, 64);
  }
  mbarrier_wait(bar, 0);
  p[threadIdx.x] = s[threadIdx.x];
}
K too_many_arrivals(int* p, int n) {
  const uint32_t bar = barrier(2);
  if (threadIdx.x == 0) mbarrier_arrive_count(bar, 3 + n);
  p[threadIdx.x] = 0;
}
K initialised_twice(int* p, int n) {
  const uint32_t bar = barrier(2);
  if (threadIdx.x == 0) mbarrier_init(bar, 1 + n);
  p[threadIdx.x] = 0;
}
K never_initialised(int* p, int n) {
  __shared__ uint64_t bar[2];
  mbarrier_arrive(shared_address(bar + n));
  p[threadIdx.x] = 0;
}
K missing_arrivals(int* p, int n) {
  const uint32_t bar = barrier(64);
  if (threadIdx.x > 2 + n) mbarrier_arrive(bar);
  mbarrier_wait(bar, 0);
  p[threadIdx.x] = 0;
}
K relaxed_wait(int* p, int n) {  // the race of a store before and a load behind, without the wait
  __shared__ int s[64];
  const uint32_t bar = barrier(64);
  s[threadIdx.x] = n;
  mbarrier_arrive(bar);
  p[threadIdx.x] = s[threadIdx.x ^ 32];
}

// ---------------------------------------------------------------- bulk copies
K linear(const int* p, int* q, int bytes) {  // there and back
  __shared__ __align__(128) int s[256];
  const uint32_t bar = barrier(1);
  if (threadIdx.x == 0) {
    mbarrier_expect(bar, bytes);
    bulk_load(shared_address(s), p, bytes, bar);
    mbarrier_arrive(bar);
  }
  mbarrier_wait(bar, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) s[i] += 1;
  async_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(q, shared_address(s), bytes);
    bulk_commit();
    bulk_wait<0>();
    q[0] += 1;
  }
}
K boxes(MAP map, float* q, int x, int y, int z) {  // a box of 4 x 3 x 2 floats, with zeros outside
  __shared__ __align__(128) float s[24];
  const uint32_t bar = barrier(1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, sizeof s);
    tensor_load(shared_address(s), &map, x, y, z, bar);
  }
  mbarrier_wait(bar, 0);
  if (threadIdx.x < 24) q[threadIdx.x] = s[threadIdx.x];
}
K read_before_wait(const int* p, int* q, int n) {
  __shared__ __align__(128) int s[32];
  const uint32_t bar = barrier(1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, 128);
    bulk_load(shared_address(s), p, 128, bar);
  }
  q[threadIdx.x] = s[threadIdx.x];
  mbarrier_wait(bar, n);
}
K load_abandoned(const int* p, int* q, int n) {
  __shared__ __align__(128) int s[32];
  const uint32_t bar = barrier(1);
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, 128);
    bulk_load(shared_address(s), p, 128, bar);
  }
  q[threadIdx.x] = n;
}
K half_expected(const int* p, int* q, int n) {  // the second copy is not counted; what it overwrites was there before
  __shared__ __align__(128) int s[64];
  const uint32_t bar = barrier(1);
  s[threadIdx.x] = s[32 + threadIdx.x] = -1;
  async_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, 128 + n);
    bulk_load(shared_address(s), p, 128, bar);
    bulk_load(shared_address(s + 32), p + 32, 128, bar);
  }
  mbarrier_wait(bar, 0);
  q[threadIdx.x] = s[32 + threadIdx.x] + s[threadIdx.x];
}
K load_over_writes(const int* p, int* q, int n) {  // the generic proxy's writes, then a load over them
  __shared__ __align__(128) int s[32];
  const uint32_t bar = barrier(1);
  s[threadIdx.x] = n;
  if (n) async_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, 128);
    bulk_load(shared_address(s), p, 128, bar);
  }
  mbarrier_wait(bar, 0);
  q[threadIdx.x] = s[threadIdx.x];
}
K load_of_global_writes(int* p, int* q, int n) {  // global memory, too, has two proxies
  __shared__ __align__(128) int s[32];
  const uint32_t bar = barrier(1);
  p[threadIdx.x] = n;
  if (n) async_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, 128);
    bulk_load(shared_address(s), p, 128, bar);
  }
  mbarrier_wait(bar, 0);
  q[threadIdx.x] = s[threadIdx.x];
}
K overwritten_store(int* p, int* q, int n) {  // the staging tile is written again while the store reads it
  __shared__ __align__(128) int s[32];
  s[threadIdx.x] = n;
  async_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(q, shared_address(s), 128);
    bulk_commit();
    if (n) bulk_wait_read<0>();
  }
  __syncthreads();
  s[threadIdx.x] = 2 * n;
  if (threadIdx.x == 0) bulk_wait_read<0>();
}
K read_of_store(int* p, int* q, int n) {  // what was stored is read back: shared memory having been read is not enough
  __shared__ __align__(128) int s[32];
  s[threadIdx.x] = n;
  async_fence();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(q, shared_address(s), 128);
    bulk_commit();
    if (n) bulk_wait<0>();
    else bulk_wait_read<0>();
    p[0] = q[1];
  }
}
K spun_for(const int* p, int* q, int n) {  // one thread waits for a load; the others spin on what it writes then
  __shared__ __align__(128) int s[32];
  __shared__ volatile int ready;
  const uint32_t bar = barrier(1);
  if (threadIdx.x == 0) ready = n;
  __syncthreads();
  if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, 128);
    bulk_load(shared_address(s), p, 128, bar);
    mbarrier_wait(bar, 0);
    q[0] = s[5];
    ready = n + 1;
  } else if (threadIdx.x >= 32) {
    while (ready == n) {}
  }
}
K not_a_map(const int* p, int* q, MAP map) {
  __shared__ __align__(128) float s[24];
  const uint32_t bar = barrier(1);
  mbarrier_arrive_expect(bar, sizeof s);
  tensor_load(shared_address(s), &map, 0, 0, 0, bar);
  q[0] = p[0];
}

// ---------------------------------------------------------------- warpgroups
namespace {
// Two tiles of ones for wgmma, 64 x 64 each, written by the threads.
FN uint64_t tiles(bool fenced = true) {
  __shared__ __align__(1024) __nv_bfloat16 s[64 * 64];
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) s[i] = __float2bfloat16(1);
  if (fenced) async_fence_shared();
  __syncthreads();
  return uint64_t((shared_address(s) & 0x3FFFF) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
}  // namespace
K registers_of_a(float* q, int n) {  // n: 0 sound, 1 no second fence, 2 A overwritten on its way, 3 accumulator, 4 abandoned
  const uint64_t d = tiles();
  float sum[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) asm volatile("mov.b32 %0, 0x3F803F80;" : "=r"(a[i]));
  wgmma_fence();
  wgmma_bf16<1, 1, 0>(sum, a, d, false);
  wgmma_commit();
  if (n == 3) asm volatile("add.f32 %0, %0, %0;" : "+f"(sum[0]));
  if (n == 2) asm volatile("add.u32 %0, %0, 0;" : "+r"(a[0]));
  if (n == 4) return;
  wgmma_wait<0>();
  asm volatile("add.u32 %0, %0, 0;" : "+r"(a[0]));
  if (n != 1) wgmma_fence();
  wgmma_bf16<-1, 1, 0>(sum, a, d, true);
  wgmma_bf16<1, 1, 0>(sum, a, d, true);
  wgmma_commit();
  wgmma_wait<0>();
  q[threadIdx.x] = sum[0];
}
K late_writes(float* q, int n) {  // a register of A is written between the fence and its use
  const uint64_t d = tiles();
  float sum[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) asm volatile("mov.b32 %0, 0x3F803F80;" : "=r"(a[i]));
  if (n) {
    asm volatile("add.u32 %0, %0, 0;" : "+r"(a[0]));
    wgmma_fence();
  } else {
    wgmma_fence();
    asm volatile("add.u32 %0, %0, 0;" : "+r"(a[0]));
  }
  wgmma_bf16<1, 1, 0>(sum, a, d, false);
  wgmma_commit();
  wgmma_wait<0>();
  q[threadIdx.x] = sum[0];
}
K late_sums(float* q, int n) {  // n: 0 an accumulator is written between the fence and its use, 1 no second fence, 2 sound
  const uint64_t d = tiles();
  float sum[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0;
  wgmma_fence();
  if (n == 0) asm volatile("add.f32 %0, %0, %0;" : "+f"(sum[0]));
  wgmma_bf16<0, 0>(sum, d, d, true);
  wgmma_commit();
  wgmma_wait<0>();
  q[threadIdx.x] = sum[0];
  if (n != 1) wgmma_fence();
  wgmma_bf16<0, 0>(sum, d, d, true);
  wgmma_commit();
  wgmma_wait<0>();
  q[threadIdx.x] = sum[0];
}
K unfenced_tiles(float* q, int n) {
  const uint64_t d = tiles(n);
  float sum[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0;
  wgmma_fence();
  wgmma_bf16<0, 0>(sum, d, d, false);
  wgmma_commit();
  wgmma_wait<0>();
  q[threadIdx.x] = sum[0];
}
K descriptors_differ(float* q, int n) {
  const uint64_t d = tiles() + (threadIdx.x == 77 ? 2 - 2 * n : 0);
  float sum[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) sum[i] = 0;
  wgmma_fence();
  wgmma_bf16<0, 0>(sum, d, d, false);
  wgmma_commit();
  wgmma_wait<0>();
  q[threadIdx.x] = sum[0];
}
K __launch_bounds__(256) budget(float* q, int n) {  // 256 registers each; the first half gives what the second takes
  if (n == 0 && threadIdx.x < 128) registers_down<40>();
  if (n == 1) registers_up<248>();
  if (n == 2 && threadIdx.x < 64) registers_down<40>();
  q[threadIdx.x] = n;
}

// ---------------------------------------------------------------- clusters
K neighbours(int* p, int n) {  // each block reads what the next has written, and writes to the one behind it
  __shared__ int s[64];
  const uint32_t rank = cluster_rank(), ranks = cluster_ranks(), at = shared_address(s);
  if (threadIdx.x < 32) s[threadIdx.x] = 100 * rank + threadIdx.x + n;
  if (n != 1) cluster_sync();
  const int seen = load_in_cluster(in_block(at + 4 * threadIdx.x, (rank + 1) % ranks));
  store_in_cluster(in_block(at + 4 * (32 + threadIdx.x), (rank + ranks - 1) % ranks), seen);
  if (n != 2) cluster_sync();
  p[blockIdx.x * 32 + threadIdx.x] = n == 2 ? seen : 1000 * (s[32 + threadIdx.x] + seen);
}
K geometry(int* p, int n) {
  const int block = blockIdx.x + gridDim.x * blockIdx.y;
  const int v[6] = {int(cluster_rank()), int(cluster_ranks()), int(cluster_id_x()), int(clusters_x()), int(cluster_place_y()), n};
  if (threadIdx.x < 6) p[6 * block + threadIdx.x] = v[threadIdx.x];
}
K __cluster_dims__(2, 1, 1) split(int* p, int n) {  // arrivals and waits apart; the second block leaves early
  __shared__ int s;
  const uint32_t rank = cluster_rank();
  if (threadIdx.x == 0 && rank == 0) s = 7 + n;
  cluster_arrive();
  cluster_wait();
  if (n == 2 && rank == 0) return;  // and its memory with it
  if (rank == 1) p[threadIdx.x] = load_in_cluster(in_block(shared_address(&s), 0));
  if (n == 1) cluster_arrive_relaxed();  // which orders nothing: the load may come later
  else cluster_arrive();
  if (rank == 0) cluster_wait();
}
K counted_by_all(int* p, int n) {  // generic addresses: every thread adds to the last block's number, and reads it
  __shared__ int s;
  int* at = in_block(&s, cluster_ranks() - 1);
  if (threadIdx.x == 0) s = 1;
  cluster_sync();
  atomicAdd(at, 1 + n);
  cluster_sync();
  p[blockIdx.x * 32 + threadIdx.x] = *at;
  cluster_sync();
  if (n && threadIdx.x == 3) *at = cluster_rank();  // without order
  cluster_sync();
}
K relaxed_start(int* p, int n) {  // a barrier that orders nothing is enough where a fence has shown the mbarriers
  __shared__ uint64_t bar;
  const uint32_t at = shared_address(&bar);
  if (threadIdx.x == 0) {
    mbarrier_init(at, 32);
    if (n == 0) mbarrier_init_fence();
  }
  __syncthreads();
  if (n == 2) cluster_arrive();
  else cluster_arrive_relaxed();
  cluster_wait();
  mbarrier_arrive_in_cluster(in_block(at, cluster_rank() ^ 1));
  mbarrier_wait(at, 0);
  p[blockIdx.x * 32 + threadIdx.x] = 1;
}
K handed_over(int* p, int n) {  // one block's tile goes to the other, which the mbarrier there counts
  __shared__ __align__(128) int s[32];
  const uint32_t bar = barrier(1), rank = cluster_rank();
  if (rank == 0) {
    s[threadIdx.x] = threadIdx.x + n;
    async_fence();
    __syncthreads();
  } else if (threadIdx.x == 0) {
    mbarrier_arrive_expect(bar, 128);
  }
  cluster_sync();
  if (rank == 0 && threadIdx.x == 0) bulk_to_peer(in_block(shared_address(s), 1), shared_address(s), 128, in_block(bar, 1));
  if (rank == 1) {
    mbarrier_wait(bar, 0);
    p[threadIdx.x] = s[threadIdx.x];
  }
  if (n != 1) cluster_sync();
}
K leader(int* p, int n) {
  p[threadIdx.x] = elect();
}
