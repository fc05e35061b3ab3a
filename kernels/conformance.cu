// One tiny kernel for each instruction that the emulator and the hardware must agree on. What has a wrapper in ptx.cuh is called through
// it, so that the wrapper itself is checked.
//
// Every kernel is one warp with the same arguments: 1024 input words, the same for all, and 1024 output words, all ones before, of which
// it writes what it needs. tests/cuda_hardware.rs compares what a chip and the emulator make of them, word by word. Approximate functions
// and the last bits of mma may differ; all else may not.
#include "ptx.cuh"

#define CHECK extern "C" __global__ void __launch_bounds__(32)
#define ARGUMENTS const uint32_t *in, uint32_t *out
#define LANE const int lane = threadIdx.x

static __device__ __forceinline__ uint32_t word(float x) { return __float_as_uint(x); }
// Random bits to numbers of moderate size and both signs: exponents −7 to 0.
static __device__ __forceinline__ uint32_t two_bf16(uint32_t w) { return (w & 0x83FF83FFu) | 0x3C003C00u; }
static __device__ __forceinline__ uint32_t two_f16(uint32_t w) { return (w & 0x9FFF9FFFu) | 0x20002000u; }
static __device__ __forceinline__ float one_f32(uint32_t w) { return __uint_as_float((w & 0x83FFFFFFu) | 0x3C000000u); }

#define MMA(NAME, OPERAND, ...)                                                                                          \
    CHECK NAME(ARGUMENTS) {                                                                                              \
        LANE;                                                                                                            \
        uint32_t a[4], b[2];                                                                                             \
        float d[4];                                                                                                      \
        for (int i = 0; i < 4; ++i) a[i] = OPERAND(in[lane * 4 + i]), d[i] = one_f32(in[256 + lane * 4 + i]);            \
        for (int i = 0; i < 2; ++i) b[i] = OPERAND(in[128 + lane * 2 + i]);                                              \
        __VA_ARGS__;                                                                                                     \
        for (int i = 0; i < 4; ++i) out[lane * 4 + i] = word(d[i]);                                                      \
    }
MMA(c_mma_bf16, two_bf16, mma_m16n8k16(d, a, b, __nv_bfloat16()))
MMA(c_mma_f16, two_f16, mma_m16n8k16(d, a, b, __half()))
// tf32 from plain words is full of extremes; that from one_tf32 is tame.
static __device__ __forceinline__ uint32_t one_tf32(uint32_t w) { return word(one_f32(w)); }
static __device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
MMA(c_mma_tf32, (uint32_t), mma_tf32(d, a, b))
MMA(c_mma_tf32_tame, one_tf32, mma_tf32(d, a, b))

#define LOAD_MATRIX(NAME, COUNT, ...)                                                                                    \
    CHECK NAME(ARGUMENTS) {                                                                                              \
        LANE;                                                                                                            \
        __shared__ __align__(16) uint32_t rows[128];                                                                     \
        for (int i = lane; i < 128; i += 32) rows[i] = in[i];                                                            \
        __syncwarp();                                                                                                    \
        uint32_t r[4] = {};                                                                                              \
        /* Rows in an order of their own. */                                                                             \
        const uint32_t at = shared_address(rows + (lane * 5 + 3) % 32 * 4);                                              \
        __VA_ARGS__;                                                                                                     \
        for (int i = 0; i < COUNT; ++i) out[lane * 4 + i] = r[i];                                                        \
    }
#define LDMATRIX(FORM, REGISTERS)                                                                                        \
    asm volatile("ldmatrix.sync.aligned.m8n8." FORM ".shared.b16 {" REGISTERS "}, [%4];"                                  \
                 : "+r"(r[0]), "+r"(r[1]), "+r"(r[2]), "+r"(r[3])                                                        \
                 : "r"(at)                                                                                               \
                 : "memory")
LOAD_MATRIX(c_ldmatrix_x1, 1, LDMATRIX("x1", "%0"))
LOAD_MATRIX(c_ldmatrix_x2, 2, LDMATRIX("x2", "%0,%1"))
LOAD_MATRIX(c_ldmatrix_x4, 4, ldmatrix_x4(r, at))
LOAD_MATRIX(c_ldmatrix_x1_trans, 1, LDMATRIX("x1.trans", "%0"))
LOAD_MATRIX(c_ldmatrix_x2_trans, 2, LDMATRIX("x2.trans", "%0,%1"))
LOAD_MATRIX(c_ldmatrix_x4_trans, 4, ldmatrix_x4_trans(r, at))

// Two groups of copies of 16 bytes, of which lane l fills l % 17; the second is waited for on its own.
CHECK c_cp_async_16(ARGUMENTS) {
    LANE;
    __shared__ __align__(16) uint32_t a[128], b[128];
    cp_async_16(shared_address(a + lane * 4), in + lane * 4, lane % 17);
    cp_async_commit();
    cp_async_16(shared_address(b + lane * 4), in + 128 + lane * 4, 16 - lane % 17);
    cp_async_commit();
    cp_async_wait<1>();
    for (int i = 0; i < 4; ++i) out[lane * 4 + i] = a[lane * 4 + i];
    cp_async_wait<0>();
    for (int i = 0; i < 4; ++i) out[128 + lane * 4 + i] = b[lane * 4 + i];
}

