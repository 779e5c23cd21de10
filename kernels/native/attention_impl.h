/* Attention for one element type T, included by attention.c once for each.
 *
 * A WORD is what the matrix tile multiplies: ELEMENTS neighbours in the inner dimension (a float,
 * or a pair of bfloat16). */

struct NAME(scratch) {
    WORD *keys;    /* [TILE / PANEL][words of head_dim][PANEL]: K transposed */
    WORD *values;  /* [padded_dim / PANEL][TILE / ELEMENTS][PANEL] */
    WORD *queries; /* for each group of rows [words of head_dim][rows of the group] */
    WORD *weights; /* [MAX_TILE_ROWS][TILE / ELEMENTS]: probabilities */
    float *scores; /* [MAX_TILE_ROWS][TILE] */
    T *zeros;      /* [head_dim]: stands in for tokens past the end, in the pool's type, too */
    T *wide;       /* [TILE][head_dim]: K or V of a pool of 8 bits */
    const void **wide_rows; /* [TILE]: where its rows start */
    struct state part, total;
};

/* Where a tile's tokens lie; the rest, up to a whole panel, is `zeros`. */
struct NAME(tile) {
    const void *keys[TILE], *values[TILE];
    int64_t first, count; /* tokens */
};

static int64_t NAME(kv_bytes)(const struct paged_attention_args *args, int64_t elements)
{
    return args->kv_format == FORMAT_SAME ? elements * (int64_t)sizeof(T) : elements;
}

static int64_t NAME(words)(const struct paged_attention_args *args)
{
    return (args->head_dim + ELEMENTS - 1) / ELEMENTS;
}

/* Lays a thread's scratch out from `memory` on; returns its bytes. */
static int64_t NAME(lay_out)(const struct paged_attention_args *args, char *memory,
                             struct NAME(scratch) *scratch)
{
    int64_t offset = 0, words = NAME(words)(args), dim = padded_dim(args);
#define TAKE(pointer, type, count) \
    (pointer) = (type *)(memory + offset), offset += aligned((count) * (int64_t)sizeof(type))
    float *part, *total;
    TAKE(scratch->keys, WORD, TILE * words);
    TAKE(scratch->values, WORD, dim * TILE / ELEMENTS);
    TAKE(scratch->queries, WORD, max_rows(args) * words);
    TAKE(scratch->weights, WORD, MAX_TILE_ROWS * TILE / ELEMENTS);
    TAKE(scratch->scores, float, MAX_TILE_ROWS * TILE);
    TAKE(scratch->zeros, T, args->head_dim);
    int64_t wide_tokens = args->kv_format == FORMAT_SAME ? 0 : TILE;
    TAKE(scratch->wide, T, wide_tokens * args->head_dim);
    TAKE(scratch->wide_rows, const void *, wide_tokens);
    for (int64_t i = 0; memory && i < wide_tokens; i++)
        scratch->wide_rows[i] = scratch->wide + i * args->head_dim;
    TAKE(part, float, max_rows(args) * (dim + 2));
    TAKE(total, float, max_rows(args) * (dim + 2));
#undef TAKE
    scratch->part = state_at(args, part);
    scratch->total = state_at(args, total);
    return offset;
}

static void NAME(find_tile)(const struct paged_attention_args *args, const struct item *item,
                            int64_t first, const T *zeros, struct NAME(tile) *tile)
{
    const int32_t *table = args->block_tables + item->seq * args->max_blocks;
    int64_t row_bytes = NAME(kv_bytes)(args, args->head_dim);
    int64_t head_bytes = args->block_size * row_bytes;
    int64_t block_bytes = NAME(kv_bytes)(args, args->block_stride);
    const char *pool = (const char *)args->pool + item->kv_head * head_bytes;
    int64_t block = first / args->block_size, offset = first % args->block_size;
    int64_t end = item->end < first + TILE ? item->end : first + TILE, i = 0;
    tile->first = first;
    tile->count = end - first;
    for (; i < tile->count; block++, offset = 0) {
        const char *row = pool + table[block] * block_bytes + offset * row_bytes;
        for (; offset < args->block_size && i < tile->count; offset++, i++) {
            tile->keys[i] = row;
            tile->values[i] = row + args->num_kv_heads * head_bytes;
            row += row_bytes;
        }
    }
    for (; i % PANEL; i++)
        tile->keys[i] = tile->values[i] = zeros;
}

