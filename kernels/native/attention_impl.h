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
    struct state part, total;
};

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
    TAKE(part, float, state_floats(args));
    TAKE(total, float, state_floats(args));
#undef TAKE
    scratch->part = state_at(args, part);
    scratch->total = state_at(args, total);
    return offset;
}

/* Where the `count` tokens from `token` on have their K. */
static void NAME(find_rows)(const struct paged_attention_args *args, const struct item *item,
                            int64_t token, int64_t count, const T **rows)
{
    const int32_t *table = args->block_tables + item->seq * args->max_blocks;
    const T *pool = (const T *)args->pool + item->kv_head * args->block_size * args->head_dim;
    int64_t block = token / args->block_size, offset = token % args->block_size;
    for (int64_t i = 0; i < count; block++, offset = 0) {
        const T *row = pool + table[block] * args->block_stride + offset * args->head_dim;
        for (; offset < args->block_size && i < count; offset++, row += args->head_dim)
            rows[i++] = row;
    }
}

/* 16 words of a row from word `first` on; zeros past head_dim. */
INLINE i32x16 NAME(load_words)(const T *row, int64_t first, int64_t head_dim)
{
    int64_t left = head_dim - first * ELEMENTS;
#if ELEMENTS == 2
    i32x16 words = {0};
    if (left >= 2 * LANES)
        memcpy(&words, row + first * 2, sizeof words);
    else
        memcpy(&words, row + first * 2, (size_t)left * sizeof(T));
    return words;
#else
    return (i32x16)(left >= LANES ? LOAD(row + first) : LOAD_PART(row + first, left));
#endif
}

/* Fills `keys` from `count` rows, up to a multiple of 16 with zeros. */
static void NAME(pack_keys)(const struct paged_attention_args *args, const T *const *rows,
                            int64_t count, int64_t value_offset, WORD *keys)
{
    int64_t words = NAME(words)(args), head_dim = args->head_dim;
    for (int64_t token = 0; token < count; token += LANES) {
        WORD *to = keys + token / PANEL * words * PANEL + token % PANEL;
        int64_t here = count - token < LANES ? count - token : LANES;
        /* V is needed next, and its blocks are too short for the CPU to foresee. */
        for (int64_t i = 0; i < here; i++)
            for (int64_t d = 0; d < head_dim; d += 64 / (int64_t)sizeof(T))
                PREFETCH(rows[token + i] + value_offset + d);
        for (int64_t word = 0; word < words; word += LANES) {
            i32x16 x[LANES];
            for (int i = 0; i < LANES; i++)
                x[i] = i < here ? NAME(load_words)(rows[token + i], word, head_dim) : (i32x16){0};
            transpose16(x);
            for (int i = 0; i < LANES && word + i < words; i++)
                memcpy(to + (word + i) * PANEL, &x[i], sizeof x[i]);
        }
    }
}

