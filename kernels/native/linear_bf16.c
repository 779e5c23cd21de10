/* bfloat16 linear layers over one packed weight, for any number of tokens.
 *
 * The weight is [ceil(out/32)][ceil(in/2)][32][2], padded with zeros: panels of 32 outputs, whose
 * pairs of inputs lie as VDPBF16PS wants them. A panel is one sequential stream from memory, which
 * is what decides the speed of few tokens; with many, a panel stays in the caches while tiles of up
 * to 12 tokens pass by it. Sums are float32 in one chain over `in`, so a token's result is the same
 * to the bit in any batch.
 */
#include "vec.h"

int tandem_has_bf16_dot(void)
{
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

#ifdef __AVX512BF16__
#include <omp.h>
#include <stdlib.h>

#include "shares.h"
#include "tiles.h"

#define BLOCK_BYTES (384 * 1024)  /* of packed input: fits a core's L2 beside two panels */
#define AHEAD_BYTES 256           /* ahead in a panel that is read once */
#define PARALLEL_INPUTS (1 << 14) /* pack in parallel from here on */

struct linear_args {
    const bf16 *weight; /* packed */
    const bf16 *bias;   /* [out_features] or NULL */
    const bf16 *x;      /* [num_tokens, in_features] */
    bf16 *out;          /* [num_tokens, out_features] */
    int64_t num_tokens, in_features, out_features;
    int64_t x_stride; /* elements from token to token */
    int64_t num_threads;
};

struct pack_weight_args {
    const bf16 *weight; /* [out_features, in_features], contiguous */
    bf16 *packed;
    int64_t in_features, out_features, num_threads;
};

struct packed_rows_args {
    const bf16 *packed;
    const int64_t *rows; /* [num_rows] */
    bf16 *out;           /* [num_rows, in_features] */
    int64_t num_rows, in_features, out_features, num_threads;
};

void tandem_pack_weight_bf16(const struct pack_weight_args *args)
{
    const struct pack_weight_args a = *args;
    int64_t steps = (a.in_features + 1) / 2, panels = (a.out_features + PANEL - 1) / PANEL;
#pragma omp parallel for num_threads((int)a.num_threads)
    for (int64_t panel = 0; panel < panels; panel++) {
        bf16 *to = a.packed + panel * steps * PANEL * 2;
        memset(to, 0, (size_t)(steps * PANEL * 2) * sizeof *to);
        for (int64_t column = 0; column < PANEL; column++) {
            int64_t row = panel * PANEL + column;
            for (int64_t i = 0; row < a.out_features && i < a.in_features; i++)
                to[(i / 2 * PANEL + column) * 2 + i % 2] = a.weight[row * a.in_features + i];
        }
    }
}

/* out[i] = row rows[i] of the weight as it was. Returns 0 if some rows[i] doesn't exist, else 1. */
int tandem_packed_rows_bf16(const struct packed_rows_args *args)
{
    const struct packed_rows_args a = *args;
    int64_t steps = (a.in_features + 1) / 2;
    for (int64_t i = 0; i < a.num_rows; i++)
        if (a.rows[i] < 0 || a.rows[i] >= a.out_features)
            return 0;
#pragma omp parallel for num_threads((int)a.num_threads) if (a.num_rows > 8)
    for (int64_t i = 0; i < a.num_rows; i++) {
        const bf16 *from = a.packed + (a.rows[i] / PANEL * steps * PANEL + a.rows[i] % PANEL) * 2;
        bf16 *to = a.out + i * a.in_features;
        for (int64_t k = 0; k < a.in_features / 2; k++)
            memcpy(to + 2 * k, from + k * PANEL * 2, 2 * sizeof *to);
        if (a.in_features % 2)
            to[a.in_features - 1] = from[(steps - 1) * PANEL * 2];
    }
    return 1;
}

/* A tile's rows interleaved pair by pair, [steps][rows], so that the tile reads one stream. */
static void pack_tile(const bf16 *x, int64_t x_stride, int64_t in_features, int64_t rows,
                      int32_t *packed)
{
    int64_t pairs = in_features / 2;
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *from = x + row * x_stride;
        for (int64_t k = 0; k < pairs; k++)
            memcpy(packed + k * rows + row, from + 2 * k, sizeof *packed);
        if (in_features % 2)
            packed[pairs * rows + row] = from[in_features - 1];
    }
}

struct tile_target {
    bf16 *out; /* first row, first column of the panel */
    int64_t stride;
    __mmask32 columns; /* those that exist */
    const bf16 *bias;  /* of the panel's first column, or NULL */
};

