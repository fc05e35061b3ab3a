// Optimisers: one read and one write of each buffer, with a copy of the parameters in the storage type.
//
// Geometry: a thread an element, grid-stride. Not yet run on hardware.
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
    for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < p.count; i += int64_t(gridDim.x) * 256) {
        float step = fmaf(p.weight_decay, p.parameters[i], p.gradient[i]);
        if (p.velocity != nullptr) {
            step = fmaf(p.momentum, p.velocity[i], step);
            p.velocity[i] = step;
        }
        const float parameter = fmaf(-p.learning_rate, step, p.parameters[i]);
        p.parameters[i] = parameter;
        if (p.storage != nullptr) p.storage[i] = narrow<E>(parameter);
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
    for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < p.count; i += int64_t(gridDim.x) * 256) {
        const float g = p.gradient[i];
        const float first = p.beta1 * p.first[i] + p.rest1 * g, second = p.beta2 * p.second[i] + p.rest2 * g * g;
        const float parameter = p.keep * p.parameters[i] - p.step * first / (sqrtf(second) + p.eps);
        p.first[i] = first;
        p.second[i] = second;
        p.parameters[i] = parameter;
        if (p.storage != nullptr) p.storage[i] = narrow<E>(parameter);
    }
}
KERNEL adam_f32(ARGUMENTS(Adam<float>)) { adam(p); }
KERNEL adam_bf16(ARGUMENTS(Adam<bf16>)) { adam(p); }
KERNEL adam_f16(ARGUMENTS(Adam<f16>)) { adam(p); }
