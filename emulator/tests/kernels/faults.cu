// One planted fault for each rule of the checker. `skip` is 0: the compiler does not know.
#include "ptx.cuh"

#define K extern "C" __global__ void
__device__ int sink;

K out_of_bounds(int* p, int n) { p[threadIdx.x + (threadIdx.x == 31 ? n : 0)] = 1; }
K out_of_bounds_shared(int* p, int n) { __shared__ int s[32]; s[threadIdx.x] = 0; __syncwarp(); p[threadIdx.x] = s[n]; }
K misaligned(int* p, int n) { *reinterpret_cast<int2*>(p + n) = make_int2(1, 2); }
K uninitialised_global(int* p, int n) { p[n] = p[n + 1]; }
K uninitialised_shared(int* p, int n) {
  __shared__ int s[64];
  s[threadIdx.x] = n;
  __syncwarp();
  p[threadIdx.x] = s[threadIdx.x + (threadIdx.x == 7 ? 32 : 0)];
}
K race_shared_write_write(int* p, int n) {
  __shared__ int s[64];
  s[threadIdx.x] = s[threadIdx.x ^ 32] = n;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x];
}
K race_shared_write_read(int* p, int n) {
  __shared__ int s[64];
  s[threadIdx.x] = 0;
  __syncthreads();
  s[threadIdx.x] = n;
  p[threadIdx.x] = s[threadIdx.x ^ 32];
}
K race_shared_read_write(int* p, int n) {
  __shared__ int s[64];
  s[threadIdx.x] = n;
  __syncthreads();
  p[threadIdx.x] = s[threadIdx.x ^ 32];
  s[threadIdx.x] = n + 1;
  __syncthreads();
  p[threadIdx.x] += s[threadIdx.x];
}
K race_bytes_are_told_apart(unsigned char* p, int n) {  // sound: neighbours, not the same bytes
  __shared__ unsigned char s[64];
  s[threadIdx.x] = static_cast<unsigned char>(n);
  __syncthreads();
  s[threadIdx.x] += 1;
  p[threadIdx.x] = s[threadIdx.x];
}
K race_global(int* p, int n) { p[threadIdx.x / 2] = n; }
K race_between_blocks(int* p, int n) { if (threadIdx.x == 0) p[0] = n; }
K race_missing_fence(int* p, int n) {
  if (threadIdx.x) return;
  p[1 + blockIdx.x] = n;
  if (atomicAdd(p, 1) == 1) { __threadfence(); p[4] = p[1] + p[2]; }
}
K copy_not_awaited(const int* p, int* q) {
  __shared__ __align__(16) int s[128];
  copy16(shared_address(s + 4 * threadIdx.x), p + 4 * threadIdx.x);
  copy_commit();
  q[threadIdx.x] = s[4 * threadIdx.x];
  copy_wait<0>();
}
K copy_abandoned(const int* p, int* q) {
  __shared__ __align__(16) int s[128];
  copy16(shared_address(s + 4 * threadIdx.x), p + 4 * threadIdx.x);
  copy_commit();
  q[0] = 1;
}
K copy_too_long(const int* p, int n) {
  __shared__ __align__(16) int s[128];
  copy16(shared_address(s), p, 17 + n);
  copy_wait_all();
}
K divergent_barrier(int* p, int n) {
  if (threadIdx.x % 2 == unsigned(n)) asm volatile("bar.sync 0; // even" ::: "memory");
  else asm volatile("bar.sync 0; // odd" ::: "memory");
}
K departed_barrier(int* p, int n) {
  if (threadIdx.x == unsigned(n)) return;
  __syncthreads();
  p[threadIdx.x] = 1;
}
K departed_shuffle(int* p, int n) {
  if (threadIdx.x % 32 == unsigned(n)) return;
  p[threadIdx.x] = __shfl_xor_sync(~0u, threadIdx.x, 1);
}
K mask_without_self(int* p, int n) {
  p[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFEu << n, threadIdx.x, 1);
}
K mask_differs(int* p, int n) {
  p[threadIdx.x] = __shfl_xor_sync(threadIdx.x < 8 ? 0x0000FFFFu : 0x00FFFFFFu, threadIdx.x, 1);
}
K source_outside_mask(int* p, int n) {
  if (threadIdx.x < 16) p[threadIdx.x] = __shfl_xor_sync(0xFFFFu, threadIdx.x, 16 + n);
}
K divergent_shuffle(int* p, int n) {
  int v;
  if (threadIdx.x < 16) asm volatile("shfl.sync.idx.b32 %0, %1, 0, 31, -1; // low" : "=r"(v) : "r"(n));
  else asm volatile("shfl.sync.idx.b32 %0, %1, 1, 31, -1; // high" : "=r"(v) : "r"(n));
  p[threadIdx.x] = v;
}
K deadlock(int* p, int n) {
  if (threadIdx.x < 32) barrier_sync(1, 64);
  else barrier_sync(2, 64);
  p[threadIdx.x] = n;
}
K barrier_counts_differ(int* p, int n) {
  if (threadIdx.x < 32) barrier_sync(1, 64);
  else barrier_sync(1, 32);
  p[threadIdx.x] = n;
}
K endless(int* p, int n) { while (*reinterpret_cast<volatile int*>(p) == n) {} }
K undefined_register(int* p, int n) {
  int v;
  asm volatile("{ .reg .pred q; .reg .s32 t; setp.eq.s32 q, %1, 1; @q mov.s32 t, 5; mov.s32 %0, t; }" : "=r"(v) : "r"(n));
  p[threadIdx.x] = v;
}
K trapped(int* p, int n) { if (n == 0) __trap(); p[0] = n; }
