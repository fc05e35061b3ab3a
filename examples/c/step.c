/* A few steps of gradient descent on made-up data, with the C functions of sae-kernels.
 *
 *   cargo rustc --release --lib --crate-type cdylib --features capi
 *   cc -std=c11 -Iinclude examples/c/step.c -Ltarget/release -lsae_kernels -Wl,-rpath,"$PWD/target/release" -o target/step
 *   target/step
 */
#include "sae_kernels.h"
#include <stdio.h>
#include <stdlib.h>

enum { ROWS = 128, INPUTS = 20, LATENTS = 8, STEPS = 10 };

static float x[ROWS * INPUTS], weight[LATENTS * INPUTS], bias[LATENTS];
static float grad_weight[LATENTS * INPUTS], grad_bias[LATENTS];

/* Ends the program if a call has failed. */
static void check(int32_t code) {
    if (code != SAEK_OK) {
        fprintf(stderr, "error %d: %s\n", (int)code, saek_last_error());
        exit(EXIT_FAILURE);
    }
}

/* Numbers in [0, 1), the same in every run. */
static float uniform(void) {
    static uint32_t state = 1;
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / 16777216.0f;
}

int main(void) {
    for (int i = 0; i < ROWS * INPUTS; i++) x[i] = uniform();
    for (int i = 0; i < LATENTS * INPUTS; i++) weight[i] = uniform() - 0.5f;
    for (int i = 0; i < LATENTS; i++) bias[i] = 0.5f;

    saek_context *context = NULL;
    check(saek_context_create_cpu(0, &context));
    const saek_objective objective = {1.0, 1.0, 1.0, 0.0, 1e-6, SAEK_REDUCTION_MEAN};
    printf("sae-kernels %s\n", saek_version());

    saek_losses losses;
    double first = 0.0;
    for (int step = 0; step < STEPS; step++) {
        check(saek_decoder_free_step_f32(context, &objective, ROWS, INPUTS, LATENTS, x, INPUTS, weight, bias,
                                         NULL, NULL, grad_weight, grad_bias, NULL, &losses));
        printf("step %d: loss %.4f = lse %.4f + var %.4f + tc %.4f\n", step, losses.total, losses.lse, losses.var, losses.tc);
        if (step == 0) first = losses.total;
        for (int i = 0; i < LATENTS * INPUTS; i++) weight[i] -= 0.01f * grad_weight[i];
        for (int i = 0; i < LATENTS; i++) bias[i] -= 0.01f * grad_bias[i];
    }
    saek_context_destroy(context);

    if (!(losses.total < first)) {
        fprintf(stderr, "the loss did not fall\n");
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
