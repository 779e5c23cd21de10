/* Causal attention over the paged KV pool, flash style (arXiv:2205.14135): online softmax over
 * tiles of 128 tokens that are read block by block from where they lie.
 *
 * - An item of work is some queries of one sequence times the query heads that share a KV head;
 *   its rows are (query, head) pairs, at most 96, so that one packing of a tile of K and V serves
 *   them all. A decode row is the same with one query.
 * - Tiles and spans of 512 tokens lie at absolute positions, each span has a softmax of its own,
 *   and spans are merged in order. Whether threads share a sequence's spans or one takes them all
 *   makes no difference to the bit, nor does the rest of the batch, nor how a prompt is cut: a
 *   masked token adds exact zeros.
 * - Keys and values of 8 bits are widened to the queries' type a tile at a time, without loss.
 * - Sums are float32. With bfloat16 and AVX512-BF16, probabilities are rounded to bfloat16 before
 *   they multiply V, as flash attention does on other devices; else they stay float32.
 */
#include <omp.h>
#include <stdlib.h>

#include "fp8.h"
#include "shares.h"
#include "tiles.h"

#define TILE 128       /* tokens */
#define SPAN (4 * TILE)
#define MAX_ROWS 96    /* of an item, unless one query alone has more heads */
#define ALIGNMENT 64

struct paged_attention_args {
    const void *q; /* [num_tokens, num_heads, head_dim] */
    void *out;     /* the same, contiguous */
    const void *pool; /* K of block 0 in this layer; V lies num_kv_heads * block_size rows later */
    const int32_t *query_starts; /* [num_seqs + 1] */
    const int32_t *kv_lens;      /* [num_seqs] */
    const int32_t *block_tables; /* [num_seqs, max_blocks] */
    int64_t num_seqs, max_blocks, num_heads, num_kv_heads, head_dim, block_size;
    int64_t q_stride, block_stride; /* elements from token to token, from block to block */
    int64_t window, max_kv_len;     /* window: tokens seen, the query's own included */
    int64_t kv_format, num_threads; /* kv_format: of the pool, see fp8.h */
    double scale, softcap, v_scale; /* softcap: 0 for none; v_scale: factor of the result */
};

struct item {
    int32_t seq, kv_head, first_query, num_queries; /* queries count from the chunk's first */
    int32_t position;   /* of the first query */
    int32_t first, end; /* tokens to attend to, from the start of a tile on */
    int32_t num_parts;  /* items that share these queries, if this is the first of them; else 0 */
};

struct work {
    struct item *items;
    int64_t num_items;
    struct share *shares;
    float *states; /* of each item, if items share queries; else NULL */
    int64_t state_floats;
};

/* What a softmax over part of the tokens leaves: scores' maximum, sum of exponentials, and
 * unnormalised output, for each row. */
struct state {
    float *maximum, *sum, *out; /* [rows], [rows], [rows][padded_dim] */
};

static int64_t padded_dim(const struct paged_attention_args *args)
{
    return (args->head_dim + PANEL - 1) / PANEL * PANEL;
}

/* Of any item, in whole vectors. */
static int64_t max_rows(const struct paged_attention_args *args)
{
    int64_t group = args->num_heads / args->num_kv_heads;
    return group > MAX_ROWS ? (group + LANES - 1) / LANES * LANES : MAX_ROWS;
}

static struct state state_at(const struct paged_attention_args *args, float *memory)
{
    int64_t rows = max_rows(args);
    return (struct state){memory, memory + rows, memory + 2 * rows};
}

static void clear_state(const struct state *state, int64_t rows, int64_t dim)
{
    for (int64_t i = 0; i < rows; i++) {
        state->maximum[i] = -INFINITY;
        state->sum[i] = 0.0f;
    }
    memset(state->out, 0, (size_t)(rows * dim) * sizeof(float));
}

