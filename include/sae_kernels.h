// Kernels for sparse autoencoders: the C functions of the library sae-kernels, on the CPU or a CUDA device.
//
// Every function that returns int32_t returns SAEK_OK or an error code, and saek_last_error() says what was wrong and
// what would be right. Arguments are checked before anything is written. Nothing is printed, no call ends the program,
// and no exception leaves the library.
//
// Arrays are in the memory that the context computes in; objective, losses and what makes a context in the host's.
//
// Names end in the storage type of x, weight and activations: float, double, or bf16 and f16 (IEEE half) as uint16_t.
// Everything else is float, or double where that is the storage type; sums and losses are double.
//
// n is the number of rows of the batch, d of inputs, h of latents. Matrices are row-major, and dense but for x, whose
// rows are ldx >= d elements apart, so that it spans (n-1)*ldx + d elements, and for given activations, whose rows are
// lda >= h elements apart. An array without elements may be NULL, or point anywhere.
//
// The caller answers for what cannot be checked: that arrays are as long as the extents say, and that from the call to
// the return nobody else writes what it reads, nor reads or writes what it writes. What a call writes may overlap
// nothing else of the call, the gaps between the rows of x included.
//
// A context is not usable in a child after fork(). The threads of a destroyed context end a moment later, so the
// library must not be unloaded once there were any.
//
// This file is made by cbindgen: change src/capi/mod.rs and cbindgen.toml instead.

#ifndef SAE_KERNELS_H
#define SAE_KERNELS_H

#include <stdint.h>

// The call did what it says.
#define SAEK_OK 0

// A required pointer is NULL.
#define SAEK_ERROR_NULL 1

// A number is outside its range: a weight of the objective, the reduction, the number of threads or of the device, a
// count of statistics.
#define SAEK_ERROR_ARGUMENT 2

// Extents are negative, too large, or do not fit together; or the batch has too few rows for the objective.
#define SAEK_ERROR_SHAPE 3

// A pointer is not aligned to its type, or an output overlaps another buffer of the call.
#define SAEK_ERROR_POINTER 4

// There is not enough memory.
#define SAEK_ERROR_MEMORY 5

// The threads could not be started.
#define SAEK_ERROR_BACKEND 6

// A bug in the library. What the call writes may be half written; the context stays usable.
#define SAEK_ERROR_PANIC 7

// The CUDA device cannot do it: the library is built without CUDA, there is no driver or no such device, the driver is
// too old, a call of it failed, or the type is double. After a failed call of the driver what the call writes may be
// half written, and the device may be of no more use to the process.
#define SAEK_ERROR_DEVICE 8

// The log-sum-exp term is summed over rows, as in the paper.
#define SAEK_REDUCTION_SUM 0

// The log-sum-exp term is averaged over rows.
#define SAEK_REDUCTION_MEAN 1

// Most threads of a context.
#define SAEK_MAX_THREADS 1024

// Where steps are computed, and the memory that they use. It keeps the memory of the last call, so a step of the same
// objective, type, d and h and of as many rows or fewer allocates nothing. The two phases allocate a little; and as
// statistics always hold what the correlation term needs, phases with lambda_tc = 0 make all their memory anew.
//
// Several threads may use one context: their calls wait for each other.
typedef struct saek_context saek_context;

// Weights of the terms of the loss lambda_lse * lse + lambda_var * var + lambda_tc * tc + lambda_wr * wr.
// The paper's are 1, 1, 1, 0, 1e-6, SAEK_REDUCTION_SUM.
typedef struct {
    // Weight of the log-sum-exp term.
    double lambda_lse;
    // Weight of the variance term.
    double lambda_var;
    // Weight of the correlation term.
    double lambda_tc;
    // Weight of the weight-redundancy term, in which the rows of the weight are normalised.
    double lambda_wr;
    // What is added to a variance before its logarithm; positive.
    double variance_eps;
    // SAEK_REDUCTION_SUM or SAEK_REDUCTION_MEAN.
    int32_t reduction;
} saek_objective;