INLINE void multiply_and_store(const int rows, int64_t steps, const int32_t *a,
                               const int32_t *panel, const struct tile_target *target,
                               const char *ahead, int64_t ahead_step)
{
    f32x16 sums[MAX_TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = splat(0.0f);
    multiply_tile_bf16(rows, steps, a, rows, 1, panel, sums, ahead, ahead_step);
    f32x16 bias[2] = {splat(0.0f), splat(0.0f)};
    if (target->bias) {
        bf16 lanes[PANEL];
        _mm512_storeu_si512(lanes, _mm512_maskz_loadu_epi16(target->columns, target->bias));
        bias[0] = load_bf16(lanes);
        bias[1] = load_bf16(lanes + LANES);
    }
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        __m512bh rounded =
            _mm512_cvtne2ps_pbh((__m512)(sums[i][1] + bias[1]), (__m512)(sums[i][0] + bias[0]));
        _mm512_mask_storeu_epi16(target->out + i * target->stride, target->columns,
                                 (__m512i)rounded);
    }
}

/* Multiplies `rows` packed tokens, in `tiles` tiles, by one panel. While many tiles pass by this
 * panel, the first two fetch the next one. */
static void multiply_panel(const struct linear_args *args, const int32_t *packed, int64_t rows,
                           int64_t first_row, int64_t panel_index)
{
    int64_t steps = (args->in_features + 1) / 2, column = panel_index * PANEL;
    int64_t tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    int64_t columns = args->out_features - column;
    const int32_t *panel = (const int32_t *)args->weight + panel_index * steps * PANEL;
    struct tile_target target = {
        .stride = args->out_features,
        .columns = columns >= PANEL ? ~0u : (1u << columns) - 1,
        .bias = args->bias ? args->bias + column : NULL,
    };
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t row = rows * tile / tiles, end = rows * (tile + 1) / tiles;
        const char *ahead = (const char *)panel;
        int64_t ahead_step = 0;
        if (tiles == 1) {
            ahead += AHEAD_BYTES;
            ahead_step = PANEL * sizeof *panel;
        } else if (tile < 2) {
            ahead_step = PANEL * sizeof *panel / 2;
            ahead += steps * PANEL * (int64_t)sizeof *panel + tile * steps * ahead_step;
        }
        target.out = args->out + (first_row + row) * args->out_features + column;
        WITH_CONSTANT_ROWS(end - row, multiply_and_store, steps, packed + row * steps, panel,
                           &target, ahead, ahead_step)
    }
}

/* Grows and never shrinks; one for each calling thread, shared by the team it starts. */
static int32_t *packed_input(int64_t bytes)
{
    static _Thread_local int32_t *buffer;
    static _Thread_local int64_t capacity;
    if (bytes > capacity) {
        free(buffer);
        capacity = (bytes + 4095) / 4096 * 4096;
        buffer = aligned_alloc(64, (size_t)capacity);
        if (!buffer)
            capacity = 0;
    }
    return buffer;
}

/* Packs tile `tile` of the `rows` tokens from `first` on. */
static void pack_input(const struct linear_args *args, int64_t first, int64_t rows, int64_t tile,
                       int32_t *packed)
{
    int64_t tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    int64_t steps = (args->in_features + 1) / 2;
    int64_t row = rows * tile / tiles, end = rows * (tile + 1) / tiles;
    pack_tile(args->x + (first + row) * args->x_stride, args->x_stride, args->in_features,
              end - row, packed + row * steps);
}

static void multiply_block(const struct linear_args *args, int64_t first, int64_t rows,
                           int32_t *packed)
{
    int64_t num_threads = args->num_threads;
    int64_t tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    int pack_alone = rows * args->in_features < PARALLEL_INPUTS;
    struct share shares[num_threads];
    deal_shares(shares, num_threads, (args->out_features + PANEL - 1) / PANEL);
    for (int64_t tile = 0; pack_alone && tile < tiles; tile++)
        pack_input(args, first, rows, tile, packed);
#pragma omp parallel num_threads((int)num_threads)
    {
        if (!pack_alone) {
#pragma omp for schedule(dynamic)
            for (int64_t tile = 0; tile < tiles; tile++)
                pack_input(args, first, rows, tile, packed);
        }
        int64_t own = omp_get_thread_num(), panel;
        while ((panel = take_item(shares, num_threads, own)) >= 0)
            multiply_panel(args, packed, rows, first, panel);
    }
}

/* Returns 0 if memory ran out, else 1. */
int tandem_linear_bf16(const struct linear_args *args)
{
    int64_t steps = (args->in_features + 1) / 2;
    int64_t block = BLOCK_BYTES / (steps * 4) / MAX_TILE_ROWS * MAX_TILE_ROWS;
    block = block < MAX_TILE_ROWS ? MAX_TILE_ROWS : block;
    block = block > args->num_tokens ? args->num_tokens : block;
    int32_t *packed = packed_input(block * steps * 4);
    if (!packed && args->num_tokens)
        return 0;
    for (int64_t first = 0; first < args->num_tokens; first += block) {
        int64_t left = args->num_tokens - first;
        multiply_block(args, first, left < block ? left : block, packed);
    }
    return 1;
}
#endif
