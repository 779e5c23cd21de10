/* What sampling does to rows as wide as a vocabulary: penalties, and top-k, top-p and min-p.
 *
 * A filter is a floor under a row's weights. Non-negative floats order as their bits do, so the
 * floor is found digit by digit from the top (a radix select), over the few weights that can be
 * it. A row's result depends on the row alone. */
#include <math.h>
#include <stdlib.h>

#include "vec.h"

#define DIGIT_BITS 10
#define NUM_DIGITS (1 << (DIGIT_BITS + 1)) /* the first digit has the exponent, 11 bits */
#define BLOCK 64

struct filter_weights_args {
    float *weights;               /* [rows, n], contiguous; not negative */
    const int64_t *top_k;         /* [rows], 0 for none */
    const float *top_p, *min_p;   /* [rows], 1 for none; [rows] or NULL */
    int64_t rows, n, num_threads;
};

struct penalize_args {
    float *scores;                /* row r starts at r * score_stride */
    const int64_t *places;        /* [rows], the rows to change */
    const int64_t *slots;         /* [rows], their counts */
    const int32_t *output_counts; /* [slots, n] */
    const uint8_t *in_prompt;     /* [slots, n] */
    const float *repetition, *presence, *frequency; /* [rows] */
    int64_t rows, n, score_stride, num_threads;
};

struct rule_out_args {
    float *scores;           /* row r starts at r * score_stride */
    const int64_t *places;   /* [rows], the rows to change */
    const uint32_t *allowed; /* [rows, words], bit i % 32 of word i / 32 for score i */
    int64_t rows, n, words, score_stride, num_threads;
};

/* Where a walk from the largest value down reaches its goal. */
struct selection {
    float value;
    double count_above, mass_above; /* of all larger values */
};

struct digit {
    double count, mass;
};

static uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* The largest v among `values` such that those >= v number (or, `by_mass`, sum up to) at least
 * `wanted`; the smallest one if all together don't. */
static struct selection select_from_top(const float *values, int64_t n, double wanted, int by_mass)
{
    static const int shifts[] = {2 * DIGIT_BITS, DIGIT_BITS, 0};
    struct digit digits[NUM_DIGITS];
    struct selection found = {0};
    uint32_t prefix = 0;
    for (int level = 0; level < 3; level++) {
        int shift = shifts[level];
        int width = level ? DIGIT_BITS : DIGIT_BITS + 1;
        uint32_t mask = (1u << width) - 1;
        memset(digits, 0, sizeof *digits << width);
        for (int64_t i = 0; i < n; i++) {
            uint32_t bits = bits_of(values[i]) >> shift;
            if (level == 0 || bits >> width == prefix) {
                digits[bits & mask].count += 1;
                digits[bits & mask].mass += (double)values[i];
            }
        }
        uint32_t chosen = 0;
        for (int64_t i = mask; i >= 0; i--) {
            if (digits[i].count == 0)
                continue;
            chosen = (uint32_t)i;
            double reached = by_mass ? found.mass_above + digits[i].mass
                                     : found.count_above + digits[i].count;
            if (reached >= wanted)
                break;
            found.count_above += digits[i].count;
            found.mass_above += digits[i].mass;
        }
        prefix = prefix << width | chosen;
    }
    memcpy(&found.value, &prefix, sizeof prefix);
    return found;
}

static void zero_below(float *row, int64_t n, float floor)
{
    for (int64_t i = 0; i < n; i++)
        row[i] = row[i] >= floor ? row[i] : 0.0f;
}

static double sum(const float *row, int64_t n)
{
    double lanes[LANES] = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++)
            lanes[j] += (double)row[i + j];
    double total = 0;
    for (; i < n; i++)
        total += (double)row[i];
    for (int64_t j = 0; j < LANES; j++)
        total += lanes[j];
    return total;
}

/* Copies the values >= cutoff; returns how many. Most blocks have none. */
static int64_t collect(const float *row, int64_t n, float cutoff, float *out)
{
    int64_t count = 0;
    for (int64_t start = 0; start < n; start += LANES) {
        int64_t end = start + LANES < n ? start + LANES : n;
        if (end - start == LANES && reduce_max16(load_f32(row + start)) < cutoff)
            continue;
        for (int64_t i = start; i < end; i++) {
            out[count] = row[i];
            count += row[i] >= cutoff;
        }
    }
    return count;
}