// Values of the terms, and their weighted sum. A term whose weight is 0 is not computed and reads 0.
typedef struct {
    // -sum_n log sum_j exp(-a_nj), or the mean over n.
    double lse;
    // -sum_j log(v_j + variance_eps), v_j the unbiased variance of latent j over the batch.
    double var;
    // Sum of the squared correlations of all pairs i != j of latents.
    double tc;
    // Sum of the squares of V V^T - I, V the weight with normalised rows.
    double wr;
    // The weighted sum.
    double total;
} saek_losses;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Makes a context that computes on the CPU, with the best instruction set that it has. threads: 1 is the calling
// thread alone, more is a pool of as many threads that the context owns, 0 is one thread for each processor that the
// process may use. Results have the same bits for any number of threads.
int32_t saek_context_create_cpu(int32_t threads,
                                saek_context **out);

// Makes a context that computes on a CUDA device, in a stream of the caller's (a CUstream or cudaStream_t; NULL: the
// default stream). device is the driver's number, from 0. The stream must be of the device's primary context, which is
// the one that the CUDA runtime and frameworks use, and outlive the saek_context. The library must be built with its
// CUDA kernels: cargo rustc --release --lib --crate-type cdylib --features capi,cuda
//
// All arrays of a call are then in the device's memory, shift and statistics too; objective and losses stay in the
// host's. Work goes to the stream, behind what is there, and every call waits for the stream before it returns, as it
// returns sums to the host. The primary context is left current to the calling thread. There is no double: those calls
// are refused. Not yet run on hardware.
int32_t saek_context_create_cuda(int32_t device,
                                 void *stream,
                                 saek_context **out);

// Frees a context that no call uses any more. NULL is nothing to free.
void saek_context_destroy(saek_context *context);

// What went wrong in the calling thread's last call that failed, and what would be right, in UTF-8; an empty text if
// none failed. Never NULL. It stays valid until the next call of this thread fails, or the thread ends.
const char *saek_last_error(void);

// The library's version, as in 0.1.0.
const char *saek_version(void);

// One step of the decoder-free autoencoder a = max(x W^T + b, 0): losses and gradients of a whole batch, which are
// overwritten.
//
// x [n,d], its rows ldx elements apart; weight [h,d]; bias [h]; grad_weight [h,d]; grad_bias [h]. activations [n,h],
// row_loss [n] (-log sum_j exp(-a_nj)) and grad_x [n,d] may be NULL, if they are not wanted.
int32_t saek_decoder_free_step_f32(saek_context *context,
                                   const saek_objective *objective,
                                   int64_t n,
                                   int64_t d,
                                   int64_t h,
                                   const float *x,
                                   int64_t ldx,
                                   const float *weight,
                                   const float *bias,
                                   float *activations,
                                   float *row_loss,
                                   float *grad_weight,
                                   float *grad_bias,
                                   float *grad_x,
                                   saek_losses *losses);

// As saek_decoder_free_step_f32, with bf16 for x, weight and activations.
int32_t saek_decoder_free_step_bf16(saek_context *context,
                                    const saek_objective *objective,
                                    int64_t n,
                                    int64_t d,
                                    int64_t h,
                                    const uint16_t *x,
                                    int64_t ldx,
                                    const uint16_t *weight,
                                    const float *bias,
                                    uint16_t *activations,
                                    float *row_loss,
                                    float *grad_weight,
                                    float *grad_bias,
                                    float *grad_x,
                                    saek_losses *losses);

// As saek_decoder_free_step_f32, with f16 for x, weight and activations.
int32_t saek_decoder_free_step_f16(saek_context *context,
                                   const saek_objective *objective,
                                   int64_t n,
                                   int64_t d,
                                   int64_t h,
                                   const uint16_t *x,
                                   int64_t ldx,
                                   const uint16_t *weight,
                                   const float *bias,
                                   uint16_t *activations,
                                   float *row_loss,
                                   float *grad_weight,
                                   float *grad_bias,
                                   float *grad_x,
                                   saek_losses *losses);

// As saek_decoder_free_step_f32, all in double, and by plain loops: for checks of gradients and small batches.
int32_t saek_decoder_free_step_f64(saek_context *context,
                                   const saek_objective *objective,
                                   int64_t n,
                                   int64_t d,
                                   int64_t h,
                                   const double *x,
                                   int64_t ldx,
                                   const double *weight,
                                   const double *bias,
                                   double *activations,
                                   double *row_loss,
                                   double *grad_weight,
                                   double *grad_bias,
                                   double *grad_x,
                                   saek_losses *losses);

