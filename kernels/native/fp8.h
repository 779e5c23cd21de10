/* Floating point types of 8 bits, as the paged pool may hold them: FORMAT_E4M3 (largest value 448,
 * no infinity) and FORMAT_E5M2 (57,344). What is too large is stored as the largest value. */
#pragma once
#include "vec.h"

/* The values of an argument structure's `kv_format`. */
enum { FORMAT_SAME, FORMAT_E4M3, FORMAT_E5M2 };

struct fp8_format {
    int32_t shift;      /* by which a float's bits are longer than the type's */
    int32_t bias;       /* a float's exponent of 1.0, less the type's */
    int32_t highest;    /* bits of the largest value */
    float largest, least_normal, subnormal_round;
};

/* Adding subnormal_round to a float below least_normal leaves the type's bits in the low mantissa:
 * its unit in the last place is the type's least value. */
static const struct fp8_format FP8_FORMATS[] = {
    [FORMAT_E4M3] = {20, 120, 0x7e, 448.0f, 0x1p-6f, 0x1p14f},
    [FORMAT_E5M2] = {21, 112, 0x7b, 57344.0f, 0x1p-14f, 0x1p7f},
};

/* 16 values; what is above the largest becomes NaN. */
INLINE f32x16 load_fp8(const uint8_t *p, const struct fp8_format *format)
{
    typedef uint8_t u8x16 __attribute__((vector_size(16)));
    u8x16 bytes;
    memcpy(&bytes, p, sizeof bytes);
    i32x16 bits = __builtin_convertvector(bytes, i32x16), magnitude = bits & 0x7f;
    /* As a float's bits they are too small by a power of two, subnormals included. */
    f32x16 rebias = (f32x16)((i32x16){0} + ((127 + format->bias) << 23));
    i32x16 value = (i32x16)((f32x16)(magnitude << format->shift) * rebias);
    value = (value | (bits & 0x80) << 24) | ((magnitude > format->highest) & 0x7fc00000);
    return (f32x16)value;
}

/* Rounds to nearest even; NaN stays NaN. */
INLINE uint8_t f32_to_fp8(float x, const struct fp8_format *format)
{
    float magnitude = fabsf(x);
    magnitude = magnitude > format->largest ? format->largest : magnitude;
    float shifted = magnitude + format->subnormal_round;
    int32_t bits, subnormal, base, sign;
    memcpy(&bits, &magnitude, sizeof bits);
    memcpy(&subnormal, &shifted, sizeof subnormal);
    memcpy(&base, &format->subnormal_round, sizeof base);
    memcpy(&sign, &x, sizeof sign);
    int32_t half = (1 << (format->shift - 1)) - 1 + (bits >> format->shift & 1);
    int32_t normal = ((bits + half) >> format->shift) - (format->bias << (23 - format->shift));
    int32_t result = magnitude < format->least_normal ? subnormal - base : normal;
    result = x == x ? result : 0x7f;
    return (uint8_t)(result | (sign >> 24 & 0x80));
}
