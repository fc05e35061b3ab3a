// C[M, N] = A[M, K] B[N, K]^T, bf16 in, f32 out: cp.async in stages, ldmatrix from XOR-swizzled tiles, mma.sync.
// Every size may be ragged; rows of A and B are `lda` and `ldb` elements apart, multiples of 8.
#include "ptx.cuh"

namespace {
constexpr int BM = 64, BN = 64, BK = 32, STAGES = 3, THREADS = 128;

enum Fault {
  NONE,
  NO_BARRIER,      // nothing between a stage's arrival and its use by other warps
  LATE_WAIT,       // one group too many may still be on its way
  EARLY_REFILL,    // a stage is refilled while slower warps read it
  SKIPPED_BARRIER, // the last warp leaves out the barrier
  ROW_OVERRUN,     // the last row of a tile is written behind the tile
  EDGE,            // off by one at the bottom edge of C
  SWIZZLE,         // written with one swizzle, read with another
  SHORT_K,         // the ragged end of K is read in full chunks
};

// A row of a tile is four chunks of 16 bytes; pairs of rows rotate them so that ldmatrix meets no bank twice.
FN int chunk(int row, int c) { return (c ^ (row >> 1 & 3)) * 8; }

template <int F>
FN void load_tile(__nv_bfloat16* tile, const __nv_bfloat16* from, int ld, int row0, int rows, int k0, int depth) {
#pragma unroll
  for (int i = 0; i < BM * 4 / THREADS; ++i) {
    const int at = i * THREADS + threadIdx.x, r = at / 4, c = at % 4, row = row0 + r, k = k0 + c * 8;
    int live = row < rows ? max(0, min(8, depth - k)) : 0;
    if (F == SHORT_K && live > 0) live = 8;
    const __nv_bfloat16* source = live > 0 ? from + size_t(row) * ld + k : from;
    const int to = F == ROW_OVERRUN && r == BM - 1 ? BM * (2 * STAGES) : r;
    copy16(shared_address(tile + to * BK + chunk(r, c)), source, live * 2);
  }
}

template <int F>
FN void gemm(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N, int K, int lda, int ldb) {
  extern __shared__ __align__(128) __nv_bfloat16 tiles[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / 2 * 32, wn = warp % 2 * 32;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (K + BK - 1) / BK;
  auto a_tile = [&](int s) { return tiles + s % STAGES * (2 * BM * BK); };
  auto b_tile = [&](int s) { return tiles + s % STAGES * (2 * BM * BK) + BM * BK; };
  auto fetch = [&](int s) {
    if (s < steps) {
      load_tile<F>(a_tile(s), A, lda, m0, M, s * BK, K);
      load_tile<F>(b_tile(s), B, ldb, n0, N, s * BK, K);
    }
    copy_commit();
  };
  float sum[2][4][4] = {};
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) fetch(s);
  for (int s = 0; s < steps; ++s) {
    copy_wait<F == LATE_WAIT ? STAGES - 1 : STAGES - 2>();
    if (F == EARLY_REFILL) fetch(s + STAGES - 1);
    if (F != NO_BARRIER && (F != SKIPPED_BARRIER || warp != 3)) __syncthreads();
    if (F != EARLY_REFILL) fetch(s + STAGES - 1);
    const __nv_bfloat16 *as = a_tile(s), *bs = b_tile(s);
#pragma unroll
    for (int kk = 0; kk < BK / 16; ++kk) {
      uint32_t a[2][4], b[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = wm + i * 16 + lane % 16, c = kk * 2 + lane / 16;
        load_matrix(a[i], shared_address(as + r * BK + (F == SWIZZLE ? (c ^ (r & 3)) * 8 : chunk(r, c))));
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        uint32_t q[4];
        const int r = wn + j * 16 + lane % 8 + lane / 16 * 8;
        load_matrix(q, shared_address(bs + r * BK + chunk(r, kk * 2 + lane / 8 % 2)));
        b[2 * j][0] = q[0], b[2 * j][1] = q[1], b[2 * j + 1][0] = q[2], b[2 * j + 1][1] = q[3];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma_bf16(sum[i][j], a[i], b[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = m0 + wm + i * 16 + lane / 4 + e / 2 * 8, column = n0 + wn + j * 8 + lane % 4 * 2 + e % 2;
        if ((F == EDGE ? row <= M : row < M) && column < N) C[size_t(row) * N + column] = sum[i][j][e];
      }
}
}  // namespace

#define GEMM(name, fault)                                                                                             \
  extern "C" __global__ void __launch_bounds__(THREADS)                                                               \
      name(const __nv_bfloat16* A, const __nv_bfloat16* B, float* C, int M, int N, int K, int lda, int ldb) {         \
    gemm<fault>(A, B, C, M, N, K, lda, ldb);                                                                          \
  }
GEMM(gemm, NONE)
GEMM(gemm_no_barrier, NO_BARRIER)
GEMM(gemm_late_wait, LATE_WAIT)
GEMM(gemm_early_refill, EARLY_REFILL)
GEMM(gemm_skipped_barrier, SKIPPED_BARRIER)
GEMM(gemm_row_overrun, ROW_OVERRUN)
GEMM(gemm_edge, EDGE)
GEMM(gemm_swizzle, SWIZZLE)
GEMM(gemm_short_k, SHORT_K)