/* `count` rows as T, where those of the pool are not. */
static const void *const *NAME(widened)(const struct paged_attention_args *args,
                                        const void *const *rows, int64_t count,
                                        const struct NAME(scratch) *scratch)
{
    if (args->kv_format == FORMAT_SAME)
        return rows;
    const struct fp8_format *format = &FP8_FORMATS[args->kv_format];
    int64_t head_dim = args->head_dim;
    for (int64_t i = 0; i < count; i++) {
        const uint8_t *from = rows[i];
        T *to = scratch->wide + i * head_dim;
        int64_t d = 0;
        for (; d + LANES <= head_dim; d += LANES)
            STORE(to + d, load_fp8(from + d, format));
        if (d < head_dim) {
            uint8_t rest[LANES] = {0};
            memcpy(rest, from + d, (size_t)(head_dim - d));
            STORE_PART(to + d, load_fp8(rest, format), head_dim - d);
        }
    }
    return scratch->wide_rows;
}

/* 16 words of a row from word `first` on; zeros past head_dim. */
INLINE i32x16 NAME(load_words)(const T *row, int64_t first, int64_t head_dim)
{
    int64_t left = head_dim - first * ELEMENTS;
#if ELEMENTS == 2
    i32x16 words = {0};
    if (left >= 2 * LANES)
        memcpy(&words, row + first * 2, sizeof words);
    else if (left > 0)
        memcpy(&words, row + first * 2, (size_t)left * sizeof(T));
    return words;
#else
    if (left >= LANES)
        return (i32x16)LOAD(row + first);
    return left > 0 ? (i32x16)LOAD_PART(row + first, left) : (i32x16){0};
#endif
}

