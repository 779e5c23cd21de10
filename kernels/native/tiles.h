/* Matrix tiles: a few rows times a panel of 32 columns, sums in registers.
 *
 * Each sum is one chain in ascending order of the inner dimension, so that a row's result is the
 * same to the bit however many rows are computed together: batches don't change answers.
 */
#pragma once
#include "vec.h"

#define PANEL 32 /* columns of a tile, and of a packed panel */
#define PREFETCH(address) __builtin_prefetch(address, 0, 3)
#define PREFETCH_L2(address) __builtin_prefetch(address, 0, 2)

/* 12 rows of two AVX-512 vectors leave 8 registers for operands; 4 rows are what AVX2's or NEON's
 * registers can hold. */
#ifdef __AVX512F__
#define MAX_TILE_ROWS 12
#else
#define MAX_TILE_ROWS 4
#endif

/* sums[rows][2] += A * B over `steps` of the inner dimension: A's word k of row i is
 * a[k * k_stride + i * row_stride], B is [steps][PANEL]. Words are floats here. With `ahead`, a
 * line a step is fetched from there on, `ahead_step` bytes apart. */
INLINE void multiply_tile_f32(const int rows, int64_t steps, const float *a, const int64_t k_stride,
                              const int64_t row_stride, const float *b, f32x16 sums[][2],
                              const char *const ahead, const int64_t ahead_step)
{
    for (int64_t k = 0; k < steps; k++) {
        f32x16 left = load_f32(b), right = load_f32(b + LANES);
        if (ahead)
            PREFETCH(ahead + k * ahead_step);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            f32x16 word = splat(a[i * row_stride]);
            sums[i][0] += word * left;
            sums[i][1] += word * right;
        }
        a += k_stride;
        b += PANEL;
    }
}

#ifdef __AVX512BF16__
/* The same where a word is a pair of neighbours in the inner dimension, both bfloat16. */
INLINE void multiply_tile_bf16(const int rows, int64_t steps, const int32_t *a,
                               const int64_t k_stride, const int64_t row_stride, const int32_t *b,
                               f32x16 sums[][2], const char *const ahead, const int64_t ahead_step)
{
    for (int64_t k = 0; k < steps; k++) {
        __m512bh left = (__m512bh)_mm512_loadu_si512(b);
        __m512bh right = (__m512bh)_mm512_loadu_si512(b + LANES);
        if (ahead)
            PREFETCH(ahead + k * ahead_step);
#pragma GCC unroll 12
        for (int i = 0; i < rows; i++) {
            __m512bh word = (__m512bh)_mm512_set1_epi32(a[i * row_stride]);
            sums[i][0] = (f32x16)_mm512_dpbf16_ps((__m512)sums[i][0], word, left);
            sums[i][1] = (f32x16)_mm512_dpbf16_ps((__m512)sums[i][1], word, right);
        }
        a += k_stride;
        b += PANEL;
    }
}
#endif

/* Calls `function` with the number of rows as a constant, which keeps the sums in registers. */
#if MAX_TILE_ROWS == 12
#define WITH_CONSTANT_ROWS(rows, function, ...)                                                  \
    switch (rows) {                                                                              \
    case 1: function(1, __VA_ARGS__); break;                                                     \
    case 2: function(2, __VA_ARGS__); break;                                                     \
    case 3: function(3, __VA_ARGS__); break;                                                     \
    case 4: function(4, __VA_ARGS__); break;                                                     \
    case 5: function(5, __VA_ARGS__); break;                                                     \
    case 6: function(6, __VA_ARGS__); break;                                                     \
    case 7: function(7, __VA_ARGS__); break;                                                     \
    case 8: function(8, __VA_ARGS__); break;                                                     \
    case 9: function(9, __VA_ARGS__); break;                                                     \
    case 10: function(10, __VA_ARGS__); break;                                                   \
    case 11: function(11, __VA_ARGS__); break;                                                   \
    default: function(12, __VA_ARGS__);                                                          \
    }
#else
#define WITH_CONSTANT_ROWS(rows, function, ...)                                                  \
    switch (rows) {                                                                              \
    case 1: function(1, __VA_ARGS__); break;                                                     \
    case 2: function(2, __VA_ARGS__); break;                                                     \
    case 3: function(3, __VA_ARGS__); break;                                                     \
    default: function(4, __VA_ARGS__);                                                           \
    }
#endif
