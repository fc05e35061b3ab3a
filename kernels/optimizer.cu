// Optimisers: one read and one write of each buffer, with a copy of the parameters in the storage type.
//
// Geometry: four neighbouring elements a thread, 16 bytes of f32 an access, grid-stride. Not yet run on hardware.
#include "common.cuh"

template <class E>
struct Sgd {
    const float* gradient;
    /// Missing without momentum.
    float* velocity;
    float* parameters;
    /// May be missing.
    E* storage;
    int64_t count;
    float learning_rate, momentum, weight_decay;
    uint32_t padding;
};

template <class E>
__device__ __forceinline__ void sgd(const Sgd<E>& p) {
    for (int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4; at < p.count; at += int64_t(gridDim.x) * 1024) {
        const int count = left(p.count, at);
        float step[4], parameter[4];
        load4(step, p.gradient + at, count);
        load4(parameter, p.parameters + at, count);
#pragma unroll
        for (int i = 0; i < 4; ++i) step[i] = fmaf(p.weight_decay, parameter[i], step[i]);
        if (p.velocity != nullptr) {
            float velocity[4];
            load4(velocity, p.velocity + at, count);
#pragma unroll
            for (int i = 0; i < 4; ++i) step[i] = fmaf(p.momentum, velocity[i], step[i]);
            store4(p.velocity + at, step, count);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) parameter[i] = fmaf(-p.learning_rate, step[i], parameter[i]);
        store4(p.parameters + at, parameter, count);
        if (p.storage != nullptr) store4(p.storage + at, parameter, count);
    }
}
KERNEL sgd_f32(ARGUMENTS(Sgd<float>)) { sgd(p); }
KERNEL sgd_bf16(ARGUMENTS(Sgd<bf16>)) { sgd(p); }
KERNEL sgd_f16(ARGUMENTS(Sgd<f16>)) { sgd(p); }

template <class E>
struct Adam {
    const float* gradient;
    float *first, *second, *parameters;
    /// May be missing.
    E* storage;
    int64_t count;
    float beta1, beta2, rest1, rest2;
    /// 1 − learning_rate·weight_decay; step size and eps with the bias corrections in them.
    float keep, step, eps;
    uint32_t padding;
};

template <class E>
__device__ __forceinline__ void adam(const Adam<E>& p) {
    for (int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4; at < p.count; at += int64_t(gridDim.x) * 1024) {
        const int count = left(p.count, at);
        float gradient[4], first[4], second[4], parameter[4];
        load4(gradient, p.gradient + at, count);
        load4(first, p.first + at, count);
        load4(second, p.second + at, count);
        load4(parameter, p.parameters + at, count);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float g = gradient[i];
            first[i] = p.beta1 * first[i] + p.rest1 * g;
            second[i] = p.beta2 * second[i] + p.rest2 * g * g;
            parameter[i] = p.keep * parameter[i] - p.step * first[i] / (sqrtf(second[i]) + p.eps);
        }
        store4(p.first + at, first, count);
        store4(p.second + at, second, count);
        store4(p.parameters + at, parameter, count);
        if (p.storage != nullptr) store4(p.storage + at, parameter, count);
    }
}
KERNEL adam_f32(ARGUMENTS(Adam<float>)) { adam(p); }
KERNEL adam_bf16(ARGUMENTS(Adam<bf16>)) { adam(p); }
KERNEL adam_f16(ARGUMENTS(Adam<f16>)) { adam(p); }