// The losses of a step alone: no gradients. activations [n,h] and row_loss [n] may be NULL.
int32_t saek_decoder_free_forward_f32(saek_context *context,
                                      const saek_objective *objective,
                                      int64_t n,
                                      int64_t d,
                                      int64_t h,
                                      const float *x,
                                      int64_t ldx,
                                      const float *weight,
                                      const float *bias,
                                      float *activations,
                                      float *row_loss,
                                      saek_losses *losses);

// As saek_decoder_free_forward_f32, all in double, and by plain loops.
int32_t saek_decoder_free_forward_f64(saek_context *context,
                                      const saek_objective *objective,
                                      int64_t n,
                                      int64_t d,
                                      int64_t h,
                                      const double *x,
                                      int64_t ldx,
                                      const double *weight,
                                      const double *bias,
                                      double *activations,
                                      double *row_loss,
                                      saek_losses *losses);

// As saek_decoder_free_forward_f32, with bf16 for x, weight and activations.
int32_t saek_decoder_free_forward_bf16(saek_context *context,
                                       const saek_objective *objective,
                                       int64_t n,
                                       int64_t d,
                                       int64_t h,
                                       const uint16_t *x,
                                       int64_t ldx,
                                       const uint16_t *weight,
                                       const float *bias,
                                       uint16_t *activations,
                                       float *row_loss,
                                       saek_losses *losses);

// As saek_decoder_free_forward_f32, with f16 for x, weight and activations.
int32_t saek_decoder_free_forward_f16(saek_context *context,
                                      const saek_objective *objective,
                                      int64_t n,
                                      int64_t d,
                                      int64_t h,
                                      const uint16_t *x,
                                      int64_t ldx,
                                      const uint16_t *weight,
                                      const float *bias,
                                      uint16_t *activations,
                                      float *row_loss,
                                      saek_losses *losses);

// Numbers in a buffer of statistics: 2 + h + h(h+1)/2, or -1 and an error. With a the activations and c the shift,
// they are the number of rows, the sum of the row losses, the sums of a_j - c_j, and the upper triangle, row by row,
// of the sums of (a_i - c_i)(a_j - c_j). All are sums over rows, so the statistics of several ranks are the sum of
// theirs, element by element.
int64_t saek_statistics_len(int64_t h);

// The first phase of a step whose rows are spread over ranks: adds the sums over these rows to statistics, a buffer of
// saek_statistics_len(h) doubles. The host sets it to 0 before the first block of rows, and sums it over its ranks.
//
// shift [h] is the same on all ranks and in the second phase; NULL is 0. It changes nothing but rounding: where a
// latent's mean is many deviations from 0, pass something near its mean, say that of the batch before.
int32_t saek_decoder_free_statistics_f32(saek_context *context,
                                         int64_t n,
                                         int64_t d,
                                         int64_t h,
                                         const float *x,
                                         int64_t ldx,
                                         const float *weight,
                                         const float *bias,
                                         const float *shift,
                                         double *statistics);

// As saek_decoder_free_statistics_f32, with bf16 for x and weight.
int32_t saek_decoder_free_statistics_bf16(saek_context *context,
                                          int64_t n,
                                          int64_t d,
                                          int64_t h,
                                          const uint16_t *x,
                                          int64_t ldx,
                                          const uint16_t *weight,
                                          const float *bias,
                                          const float *shift,
                                          double *statistics);

// As saek_decoder_free_statistics_f32, with f16 for x and weight.
int32_t saek_decoder_free_statistics_f16(saek_context *context,
                                         int64_t n,
                                         int64_t d,
                                         int64_t h,
                                         const uint16_t *x,
                                         int64_t ldx,
                                         const uint16_t *weight,
                                         const float *bias,
                                         const float *shift,
                                         double *statistics);