// Copies of 8 and 4 bytes, of which lane l fills l % (n + 1).
CHECK c_cp_async_small(ARGUMENTS) {
    LANE;
    __shared__ __align__(16) uint32_t b[64], c[32];
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(b + lane * 2)), "l"(in + lane * 2), "r"(lane % 9) : "memory");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(c + lane)), "l"(in + lane), "r"(lane % 5) : "memory");
    cp_async_commit();
    cp_async_wait<0>();
    for (int i = 0; i < 2; ++i) out[lane * 2 + i] = b[lane * 2 + i];
    out[64 + lane] = c[lane];
}

CHECK c_store(ARGUMENTS) {
    LANE;
    const uint32_t *at = in + lane * 6, four[4] = {at[0], at[1], at[2], at[3]}, two[2] = {at[4], at[5]};
    store_16(out + lane * 4, four);
    store_8(out + 128 + lane * 2, two);
}

CHECK c_max_nan(ARGUMENTS) {
    LANE;
    out[lane] = word(max_nan(one_f32(in[lane]), one_f32(in[32 + lane])));
    // Any words: infinities and NaN among them.
    out[32 + lane] = word(max_nan(__uint_as_float(in[lane] | 0x7F000000u), one_f32(in[32 + lane])));
    out[64 + lane] = word(max_nan(one_f32(in[lane]), __uint_as_float(in[32 + lane] | 0x7F000000u)));
}

CHECK c_approximate(ARGUMENTS) {
    LANE;
    const float x = one_f32(in[lane]) * 40;
    float y[6];
    asm("ex2.approx.f32 %0, %1;" : "=f"(y[0]) : "f"(x));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[1]) : "f"(x));
    asm("lg2.approx.f32 %0, %1;" : "=f"(y[2]) : "f"(fabsf(x)));
    asm("rcp.approx.f32 %0, %1;" : "=f"(y[3]) : "f"(x));
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y[4]) : "f"(fabsf(x)));
    asm("tanh.approx.f32 %0, %1;" : "=f"(y[5]) : "f"(x));
    for (int i = 0; i < 6; ++i) out[lane * 6 + i] = word(y[i]);
}

CHECK c_exact_math(ARGUMENTS) {
    LANE;
    const float x = one_f32(in[lane]), y = one_f32(in[32 + lane]), z = one_f32(in[64 + lane]);
    uint32_t* o = out + lane * 16;
    o[0] = word(x / y), o[1] = word(sqrtf(fabsf(x))), o[2] = word(__frcp_rn(x)), o[3] = word(fmaf(x, y, z));
    o[4] = word(__fadd_rd(x, y)), o[5] = word(__fadd_ru(x, y)), o[6] = word(__fmul_rz(x, y)), o[7] = word(__fmaf_rd(x, y, z));
    const double d = double(x) * y / z;
    o[8] = uint32_t(__double_as_longlong(d)), o[9] = uint32_t(__double_as_longlong(d) >> 32);
    o[10] = word(float(d)), o[11] = word(expf(x)), o[12] = word(logf(fabsf(x))), o[13] = word(log1pf(fabsf(x)));
    o[14] = word(expm1f(x)), o[15] = word(tanhf(x));
}

// Every pair of 0, −0, 1, −1, ∞, −∞, NaN and a subnormal, which repeat.
CHECK c_extremes(ARGUMENTS) {
    LANE;
    const uint32_t special[8] = {0, 0x80000000u, 0x3F800000u, 0xBF800000u, 0x7F800000u, 0xFF800000u, 0x7FC00000u, 1};
    for (int j = 0; j < 8; ++j) {
        const float x = __uint_as_float(special[lane % 8]), y = __uint_as_float(special[j]);
        const float a = max_nan(x, y);
        float b;
        asm("min.NaN.f32 %0, %1, %2;" : "=f"(b) : "f"(x), "f"(y));
        uint32_t* o = out + lane % 8 * 64 + j * 8;
        if (lane >= 8) continue;
        o[0] = word(a), o[1] = word(b), o[2] = word(fmaxf(x, y)), o[3] = word(fminf(x, y)), o[4] = word(x + y);
        o[5] = word(x * y), o[6] = x < y, o[7] = !(x <= y);
    }
}

CHECK c_shuffles(ARGUMENTS) {
    LANE;
    const uint32_t v = in[lane], full = 0xFFFFFFFFu;
    uint32_t* o = out + lane * 9;
    o[0] = __shfl_sync(full, v, lane * 7 % 32), o[1] = __shfl_up_sync(full, v, 3), o[2] = __shfl_down_sync(full, v, 7);
    o[3] = __shfl_xor_sync(full, v, 21), o[4] = __shfl_down_sync(full, v, 3, 8), o[5] = __shfl_up_sync(full, v, 2, 4);
    o[6] = __shfl_xor_sync(full, v, 9, 8), o[7] = __shfl_sync(full, v, lane + 5, 16);
    int inside;
    asm volatile("{ .reg .pred p; shfl.sync.down.b32 %0|p, %1, 5, 0x1f, -1; selp.s32 %0, 1, 0, p; }" : "=r"(inside) : "r"(v));
    o[8] = inside;
}