/* Fills `values` from `count` rows of V, up to a whole panel of tokens with zeros. */
static void NAME(pack_values)(const struct paged_attention_args *args, const T *const *rows,
                              int64_t count, int64_t value_offset, WORD *values)
{
    int64_t head_dim = args->head_dim, padded = (count + PANEL - 1) / PANEL * PANEL;
    for (int64_t d = 0; d < head_dim; d += PANEL) {
        WORD *to = values + d * (TILE / ELEMENTS);
        for (int64_t token = 0; token < padded; token += ELEMENTS, to += PANEL) {
            i32x16 left = {0}, right = {0};
#if ELEMENTS == 2
            i32x16 even = {0}, odd = {0};
            if (token < count)
                even = NAME(load_words)(rows[token] + value_offset, d / 2, head_dim);
            if (token + 1 < count)
                odd = NAME(load_words)(rows[token + 1] + value_offset, d / 2, head_dim);
            /* Word i of `even` holds dimensions 2i and 2i + 1 of one token; a word of V holds one
             * dimension of two tokens. */
            const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41,
                                                 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2,
                                                 33, 1, 32, 0);
            const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
            left = (i32x16)_mm512_permutex2var_epi16((__m512i)even, low, (__m512i)odd);
            right = (i32x16)_mm512_permutex2var_epi16((__m512i)even, high, (__m512i)odd);
#else
            if (token < count) {
                left = NAME(load_words)(rows[token] + value_offset, d, head_dim);
                if (d + LANES < head_dim)
                    right = NAME(load_words)(rows[token] + value_offset, d + LANES, head_dim);
            }
#endif
            memcpy(to, &left, sizeof left);
            memcpy(to + LANES, &right, sizeof right);
        }
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
    MULTIPLY(rows, words, queries, rows, 1, keys, sums, (const char *)keys, 0);
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
    MULTIPLY(rows, steps, weights, 1, TILE / ELEMENTS, values, sums, (const char *)values, 0);
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
    int64_t chunk = args->query_starts[item->seq + 1] - args->query_starts[item->seq];
    int64_t position = args->kv_lens[item->seq] - chunk + item->first_query;
    int64_t newest = position + (first_row + rows - 1) / group - token;
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
        int64_t last = position + (first_row + i) / group - token;
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

/* One span's softmax into scratch->part. */
static void NAME(attend_span)(const struct paged_attention_args *args, const struct item *item,
                              int64_t span, const struct NAME(scratch) *scratch)
{
    int64_t rows = args->num_heads / args->num_kv_heads * item->num_queries;
    int64_t tiles = (rows + MAX_TILE_ROWS - 1) / MAX_TILE_ROWS;
    int64_t chunk = args->query_starts[item->seq + 1] - args->query_starts[item->seq];
    int64_t position = args->kv_lens[item->seq] - chunk + item->first_query;
    int64_t end = position + item->num_queries, oldest = position - args->window + 1;
    int64_t value_offset = args->num_kv_heads * args->block_size * args->head_dim;
    end = end < (span + 1) * SPAN ? end : (span + 1) * SPAN;
    clear_state(&scratch->part, rows, padded_dim(args));
    for (int64_t token = span * SPAN; token < end; token += TILE) {
        if (token + TILE <= oldest)
            continue; /* behind every query's window */
        int64_t count = end - token < TILE ? end - token : TILE;
        const T *key_rows[TILE];
        NAME(find_rows)(args, item, token, count, key_rows);
        NAME(pack_keys)(args, key_rows, count, value_offset, scratch->keys);
        NAME(pack_values)(args, key_rows, count, value_offset, scratch->values);
        for (int64_t tile = 0; tile < tiles; tile++) {
            int64_t first = rows * tile / tiles, last = rows * (tile + 1) / tiles;
            NAME(attend_rows)(args, item, scratch, token, first, last - first);
        }
    }
}

/* All of an item's spans, into `total`. */
static void NAME(attend_item)(const struct paged_attention_args *args, const struct item *item,
                              const struct NAME(scratch) *scratch, const struct state *total)
{
    int64_t rows = args->num_heads / args->num_kv_heads * item->num_queries;
    NAME(pack_queries)(args, item, scratch->queries);
    clear_state(total, rows, padded_dim(args));
    for (int32_t span = item->first_span; span < item->first_span + item->num_spans; span++) {
        NAME(attend_span)(args, item, span, scratch);
        merge_state(total, &scratch->part, rows, padded_dim(args));
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
        float norm = 1.0f / total->sum[row];
        int64_t d = 0;
        for (; d + LANES <= head_dim; d += LANES)
            STORE(out + d, load_f32(from + d) * norm);
        if (d < head_dim)
            STORE_PART(out + d, load_f32(from + d) * norm, head_dim - d);
    }
}

/* Returns 0 if memory ran out, else 1. */
int NAME(tandem_paged_attention)(const struct paged_attention_args *args)
{
    /* Few items leave threads without work, so long sequences are shared; how makes no difference
     * to the result. */
    int split = list_items(args, 0, NULL) < 4 * args->num_threads && args->num_threads > 1 &&
                args->max_kv_len > SPAN;
    int64_t num_items = list_items(args, split, NULL);
    struct NAME(scratch) scratch;
    int64_t items_bytes = aligned(num_items * (int64_t)sizeof(struct item));
    int64_t state_bytes = aligned(state_floats(args) * (int64_t)sizeof(float));
    int64_t states_bytes = split ? num_items * state_bytes : 0;
    int64_t scratch_bytes = NAME(lay_out)(args, NULL, &scratch);
    char *memory = workspace(items_bytes + states_bytes + args->num_threads * scratch_bytes);
    if (!memory)
        return 0;
    struct item *items = (struct item *)memory;
    char *states = memory + items_bytes;
    list_items(args, split, items);
#pragma omp parallel num_threads((int)args->num_threads) private(scratch)
    {
        NAME(lay_out)(args, states + states_bytes + omp_get_thread_num() * scratch_bytes, &scratch);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < num_items; i++) {
            if (split) {
                struct state total = state_at(args, (float *)(states + i * state_bytes));
                NAME(attend_item)(args, &items[i], &scratch, &total);
            } else {
                NAME(attend_item)(args, &items[i], &scratch, &scratch.total);
                NAME(write_output)(args, &items[i], &scratch.total);
            }
        }
        if (split) {
#pragma omp for schedule(dynamic)
            for (int64_t i = 0; i < num_items; i++) {
                int64_t rows = args->num_heads / args->num_kv_heads * items[i].num_queries;
                if (!items[i].num_parts)
                    continue;
                struct state total = state_at(args, (float *)(states + i * state_bytes));
                for (int64_t part = 1; part < items[i].num_parts; part++) {
                    struct state next = state_at(args, (float *)(states + (i + part) * state_bytes));
                    merge_state(&total, &next, rows, padded_dim(args));
                }
                NAME(write_output)(args, &items[i], &total);
            }
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