/* Transposes 16 tokens' words `first` to `first + 15`, into rows of a panel. */
INLINE void NAME(pack_key_words)(const void *const *rows, int64_t first, int64_t head_dim,
                                 int64_t words, WORD *to)
{
    i32x16 x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        x[i] = NAME(load_words)(rows[i], first, head_dim);
    transpose16(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (first + i < words)
            memcpy(to + (first + i) * PANEL, &x[i], sizeof x[i]);
}

static void NAME(pack_keys)(const struct paged_attention_args *args, const struct NAME(tile) *tile,
                            const struct NAME(scratch) *scratch)
{
    int64_t words = NAME(words)(args), head_dim = args->head_dim;
    int64_t row_bytes = NAME(kv_bytes)(args, head_dim);
    int64_t padded = (tile->count + PANEL - 1) / PANEL * PANEL;
    const void *const *rows = NAME(widened)(args, tile->keys, padded, scratch);
    for (int64_t token = 0; token < tile->count; token += LANES) {
        WORD *to = scratch->keys + token / PANEL * words * PANEL + token % PANEL;
        /* V comes next, and its blocks are too short for the CPU to foresee. */
        for (int64_t i = 0; i < LANES; i++)
            for (int64_t at = 0; at < row_bytes; at += 64)
                PREFETCH_L2((const char *)tile->values[token + i] + at);
        int64_t word = 0;
        /* With limits that it sees are met, the compiler keeps all of it in registers. */
        for (; word + LANES <= head_dim / ELEMENTS; word += LANES)
            NAME(pack_key_words)(rows + token, word, (word + LANES) * ELEMENTS, word + LANES, to);
        if (word < words)
            NAME(pack_key_words)(rows + token, word, head_dim, words, to);
    }
}

/* Two vectors of words for dimensions `d` to `d + 31`, of the ELEMENTS tokens from `token` on. */
INLINE void NAME(pack_value_words)(const void *const *rows, int64_t d, int64_t head_dim, WORD *to)
{
#if ELEMENTS == 2
    /* Word i of a row holds dimensions 2i and 2i + 1 of a token; a word of V holds one dimension
     * of two tokens. */
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i even = (__m512i)NAME(load_words)(rows[0], d / 2, head_dim);
    __m512i odd = (__m512i)NAME(load_words)(rows[1], d / 2, head_dim);
    i32x16 left = (i32x16)_mm512_permutex2var_epi16(even, low, odd);
    i32x16 right = (i32x16)_mm512_permutex2var_epi16(even, high, odd);
#else
    i32x16 left = NAME(load_words)(rows[0], d, head_dim);
    i32x16 right = NAME(load_words)(rows[0], d + LANES, head_dim);
#endif
    memcpy(to, &left, sizeof left);
    memcpy(to + LANES, &right, sizeof right);
}

/* Also fetches the K of `next`, which may be NULL. */
static void NAME(pack_values)(const struct paged_attention_args *args,
                              const struct NAME(tile) *tile, const struct NAME(tile) *next,
                              const struct NAME(scratch) *scratch)
{
    int64_t head_dim = args->head_dim, padded = (tile->count + PANEL - 1) / PANEL * PANEL;
    int64_t row_bytes = NAME(kv_bytes)(args, head_dim);
    const void *const *rows = NAME(widened)(args, tile->values, padded, scratch);
    for (int64_t token = 0; token < padded; token += ELEMENTS) {
        WORD *to = scratch->values + token / ELEMENTS * PANEL;
        int64_t d = 0;
        for (; d + PANEL <= head_dim; d += PANEL, to += TILE / ELEMENTS * PANEL)
            NAME(pack_value_words)(rows + token, d, d + PANEL, to);
        if (d < head_dim)
            NAME(pack_value_words)(rows + token, d, head_dim, to);
        for (int64_t i = token; next && i < token + ELEMENTS && i < next->count; i++)
            for (int64_t at = 0; at < row_bytes; at += 64)
                PREFETCH_L2((const char *)next->keys[i] + at);
    }
}

/* The item's queries, group by group of rows; row i is head i % group of query i / group. */
static void NAME(pack_queries)(const struct paged_attention_args *args, const struct item *item,
                               WORD *queries)
{
    int64_t group = args->num_heads / args->num_kv_heads, rows = item->num_queries * group;
    int64_t words = NAME(words)(args), tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    const T *q = (const T *)args->q + item->kv_head * group * args->head_dim +
                 (args->query_starts[item->seq] + item->first_query) * args->q_stride;
    for (int64_t tile = 0; tile < tiles; tile++) {
        int64_t first = rows * tile / tiles, size = rows * (tile + 1) / tiles - first;
        for (int64_t i = 0; i < size; i++) {
            int64_t row = first + i;
            const T *from = q + row / group * args->q_stride + row % group * args->head_dim;
            WORD *to = queries + first * words + i;
            for (int64_t d = 0; d + ELEMENTS <= args->head_dim; d += ELEMENTS, to += size) {
#if ELEMENTS == 2
                memcpy(to, from + d, sizeof *to);
#else
                *to = TO_F32(from[d]);
#endif
            }
            if (args->head_dim % ELEMENTS)
                *to = (WORD)from[args->head_dim - 1];
        }
    }
}

INLINE void NAME(score_panel)(const int rows, int64_t words, const WORD *queries, const WORD *keys,
                              float *scores)
{
    f32x16 sums[MAX_TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++)
        sums[i][0] = sums[i][1] = splat(0.0f);
    MULTIPLY(rows, words, queries, rows, 1, keys, sums, NULL, 0);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        store_f32(scores + i * TILE, sums[i][0]);
        store_f32(scores + i * TILE + LANES, sums[i][1]);
    }
}

INLINE void NAME(weigh_panel)(const int rows, int64_t steps, const WORD *weights,
                              const WORD *values, const float *keep, float *out, int64_t dim)
{
    f32x16 sums[MAX_TILE_ROWS][2];
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        sums[i][0] = load_f32(out + i * dim) * keep[i];
        sums[i][1] = load_f32(out + i * dim + LANES) * keep[i];
    }
    MULTIPLY(rows, steps, weights, 1, TILE / ELEMENTS, values, sums, NULL, 0);
#pragma GCC unroll 12
    for (int i = 0; i < rows; i++) {
        store_f32(out + i * dim, sums[i][0]);
        store_f32(out + i * dim + LANES, sums[i][1]);
    }
}

/* Scales and masks a row's scores in place; visible are tokens `first` to `last` of the tile.
 * Returns the maximum. */