// The second phase: given the statistics of all ranks' rows and the shift that they are about, *adds* the gradients of
// these rows to grad_weight and grad_bias, which the host then sums over its ranks; grad_x, if it is not NULL, is
// overwritten.
//
// The weight-redundancy term must enter once over all ranks: add_weight_term says whether here (0: no). losses are
// those of the whole batch, on every rank.
int32_t saek_decoder_free_backward_f32(saek_context *context,
                                       const saek_objective *objective,
                                       int64_t n,
                                       int64_t d,
                                       int64_t h,
                                       const float *x,
                                       int64_t ldx,
                                       const float *weight,
                                       const float *bias,
                                       const float *shift,
                                       const double *statistics,
                                       int32_t add_weight_term,
                                       float *grad_weight,
                                       float *grad_bias,
                                       float *grad_x,
                                       saek_losses *losses);

// As saek_decoder_free_backward_f32, with bf16 for x and weight.
int32_t saek_decoder_free_backward_bf16(saek_context *context,
                                        const saek_objective *objective,
                                        int64_t n,
                                        int64_t d,
                                        int64_t h,
                                        const uint16_t *x,
                                        int64_t ldx,
                                        const uint16_t *weight,
                                        const float *bias,
                                        const float *shift,
                                        const double *statistics,
                                        int32_t add_weight_term,
                                        float *grad_weight,
                                        float *grad_bias,
                                        float *grad_x,
                                        saek_losses *losses);

// As saek_decoder_free_backward_f32, with f16 for x and weight.
int32_t saek_decoder_free_backward_f16(saek_context *context,
                                       const saek_objective *objective,
                                       int64_t n,
                                       int64_t d,
                                       int64_t h,
                                       const uint16_t *x,
                                       int64_t ldx,
                                       const uint16_t *weight,
                                       const float *bias,
                                       const float *shift,
                                       const double *statistics,
                                       int32_t add_weight_term,
                                       float *grad_weight,
                                       float *grad_bias,
                                       float *grad_x,
                                       saek_losses *losses);

// Losses of given activations, whatever encoder they come from, and their gradient, without the encoder's. activations
// [n,h] may be negative; their rows are lda elements apart.
//
// What is not wanted may be NULL: grad_activations [n,h]; grad_weight [h,d]; responsibilities [n,h], softmax(-a) by row;
// row_loss [n]. All of it is overwritten. weight [h,d] may be NULL if lambda_wr is 0 and grad_weight NULL. With n = 0
// and lambda_wr alone these are loss and gradient of a weight. A context keeps the memory of these calls, of those with
// n = 0, and of steps, each by itself.
int32_t saek_activation_losses_f32(saek_context *context,
                                   const saek_objective *objective,
                                   int64_t n,
                                   int64_t d,
                                   int64_t h,
                                   const float *activations,
                                   int64_t lda,
                                   const float *weight,
                                   float *grad_activations,
                                   float *grad_weight,
                                   float *responsibilities,
                                   float *row_loss,
                                   saek_losses *losses);

// As saek_activation_losses_f32, all in double, and by plain loops: for checks of gradients and small batches.
int32_t saek_activation_losses_f64(saek_context *context,
                                   const saek_objective *objective,
                                   int64_t n,
                                   int64_t d,
                                   int64_t h,
                                   const double *activations,
                                   int64_t lda,
                                   const double *weight,
                                   double *grad_activations,
                                   double *grad_weight,
                                   double *responsibilities,
                                   double *row_loss,
                                   saek_losses *losses);

// As saek_activation_losses_f32, with bf16 for activations, weight and grad_activations.
int32_t saek_activation_losses_bf16(saek_context *context,
                                    const saek_objective *objective,
                                    int64_t n,
                                    int64_t d,
                                    int64_t h,
                                    const uint16_t *activations,
                                    int64_t lda,
                                    const uint16_t *weight,
                                    uint16_t *grad_activations,
                                    float *grad_weight,
                                    float *responsibilities,
                                    float *row_loss,
                                    saek_losses *losses);

// As saek_activation_losses_f32, with f16 for activations, weight and grad_activations.
int32_t saek_activation_losses_f16(saek_context *context,
                                   const saek_objective *objective,
                                   int64_t n,
                                   int64_t d,
                                   int64_t h,
                                   const uint16_t *activations,
                                   int64_t lda,
                                   const uint16_t *weight,
                                   uint16_t *grad_activations,
                                   float *grad_weight,
                                   float *responsibilities,
                                   float *row_loss,
                                   saek_losses *losses);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* SAE_KERNELS_H */
