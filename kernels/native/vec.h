/* Vectors of 16 lanes in the compiler's own notation, so that one source serves any CPU; the few
 * operations that compilers translate badly have AVX-512 versions. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

#ifdef __clang__
#define SHUFFLE(type, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(type, a, b, ...) __builtin_shuffle(a, b, (type){__VA_ARGS__})
#endif

INLINE f32x16 splat(float x) { return (f32x16){0} + x; }

INLINE f32x16 select16(i32x16 mask, f32x16 yes, f32x16 no)
{
    return (f32x16)(((i32x16)yes & mask) | ((i32x16)no & ~mask));
}

INLINE f32x16 max16(f32x16 a, f32x16 b)
{
#ifdef __AVX512F__
    return (f32x16)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return select16(a > b, a, b);
#endif
}

INLINE f32x16 min16(f32x16 a, f32x16 b)
{
#ifdef __AVX512F__
    return (f32x16)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return select16(a < b, a, b);
#endif
}

INLINE float reduce_max16(f32x16 a)
{
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)a);
#else
    float result = a[0];
    for (int i = 1; i < LANES; i++)
        result = a[i] > result ? a[i] : result;
    return result;
#endif
}

INLINE float reduce_add16(f32x16 a)
{
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)a);
#else
    float result = a[0];
    for (int i = 1; i < LANES; i++)
        result += a[i];
    return result;
#endif
}

/* e^x to about 1 ulp, and exactly 0 below -87: e^r * 2^n with |r| <= ln(2) / 2, where e^r is its
 * Taylor series to the 7th power. Sums of masked scores rely on the exact 0. */
INLINE f32x16 exp16(f32x16 x)
{
    const float round = 12582912.0f; /* 1.5 * 2^23: adding it leaves n in the low mantissa bits */
    f32x16 clipped = min16(splat(88.0f), max16(splat(-87.0f), x)); /* in this order NaN stays */
    f32x16 shifted = clipped * 1.44269504f + round;
    f32x16 n = shifted - round;
    f32x16 r = clipped - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 e = r * (1.0f / 5040) + 1.0f / 720;
    e = e * r + 1.0f / 120;
    e = e * r + 1.0f / 24;
    e = e * r + 1.0f / 6;
    e = e * r + 0.5f;
    e = e * r + 1.0f;
    e = e * r + 1.0f;
    i32x16 exponent = (i32x16)shifted << 23; /* n's bits; the rest is shifted out */
    f32x16 result = (f32x16)((i32x16)e + exponent);
    return select16(x < -87.0f, splat(0.0f), result);
}

INLINE float bf16_to_f32(bf16 x)
{
    uint32_t bits = (uint32_t)x << 16;
    float result;
    memcpy(&result, &bits, sizeof result);
    return result;
}

/* Round to nearest even; NaN stays NaN. */
INLINE bf16 f32_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? (bf16)rounded : 0x7fc0;
}

INLINE f32x16 load_f32(const float *p)
{
    f32x16 x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store_f32(float *p, f32x16 x) { memcpy(p, &x, sizeof x); }

INLINE f32x16 load_bf16(const bf16 *p)
{
    u16x16 x;
    memcpy(&x, p, sizeof x);
    return (f32x16)(__builtin_convertvector(x, u32x16) << 16);
}

INLINE void store_bf16(bf16 *p, f32x16 x)
{
#ifdef __AVX512BF16__
    __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    memcpy(p, &rounded, sizeof rounded);
#else
    u32x16 bits = (u32x16)x;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    i32x16 ordered = x == x;
    rounded = (rounded & (u32x16)ordered) | (0x7fc0 & ~(u32x16)ordered);
    u16x16 narrow = __builtin_convertvector(rounded, u16x16);
    memcpy(p, &narrow, sizeof narrow);
#endif
}

/* Part of a vector, for row ends: lanes past `n` read as 0 and aren't written. */
INLINE f32x16 load_f32_part(const float *p, int64_t n)
{
    float lanes[LANES] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return load_f32(lanes);
}

INLINE void store_f32_part(float *p, f32x16 x, int64_t n) { memcpy(p, &x, (size_t)n * sizeof *p); }

INLINE f32x16 load_bf16_part(const bf16 *p, int64_t n)
{
    bf16 lanes[LANES] = {0};
    memcpy(lanes, p, (size_t)n * sizeof *p);
    return load_bf16(lanes);
}

INLINE void store_bf16_part(bf16 *p, f32x16 x, int64_t n)
{
    bf16 lanes[LANES];
    store_bf16(lanes, x);
    memcpy(p, lanes, (size_t)n * sizeof *p);
}