INLINE float NAME(finish_scores)(const struct paged_attention_args *args, float *scores,
                                 int64_t count, int64_t first, int64_t last)
{
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    float scale = (float)args->scale, softcap = (float)args->softcap;
    f32x16 maximum = splat(-INFINITY);
    for (int64_t i = 0; i < count; i += LANES) {
        f32x16 x = load_f32(scores + i) * scale;
        if (softcap > 0) /* softcap * tanh(x / softcap) */
            x = softcap - 2 * softcap / (exp16(x * (2 / softcap)) + 1.0f);
        if (i < first || i + LANES - 1 > last) {
            i32x16 token = lane + (int32_t)i;
            x = select16((token >= (int32_t)first) & (token <= (int32_t)last), x,
                         splat(-INFINITY));
        }
        store_f32(scores + i, x);
        maximum = max16(maximum, x);
    }
    return reduce_max16(maximum);
}

/* Turns a row's scores into weights e^(score - maximum); returns their sum. */
INLINE float NAME(exponentiate)(const float *scores, int64_t count, float maximum, WORD *weights)
{
    f32x16 sum = splat(0.0f);
    for (int64_t i = 0; i < count; i += LANES) {
        f32x16 weight = exp16(load_f32(scores + i) - maximum);
        sum += weight;
#if ELEMENTS == 2
        STORE((T *)weights + i, weight);
#else
        store_f32(weights + i, weight);
#endif
    }
    return reduce_add16(sum);
}

/* Attends rows `first_row` on, `rows` of them, to the packed tile of tokens from `token` on. */
static void NAME(attend_rows)(const struct paged_attention_args *args, const struct item *item,
                              const struct NAME(scratch) *scratch, int64_t token,
                              int64_t first_row, int64_t rows)
{
    int64_t group = args->num_heads / args->num_kv_heads, words = NAME(words)(args);
    int64_t dim = padded_dim(args);
    int64_t newest = item->position + (first_row + rows - 1) / group - token;
    if (newest < 0)
        return; /* all of the tile is in these queries' future */
    int64_t panels = newest / PANEL + 1, count;
    panels = panels > TILE / PANEL ? TILE / PANEL : panels;
    count = panels * PANEL;
    const WORD *queries = scratch->queries + first_row * words;
    for (int64_t panel = 0; panel < panels; panel++)
        WITH_CONSTANT_ROWS(rows, NAME(score_panel), words, queries,
                           scratch->keys + panel * words * PANEL, scratch->scores + panel * PANEL)
    float keep[MAX_TILE_ROWS];
    for (int64_t i = 0; i < rows; i++) {
        int64_t last = item->position + (first_row + i) / group - token;
        float *maximum = scratch->part.maximum + first_row + i;
        float *sum = scratch->part.sum + first_row + i, *scores = scratch->scores + i * TILE;
        float highest = NAME(finish_scores)(args, scores, count, last - args->window + 1, last);
        highest = highest > *maximum ? highest : *maximum;
        keep[i] = exp1(*maximum - or_zero(highest));
        *maximum = highest;
        *sum = *sum * keep[i] + NAME(exponentiate)(scores, count, or_zero(highest),
                                                   scratch->weights + i * (TILE / ELEMENTS));
    }
    for (int64_t d = 0; d < dim; d += PANEL)
        WITH_CONSTANT_ROWS(rows, NAME(weigh_panel), count / ELEMENTS, scratch->weights,
                           scratch->values + d * (TILE / ELEMENTS), keep,
                           scratch->part.out + first_row * dim + d, dim)
}

/* All of an item's tokens, into `total`. `tiles` are this thread's; the first of them is the
 * item's first tile, and in the end the first of `next_item`, which may be NULL. */
static void NAME(attend_item)(const struct paged_attention_args *args, const struct item *item,
                              const struct item *next_item, const struct NAME(scratch) *scratch,
                              struct NAME(tile) tiles[2], const struct state *total)
{
    int64_t rows = args->num_heads / args->num_kv_heads * item->num_queries;
    int64_t groups = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS, dim = padded_dim(args);
    NAME(pack_queries)(args, item, scratch->queries);
    clear_state(total, rows, dim);
    clear_state(&scratch->part, rows, dim);
    for (int64_t token = item->first; token < item->end; token += TILE) {
        struct NAME(tile) *next = &tiles[1];
        if (token + TILE < item->end)
            NAME(find_tile)(args, item, token + TILE, scratch->zeros, next);
        else if (next_item)
            NAME(find_tile)(args, next_item, next_item->first, scratch->zeros, next);
        else
            next = NULL;
        NAME(pack_keys)(args, &tiles[0], scratch);
        NAME(pack_values)(args, &tiles[0], next, scratch);
        for (int64_t i = 0; i < groups; i++) {
            int64_t first = rows * i / groups, last = rows * (i + 1) / groups;
            NAME(attend_rows)(args, item, scratch, token, first, last - first);
        }
        if ((token + TILE) % SPAN == 0 || token + TILE >= item->end) {
            merge_state(total, &scratch->part, rows, dim);
            clear_state(&scratch->part, rows, dim);
        }
        if (next)
            tiles[0] = *next;
    }
}

