// Optimisers: one read and one write of each buffer, with a copy of the parameters in the storage type.
//
// Geometry: four neighbouring elements a thread, 16 bytes of f32 an access, grid-stride. Not yet run on hardware.
#include "optimizer.cuh"

template <class Rule>
struct Update {
    const float* gradient;
    int64_t count;
    Rule rule;
};

template <class Rule>
__device__ __forceinline__ void update(const Update<Rule>& p) {
    for (int64_t at = (int64_t(blockIdx.x) * 256 + threadIdx.x) * 4; at < p.count; at += int64_t(gridDim.x) * 1024) {
        const int count = left(p.count, at);
        float gradient[4];
        load4(gradient, p.gradient + at, count);
        p.rule.update(at, count, gradient);
    }
}
KERNEL sgd_f32(ARGUMENTS(Update<Sgd<float>>)) { update(p); }
KERNEL sgd_bf16(ARGUMENTS(Update<Sgd<bf16>>)) { update(p); }
KERNEL sgd_f16(ARGUMENTS(Update<Sgd<f16>>)) { update(p); }
KERNEL adam_f32(ARGUMENTS(Update<Adam<float>>)) { update(p); }
KERNEL adam_bf16(ARGUMENTS(Update<Adam<bf16>>)) { update(p); }
KERNEL adam_f16(ARGUMENTS(Update<Adam<f16>>)) { update(p); }