CHECK c_votes(ARGUMENTS) {
    LANE;
    const uint32_t v = in[lane], full = 0xFFFFFFFFu;
    uint32_t* o = out + lane * 10;
    o[0] = __ballot_sync(full, v & 1), o[1] = __all_sync(full, v != 0), o[2] = __any_sync(full, v == 0);
    o[3] = __reduce_add_sync(full, v), o[4] = __reduce_min_sync(full, int(v)), o[5] = __reduce_max_sync(full, v);
    o[6] = __reduce_xor_sync(full, v), o[7] = __match_any_sync(full, v % 3);
    int all;
    o[8] = __match_all_sync(full, v & 0, &all), o[9] = all;
}

CHECK c_conversions(ARGUMENTS) {
    LANE;
    const float x = one_f32(in[lane]) * 300;
    uint32_t* o = out + lane * 14;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(o[0]) : "f"(x));
    o[1] = __bfloat16_as_ushort(__float2bfloat16_rn(x)), o[2] = __half_as_ushort(__float2half_rn(x));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(o[3]) : "f"(x), "f"(-x / 3));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(o[4]) : "f"(x), "f"(-x / 3));
    o[5] = int(x), o[6] = __float2int_rn(x), o[7] = __float2int_rd(x), o[8] = __float2uint_rz(x);
    o[9] = word(float(int(in[lane]))), o[10] = word(float(in[lane])), o[11] = word(rintf(x));
    o[12] = word(__half2float(__ushort_as_half(static_cast<unsigned short>(in[lane])))), o[13] = word(__ull2float_rn(in[lane] * 0x1234567ull));
}

CHECK c_bits(ARGUMENTS) {
    LANE;
    const uint32_t a = in[lane], b = in[32 + lane], c = in[64 + lane];
    uint32_t* o = out + lane * 16;
    o[0] = __byte_perm(a, b, c & 0xFFFF), o[1] = __funnelshift_l(a, b, c), o[2] = __funnelshift_rc(a, b, c % 40);
    asm("bfe.u32 %0, %1, %2, %3;" : "=r"(o[3]) : "r"(a), "r"(b % 40), "r"(c % 40));
    asm("bfe.s32 %0, %1, %2, %3;" : "=r"(o[4]) : "r"(a), "r"(b % 40), "r"(c % 40));
    asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(o[5]) : "r"(a), "r"(b), "r"(c % 40), "r"(a % 40));
    o[6] = (a & b) ^ (~b & c), o[7] = __umulhi(a, b), o[8] = __mulhi(int(a), int(b)), o[9] = __popc(a), o[10] = __clz(a & 0xFFFFF);
    o[11] = __brev(a), o[12] = int(a) >> (b % 32), o[13] = int(a) / (int(b) | 1), o[14] = a % (c | 1), o[15] = uint32_t((uint64_t(a) << 32 | b) / (c | 1));
}

CHECK c_halves(ARGUMENTS) {
    LANE;
    const uint32_t ha = two_f16(in[lane]), hb = two_f16(in[32 + lane]), hc = two_f16(in[64 + lane]);
    const uint32_t ba = two_bf16(in[lane]), bb = two_bf16(in[32 + lane]), bc = two_bf16(in[64 + lane]);
    uint32_t* o = out + lane * 5;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(o[0]) : "r"(ha), "r"(hb), "r"(hc));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(o[1]) : "r"(ba), "r"(bb), "r"(bc));
    asm("add.f16x2 %0, %1, %2;" : "=r"(o[2]) : "r"(ha), "r"(hb));
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(o[3]) : "r"(ba), "r"(bb));
    asm("mul.f16x2 %0, %1, %2;" : "=r"(o[4]) : "r"(ha), "r"(hb));
}

CHECK c_atomics(ARGUMENTS) {
    LANE;
    __shared__ uint32_t s[4];
    if (lane < 4) s[lane] = lane;
    if (lane == 0) out[4] = 0;
    __syncwarp();
    atomicAdd(s, in[lane]), atomicMax(s + 1, in[lane]), atomicXor(s + 2, in[lane]), atomicInc(s + 3, 5), atomicAdd(out + 4, in[lane]);
    __syncwarp();
    if (lane < 4) out[lane] = s[lane];
}

CHECK c_relaxed(ARGUMENTS) {
    LANE;
    if (lane == 0) out[32] = in[0];
    __syncwarp();
    atomic_add_relaxed(out + 32, in[1 + lane]);
    fence_device();
    __syncwarp();
    out[lane] = load_relaxed(out + 32);
}