/* At most the k-th largest value: the k-th largest of the blocks' maxima, where blocks abound. */
static float bound_from_below(const float *row, int64_t n, int64_t k, float *maxima)
{
    int64_t num_blocks = n / BLOCK;
    if (4 * k > num_blocks)
        return 0.0f;
    for (int64_t block = 0; block < num_blocks; block++) {
        const float *start = row + block * BLOCK;
        f32x16 largest = load_f32(start);
        for (int64_t i = LANES; i < BLOCK; i += LANES)
            largest = max16(largest, load_f32(start + i));
        maxima[block] = reduce_max16(largest);
    }
    return select_from_top(maxima, num_blocks, (double)k, 0).value;
}

/* `scratch` is [n]. */
static void filter_row(float *row, int64_t n, int64_t k, float p, float min_p, float *scratch)
{
    if (min_p > 0.0f)
        zero_below(row, n, min_p);
    if (k <= 0 && p >= 1.0f)
        return;
    double total = 0;
    float cutoff;
    if (k > n)
        k = n;
    if (k > 0) {
        cutoff = bound_from_below(row, n, k, scratch);
    } else {
        total = sum(row, n);
        /* All weights below this sum up to less than what top-p leaves out. */
        cutoff = (float)(0.999 * (1.0 - (double)p) * total / (double)n);
    }
    int64_t count = collect(row, n, cutoff, scratch);
    float floor = 0.0f;
    if (k > 0) {
        struct selection kth = select_from_top(scratch, count, (double)k, 0);
        floor = kth.value;
        total = kth.mass_above + ((double)k - kth.count_above) * (double)kth.value;
    }
    if (p < 1.0f) {
        struct selection pth = select_from_top(scratch, count, (double)p * total, 1);
        floor = pth.value > floor ? pth.value : floor;
    }
    zero_below(row, n, floor);
}

/* Returns 0 if there's no memory. */
int tandem_filter_weights_f32(const struct filter_weights_args *args)
{
    const struct filter_weights_args a = *args;
    int succeeded = 1;
#pragma omp parallel num_threads((int)a.num_threads) if (a.rows > 1) reduction(&& : succeeded)
    {
        float *scratch = malloc(sizeof(float) * (size_t)(a.n + LANES));
        succeeded = scratch != NULL;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a.rows; i++)
            if (scratch)
                filter_row(a.weights + i * a.n, a.n, a.top_k[i], a.top_p[i],
                           a.min_p ? a.min_p[i] : 0.0f, scratch);
        free(scratch);
    }
    return succeeded;
}

static void penalize_row(float *restrict scores, const int32_t *restrict counts,
                         const uint8_t *restrict in_prompt, int64_t n, float repetition,
                         float presence, float frequency)
{
    float inverse = 1.0f / repetition;
    for (int64_t i = 0; i < n; i++) {
        int32_t count = counts[i];
        int32_t in_output = count > 0;
        float score = scores[i];
        float factor = score > 0.0f ? inverse : repetition;
        factor = in_output | in_prompt[i] ? factor : 1.0f;
        scores[i] = score * factor - frequency * (float)count - presence * (float)in_output;
    }
}

int tandem_penalize_f32(const struct penalize_args *args)
{
    const struct penalize_args a = *args;
#pragma omp parallel for num_threads((int)a.num_threads) if (a.rows > 1)
    for (int64_t i = 0; i < a.rows; i++)
        penalize_row(a.scores + a.places[i] * a.score_stride, a.output_counts + a.slots[i] * a.n,
                     a.in_prompt + a.slots[i] * a.n, a.n, a.repetition[i], a.presence[i],
                     a.frequency[i]);
    return 1;
}

static void rule_out_row(float *restrict scores, const uint32_t *restrict allowed, int64_t n,
                         int64_t words)
{
    for (int64_t w = 0; w < words && 32 * w < n; w++) {
        uint32_t bits = allowed[w];
        int64_t count = n - 32 * w < 32 ? n - 32 * w : 32;
        float *s = scores + 32 * w;
        if (bits == UINT32_MAX)
            continue;
        for (int64_t i = 0; i < count; i++)
            s[i] = bits >> i & 1 ? s[i] : -INFINITY;
    }
    for (int64_t i = 32 * words; i < n; i++)
        scores[i] = -INFINITY;
}

int tandem_rule_out_f32(const struct rule_out_args *args)
{
    const struct rule_out_args a = *args;
#pragma omp parallel for num_threads((int)a.num_threads) if (a.rows > 1)
    for (int64_t i = 0; i < a.rows; i++)
        rule_out_row(a.scores + a.places[i] * a.score_stride, a.allowed + i * a.words, a.n,
                     a.words);
    return 1;
}
