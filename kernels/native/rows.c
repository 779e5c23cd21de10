/* Row-wise operations, for both element types: norm, gated activation, rope with the KV store. */
#include "fp8.h"

/* Below this many elements a second thread costs more than it brings. */
#define PARALLEL_ELEMENTS (1 << 17)

struct rms_norm_args {
    const void *x, *weight; /* x is [outer, inner, n] with these strides, in elements */
    void *out;              /* [outer, inner, n], contiguous */
    int64_t outer, inner, n, outer_stride, inner_stride, num_threads;
    double eps;
};

struct add_rms_norm_args {
    void *x, *residual; /* [rows, n], contiguous */
    const void *weight;
    int64_t rows, n, num_threads;
    double eps;
};

struct silu_and_mul_args {
    const void *gate_up; /* [rows, 2 * n], contiguous */
    void *out;           /* [rows, n], contiguous */
    int64_t rows, n, num_threads;
};

struct rope_args {
    void *q;                  /* [num_tokens, num_heads, head_dim], rotated in place */
    const void *k, *v;        /* [num_tokens, num_kv_heads, head_dim] */
    void *pool;               /* K of block 0 in this layer: [num_kv_heads, block_size, head_dim] */
    const float *cos_sin;     /* [max_positions, 2 * half] */
    const int64_t *positions; /* [num_tokens] */
    const int64_t *slots;     /* [num_tokens], block * block_size + offset */
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, half, block_size;
    /* Elements from token to token (a token's heads are adjacent), and from block to block. */
    int64_t q_stride, k_stride, v_stride, cos_sin_stride, block_stride;
    int64_t kv_format, turns, num_threads; /* kv_format: of the pool, see fp8.h */
    double k_scale, v_scale;        /* what an 8-bit pool's values are multiplied with when read */
};

/* Halves of a head, `n` elements, n a power of 2, times a Hadamard matrix each: see turning.py. */
INLINE void turn_head(float *x, int64_t n)
{
    int64_t half = n / 2;
    for (int64_t step = 1; step < half; step *= 2)
        for (int64_t i = 0; i < n; i += 2 * step)
            for (int64_t j = i; j < i + step; j++) {
                float first = x[j], second = x[j + step];
                x[j] = first + second;
                x[j + step] = first - second;
            }
    float scale = 1.0f / sqrtf((float)half);
    for (int64_t i = 0; i < n; i++)
        x[i] *= scale;
}

/* A row for the pool's `n` bytes. */
INLINE void store_fp8_row(uint8_t *to, const float *row, int64_t n, double scale,
                          const struct fp8_format *format)
{
    float inverse = (float)(1.0 / scale);
    for (int64_t i = 0; i < n; i++)
        to[i] = f32_to_fp8(row[i] * inverse, format);
}

#define T float
#define NAME(base) base##_f32
#define TO_F32(x) (x)
#define FROM_F32(x) (x)
#define LOAD load_f32
#define STORE store_f32
#define LOAD_PART load_f32_part
#define STORE_PART store_f32_part
#include "rows_impl.h"

#define T bf16
#define NAME(base) base##_bf16
#define TO_F32 bf16_to_f32
#define FROM_F32 f32_to_bf16
#define LOAD load_bf16
#define STORE store_bf16
#define LOAD_PART load_bf16_part
#define STORE_PART store_bf16_part
#include "rows_impl.h"