static void NAME(write_output)(const struct paged_attention_args *args, const struct item *item,
                               const struct state *total)
{
    int64_t group = args->num_heads / args->num_kv_heads, head_dim = args->head_dim;
    int64_t first = args->query_starts[item->seq] + item->first_query;
    for (int64_t row = 0; row < item->num_queries * group; row++) {
        T *out = (T *)args->out + ((first + row / group) * args->num_heads +
                                   item->kv_head * group + row % group) * head_dim;
        const float *from = total->out + row * padded_dim(args);
        float norm = (float)args->v_scale / total->sum[row];
        int64_t d = 0;
        for (; d + LANES <= head_dim; d += LANES)
            STORE(out + d, load_f32(from + d) * norm);
        if (d < head_dim)
            STORE_PART(out + d, load_f32(from + d) * norm, head_dim - d);
    }
}

/* Works through the items of this thread's share, then others'. */
static void NAME(attend_items)(const struct paged_attention_args *args, const struct work *work,
                               char *memory)
{
    struct NAME(scratch) scratch;
    struct NAME(tile) tiles[2];
    int64_t own = omp_get_thread_num(), found = -1, i;
    NAME(lay_out)(args, memory, &scratch);
    memset(scratch.zeros, 0, (size_t)args->head_dim * sizeof(T));
    while ((i = take_item(work->shares, args->num_threads, own)) >= 0) {
        const struct item *item = &work->items[i];
        const struct item *next = i + 1 < work->num_items ? item + 1 : NULL;
        if (found != i)
            NAME(find_tile)(args, item, item->first, scratch.zeros, &tiles[0]);
        struct state total = work->states ? state_at(args, work->states + i * work->state_floats)
                                          : scratch.total;
        NAME(attend_item)(args, item, next, &scratch, tiles, &total);
        found = i + 1;
        if (!work->states)
            NAME(write_output)(args, item, &total);
    }
}

/* Merges the parts of queries whose tokens several items shared. */
static void NAME(merge_parts)(const struct paged_attention_args *args, const struct work *work,
                              int64_t first)
{
    const struct item *item = &work->items[first];
    int64_t rows = args->num_heads / args->num_kv_heads * item->num_queries;
    struct state total = state_at(args, work->states + first * work->state_floats);
    for (int64_t part = first + 1; part < first + item->num_parts; part++) {
        struct state next = state_at(args, work->states + part * work->state_floats);
        merge_state(&total, &next, rows, padded_dim(args));
    }
    NAME(write_output)(args, item, &total);
}

/* Returns 0 if memory ran out, else 1. */
int NAME(tandem_paged_attention)(const struct paged_attention_args *args)
{
    struct NAME(scratch) scratch;
    struct share shares[args->num_threads];
    int64_t scratch_bytes = NAME(lay_out)(args, NULL, &scratch);
    struct work work = {.shares = shares};
    char *scratches = plan_work(args, args->num_threads * scratch_bytes, &work);
    if (!scratches)
        return 0;
#pragma omp parallel num_threads((int)args->num_threads)
    {
        NAME(attend_items)(args, &work, scratches + omp_get_thread_num() * scratch_bytes);
        if (work.states) {
#pragma omp barrier
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < work.num_items; i++)
                if (work.items[i].num_parts)
                    NAME(merge_parts)(args, &work, i);
        }
    }
    return 1;
}

#undef T
#undef WORD
#undef ELEMENTS
#undef NAME
#undef LOAD
#undef LOAD_PART
#undef STORE
#undef STORE_PART
#undef TO_F32
#undef MULTIPLY
