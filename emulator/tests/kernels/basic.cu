// Small kernels of every kind: element by element, a reduction, a tiled transpose through cp.async.
#include "ptx.cuh"

extern "C" __global__ void vector_add(const float* a, const float* b, float* c, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

// One sum for each block: lanes by shuffles, warps through shared memory.
extern "C" __global__ void block_sum(const float* x, float* sums, int n) {
  __shared__ float partial[32];
  float v = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  if (threadIdx.x < 32) {
    v = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0;
    for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(~0u, v, d);
    if (threadIdx.x == 0) sums[blockIdx.x] = v;
  }
}

// out[c][r] = in[r][c], tiles of 32 x 32 in two buffers: one travels while the other is written out.
extern "C" __global__ void transpose(const float* in, float* out, int rows, int columns) {
  __shared__ float tile[2][32][33];
  const int x = threadIdx.x, tiles = (columns + 31) / 32, r0 = blockIdx.x * 32;
  auto fetch = [&](int t) {
    if (t < tiles)
      for (int y = threadIdx.y; y < 32; y += 8) {
        const bool inside = r0 + y < rows && t * 32 + x < columns;
        copy_small<4>(shared_address(&tile[t % 2][y][x]), inside ? in + size_t(r0 + y) * columns + t * 32 + x : in, inside ? 4 : 0);
      }
    copy_commit();
  };
  fetch(0);
  for (int t = 0; t < tiles; ++t) {
    fetch(t + 1);
    copy_wait<1>();
    __syncthreads();
    for (int y = threadIdx.y; y < 32; y += 8)
      if (t * 32 + y < columns && r0 + x < rows) out[size_t(t * 32 + y) * rows + r0 + x] = tile[t % 2][x][y];
    __syncthreads();
  }
}

// The last block to finish adds up what all have written: ordered by fences and an atomic.
extern "C" __global__ void last_block(const int* in, int* share, int* counter, int* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    share[blockIdx.x] = in[blockIdx.x] * 2;
    __threadfence();
    last = atomicAdd(counter, 1) == int(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    int sum = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) sum += share[i];
    *out = sum;
  }
}

// Warp 0 hands values to warp 1 through one box: barrier 1 says full, barrier 2 says empty.
extern "C" __global__ void hand_over(const int* in, int* out, int rounds) {
  __shared__ int box[32];
  const int lane = threadIdx.x % 32;
  for (int r = 0; r < rounds; ++r)
    if (threadIdx.x < 32) {
      if (r > 0) barrier_sync(2, 64);
      box[lane] = in[r * 32 + lane];
      barrier_arrive(1, 64);
    } else {
      barrier_sync(1, 64);
      out[r * 32 + lane] = box[lane ^ 1] + r;
      if (r + 1 < rounds) barrier_arrive(2, 64);
    }
}

// All blocks wait for each other, twice: a cooperative launch.
extern "C" __global__ void grid_barrier(int* data, unsigned* counter, int* out) {
  if (threadIdx.x == 0) {
    data[blockIdx.x] = blockIdx.x + 1;
    __threadfence();
    atomicAdd(counter, 1);
    while (*reinterpret_cast<volatile unsigned*>(counter) < gridDim.x) {}
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x < gridDim.x) out[blockIdx.x * gridDim.x + threadIdx.x] = data[threadIdx.x];
}

__device__ __noinline__ float twice_plus(float x, int n) { return 2 * x + n; }
__constant__ float table[4] = {1.5f, 2.5f, 3.5f, 4.5f};
__device__ int total;

// Calls, constant memory, a device variable, local arrays, a switch, 64-bit and byte accesses.
extern "C" __global__ void odds_and_ends(const unsigned char* bytes, long long* wide, float* out, int n) {
  const int i = threadIdx.x;
  float local[8];
  for (int k = 0; k < 8; ++k) local[k] = k * i;
  float v = twice_plus(table[i % 4], n) + local[bytes[i] % 8];
  switch (bytes[i] % 6) {
    case 0: v += 1; break;
    case 1: v *= 3; break;
    case 2: v = sqrtf(v); break;
    case 3: v = 1 / v; break;
    case 4: v = -v; break;
    default: v = fabsf(v - 100);
  }
  out[i] = v;
  wide[i] = (static_cast<long long>(i) << 33) / 3 - __popc(i) + (static_cast<signed char>(bytes[i]) >> 1);
  atomicAdd(&total, i);
  __syncthreads();
  if (i == 0) wide[blockDim.x] = atomicAdd(&total, 0);
}