/* -inf, where no token was visible, would make NaN of the difference of two maxima. */
INLINE float or_zero(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

INLINE float exp1(float x) { return exp16(splat(x))[0]; }

/* Merges the softmax over later tokens into the one over earlier tokens. */
static void merge_state(const struct state *total, const struct state *part, int64_t rows,
                        int64_t dim)
{
    for (int64_t i = 0; i < rows; i++) {
        float a = total->maximum[i], b = part->maximum[i], maximum = a > b ? a : b;
        float keep = exp1(a - or_zero(maximum)), add = exp1(b - or_zero(maximum));
        total->maximum[i] = maximum;
        total->sum[i] = total->sum[i] * keep + part->sum[i] * add;
        float *to = total->out + i * dim;
        const float *from = part->out + i * dim;
        for (int64_t d = 0; d < dim; d += LANES)
            store_f32(to + d, load_f32(to + d) * keep + load_f32(from + d) * add);
    }
}

/* Lists the items of `taken` queries of a sequence; `items` NULL only counts them. */
static int64_t list_queries(const struct paged_attention_args *args, int32_t seq,
                            int32_t first_query, int32_t taken, int split, struct item *items)
{
    int32_t length = args->query_starts[seq + 1] - args->query_starts[seq];
    int32_t position = args->kv_lens[seq] - length + first_query, end = position + taken;
    int64_t oldest = position - args->window + 1;
    int32_t first = oldest > 0 ? (int32_t)(oldest / TILE * TILE) : 0;
    int32_t parts = split ? (end - 1) / SPAN - first / SPAN + 1 : 1;
    for (int64_t i = 0; items && i < args->num_kv_heads * parts; i++) {
        int32_t part = (int32_t)(i % parts), span = first / SPAN + part;
        items[i] = (struct item){
            .seq = seq,
            .kv_head = (int32_t)(i / parts),
            .first_query = first_query,
            .num_queries = taken,
            .position = position,
            .first = part ? span * SPAN : first,
            .end = part < parts - 1 ? (span + 1) * SPAN : end,
            .num_parts = part ? 0 : parts,
        };
    }
    return args->num_kv_heads * parts;
}

/* Lists all items, or only counts them. `split` makes one of every span. */
static int64_t list_items(const struct paged_attention_args *args, int split, struct item *items)
{
    int64_t group = args->num_heads / args->num_kv_heads, count = 0;
    int32_t queries = group < MAX_ROWS ? (int32_t)(MAX_ROWS / group) : 1;
    for (int32_t seq = 0; seq < args->num_seqs; seq++) {
        int32_t length = args->query_starts[seq + 1] - args->query_starts[seq];
        /* Later queries see more tokens: the longest work goes first. */
        for (int32_t first = (length - 1) / queries * queries; first >= 0; first -= queries) {
            int32_t taken = length - first < queries ? length - first : queries;
            count += list_queries(args, seq, first, taken, split, items ? items + count : NULL);
        }
    }
    return count;
}

/* Grows and never shrinks; one for each calling thread, shared by the team it starts. */
static void *workspace(int64_t bytes)
{
    static _Thread_local void *buffer;
    static _Thread_local int64_t capacity;
    if (bytes > capacity) {
        free(buffer);
        capacity = (bytes + 4095) / 4096 * 4096;
        buffer = aligned_alloc(ALIGNMENT, (size_t)capacity);
        if (!buffer)
            capacity = 0;
    }
    return buffer;
}

static int64_t aligned(int64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Fills `work`; returns `scratch_bytes` of memory for the threads, NULL if there's none. */
static void *plan_work(const struct paged_attention_args *args, int64_t scratch_bytes,
                       struct work *work)
{
    /* Few items leave threads without work, so long sequences are shared. */
    int split = args->num_threads > 1 && args->max_kv_len > SPAN &&
                list_items(args, 0, NULL) < 4 * args->num_threads;
    work->num_items = list_items(args, split, NULL);
    work->state_floats = aligned(max_rows(args) * (padded_dim(args) + 2));
    int64_t items_bytes = aligned(work->num_items * (int64_t)sizeof(struct item));
    int64_t states_bytes =
        split ? work->num_items * work->state_floats * (int64_t)sizeof(float) : 0;
    char *memory = workspace(items_bytes + states_bytes + scratch_bytes);
    if (!memory)
        return NULL;
    work->items = (struct item *)memory;
    work->states = split ? (float *)(memory + items_bytes) : NULL;
    list_items(args, split, work->items);
    deal_shares(work->shares, args->num_threads, work->num_items);
    return memory + items_bytes + states_bytes;
}

/* Transposes 16 vectors of 16 words in place. */
INLINE void transpose16(i32x16 x[LANES])
{
    i32x16 y[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES; i += 2) {
        y[i] = SHUFFLE(i32x16, x[i], x[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28,
                       13, 29);
        y[i + 1] = SHUFFLE(i32x16, x[i], x[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14,
                           30, 15, 31);
    }
#pragma GCC unroll 4
    for (int i = 0; i < LANES; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            x[i + 2 * j] = SHUFFLE(i32x16, y[i + j], y[i + 2 + j], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9,
                                   24, 25, 12, 13, 28, 29);
            x[i + 2 * j + 1] = SHUFFLE(i32x16, y[i + j], y[i + 2 + j], 2, 3, 18, 19, 6, 7, 22, 23,
                                       10, 11, 26, 27, 14, 15, 30, 31);
        }
    /* Now lane group g of x[4 * r + j] is column 4 * g + j of rows 4 * r to 4 * r + 3. */
#define EVEN(a, b) \
    SHUFFLE(i32x16, a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ODD(a, b) \
    SHUFFLE(i32x16, a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        i32x16 even_top = EVEN(x[j], x[4 + j]), even_bottom = EVEN(x[8 + j], x[12 + j]);
        i32x16 odd_top = ODD(x[j], x[4 + j]), odd_bottom = ODD(x[8 + j], x[12 + j]);
        y[j] = EVEN(even_top, even_bottom);
        y[8 + j] = ODD(even_top, even_bottom);
        y[4 + j] = EVEN(odd_top, odd_bottom);
        y[12 + j] = ODD(odd_top, odd_bottom);
    }
#undef EVEN
#undef ODD
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        x[i] = y[i];
}

#define T float
#define WORD float
#define ELEMENTS 1
#define NAME(base) base##_f32
#define LOAD load_f32
#define LOAD_PART load_f32_part
#define STORE store_f32
#define STORE_PART store_f32_part
#define TO_F32(x) (x)
#define MULTIPLY multiply_tile_f32
#include "attention_impl.h"

#define T bf16
#define NAME(base) base##_bf16
#define LOAD load_bf16
#define LOAD_PART load_bf16_part
#define STORE store_bf16
#define STORE_PART store_bf16_part
#define TO_F32 bf16_to_f32
#ifdef __AVX512BF16__
#define WORD int32_t
#define ELEMENTS 2
#define MULTIPLY multiply_tile_bf16
#else
#define WORD float
#define ELEMENTS 1
#define MULTIPLY multiply_tile_f32
#endif
#include "attention_impl.h"
