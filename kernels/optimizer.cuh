// Updates of four neighbouring parameters, where their gradient is: in memory (optimizer.cu) or in registers (tiny.cu), the same bits.
#pragma once
#include "common.cuh"

template <class E>
struct Sgd {
    /// Missing without momentum.
    float* velocity;
    float* parameters;
    /// May be missing.
    E* storage;
    float learning_rate, momentum, weight_decay;
    uint32_t padding;

    /// Those from `at` on; `count` of them are there.
    __device__ __forceinline__ void update(int64_t at, int count, const float (&gradient)[4]) const {
        float step[4], parameter[4];
        load4(parameter, parameters + at, count);
#pragma unroll
        for (int i = 0; i < 4; ++i) step[i] = fmaf(weight_decay, parameter[i], gradient[i]);
        if (velocity != nullptr) {
            float before[4];
            load4(before, velocity + at, count);
#pragma unroll
            for (int i = 0; i < 4; ++i) step[i] = fmaf(momentum, before[i], step[i]);
            store4(velocity + at, step, count);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) parameter[i] = fmaf(-learning_rate, step[i], parameter[i]);
        store4(parameters + at, parameter, count);
        if (storage != nullptr) store4(storage + at, parameter, count);
    }
};

template <class E>
struct Adam {
    float *first, *second, *parameters;
    /// May be missing.
    E* storage;
    float beta1, beta2, rest1, rest2;
    /// 1 − learning_rate·weight_decay; step size and eps with the bias corrections in them.
    float keep, step, eps;
    uint32_t padding;

    /// Those from `at` on; `count` of them are there.
    __device__ __forceinline__ void update(int64_t at, int count, const float (&gradient)[4]) const {
        float m[4], u[4], parameter[4];
        load4(m, first + at, count);
        load4(u, second + at, count);
        load4(parameter, parameters + at, count);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float g = gradient[i];
            // Fused by hand: the compiler may choose differently from place to place.
            m[i] = fmaf(beta1, m[i], rest1 * g);
            u[i] = fmaf(beta2, u[i], rest2 * g * g);
            parameter[i] = fmaf(keep, parameter[i], -(step * m[i] / (sqrtf(u[i]) + eps)));
        }
        store4(first + at, m, count);
        store4(second + at, u, count);
        store4(parameters + at, parameter, count);
        if (storage != nullptr) store4(storage + at, parameter, count);
    }
};
