/* The row-wise operations for one element type T; included by rows.c once for each. */

/* out[row] = x[row] / sqrt(mean(x[row]^2) + eps) * weight. A row's sum has 16 lanes, whatever the
 * CPU, so that results depend on nothing but the row. */
INLINE void NAME(normalise_row)(const T *x, const T *weight, T *out, int64_t n, float eps)
{
    f32x16 squares = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        f32x16 value = LOAD(x + i);
        squares += value * value;
    }
    if (i < n) {
        f32x16 value = LOAD_PART(x + i, n - i);
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(reduce_add16(squares) / (float)n + eps);
    for (i = 0; i + LANES <= n; i += LANES)
        STORE(out + i, LOAD(x + i) * scale * LOAD(weight + i));
    if (i < n)
        STORE_PART(out + i, LOAD_PART(x + i, n - i) * scale * LOAD_PART(weight + i, n - i), n - i);
}

void NAME(tandem_rms_norm)(const struct rms_norm_args *args)
{
    const struct rms_norm_args a = *args;
    const T *x = a.x, *weight = a.weight;
    T *out = a.out;
#pragma omp parallel for num_threads((int)a.num_threads) \
    if (a.outer * a.inner * a.n > PARALLEL_ELEMENTS)
    for (int64_t i = 0; i < a.outer; i++)
        for (int64_t j = 0; j < a.inner; j++)
            NAME(normalise_row)(x + i * a.outer_stride + j * a.inner_stride, weight,
                                out + (i * a.inner + j) * a.n, a.n, (float)a.eps);
}

/* residual += x, then x = norm(residual). */
void NAME(tandem_add_rms_norm)(const struct add_rms_norm_args *args)
{
    const struct add_rms_norm_args a = *args;
#pragma omp parallel for num_threads((int)a.num_threads) if (a.rows * a.n > PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < a.rows; row++) {
        T *added = (T *)a.x + row * a.n, *sum = (T *)a.residual + row * a.n;
        int64_t i = 0;
        for (; i + LANES <= a.n; i += LANES)
            STORE(sum + i, LOAD(sum + i) + LOAD(added + i));
        for (; i < a.n; i++)
            sum[i] = FROM_F32(TO_F32(sum[i]) + TO_F32(added[i]));
        NAME(normalise_row)(sum, a.weight, added, a.n, (float)a.eps);
    }
}

INLINE f32x16 NAME(gated)(f32x16 gate, f32x16 up) { return gate / (1.0f + exp16(-gate)) * up; }

/* out[row] = silu(gate_up[row, :n]) * gate_up[row, n:]. */
void NAME(tandem_silu_and_mul)(const struct silu_and_mul_args *args)
{
    const struct silu_and_mul_args a = *args;
    int64_t n = a.n;
#pragma omp parallel for num_threads((int)a.num_threads) if (a.rows * n > PARALLEL_ELEMENTS)
    for (int64_t row = 0; row < a.rows; row++) {
        const T *gate = (const T *)a.gate_up + row * 2 * n, *up = gate + n;
        T *out = (T *)a.out + row * n;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES)
            STORE(out + i, NAME(gated)(LOAD(gate + i), LOAD(up + i)));
        if (i < n)
            STORE_PART(out + i,
                       NAME(gated)(LOAD_PART(gate + i, n - i), LOAD_PART(up + i, n - i)), n - i);
    }
}

/* Rotates pairs (i, i + half) of one head, from `x` to `out`, which may be the same. */
INLINE void NAME(rotate_head)(const T *x, T *out, const float *cosines, int64_t half)
{
    const float *sines = cosines + half;
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        f32x16 first = LOAD(x + i), second = LOAD(x + half + i);
        f32x16 cosine = load_f32(cosines + i), sine = load_f32(sines + i);
        STORE(out + i, first * cosine - second * sine);
        STORE(out + half + i, second * cosine + first * sine);
    }
    for (; i < half; i++) {
        float first = TO_F32(x[i]), second = TO_F32(x[half + i]);
        out[i] = FROM_F32(first * cosines[i] - second * sines[i]);
        out[half + i] = FROM_F32(second * cosines[i] + first * sines[i]);
    }
}

/* Rotates one head in place, and turns it; rounded once. */
INLINE void NAME(rotate_and_turn_head)(T *x, const float *cosines, int64_t head_dim)
{
    float turned[head_dim];
    for (int64_t i = 0; i < head_dim; i++)
        turned[i] = TO_F32(x[i]);
    rotate_head_f32(turned, turned, cosines, head_dim / 2);
    turn_head(turned, head_dim);
    for (int64_t i = 0; i < head_dim; i++)
        x[i] = FROM_F32(turned[i]);
}

/* A token's keys and values to their slot, heads `head_stride` apart, in the pool's own type. */
INLINE void NAME(store_kv)(const struct rope_args *a, const T *k, const T *v, const float *cosines,
                           T *slot, int64_t head_stride)
{
    size_t unrotated = (size_t)(a->head_dim - 2 * a->half) * sizeof(T);
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        NAME(rotate_head)(k, slot, cosines, a->half);
        memcpy(slot + 2 * a->half, k + 2 * a->half, unrotated);
        memcpy(slot + a->num_kv_heads * head_stride, v, (size_t)a->head_dim * sizeof(T));
        k += a->head_dim, v += a->head_dim, slot += head_stride;
    }
}

/* The same for a pool of 8 bits: rounded once, from the rotated floats. */
INLINE void NAME(store_kv_fp8)(const struct rope_args *a, const T *k, const T *v,
                               const float *cosines, uint8_t *slot, int64_t head_stride)
{
    const struct fp8_format *format = &FP8_FORMATS[a->kv_format];
    float keys[a->head_dim], values[a->head_dim];
    for (int64_t head = 0; head < a->num_kv_heads; head++) {
        for (int64_t i = 0; i < a->head_dim; i++)
            keys[i] = TO_F32(k[i]), values[i] = TO_F32(v[i]);
        rotate_head_f32(keys, keys, cosines, a->half);
        if (a->turns)
            turn_head(keys, a->head_dim);
        store_fp8_row(slot, keys, a->head_dim, a->k_scale, format);
        store_fp8_row(slot + a->num_kv_heads * head_stride, values, a->head_dim, a->v_scale,
                      format);
        k += a->head_dim, v += a->head_dim, slot += head_stride;
    }
}

void NAME(tandem_rope_and_store_kv)(const struct rope_args *args)
{
    const struct rope_args a = *args;
    int64_t head_stride = a.block_size * a.head_dim;
    int64_t work = a.num_tokens * (a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
#pragma omp parallel for num_threads((int)a.num_threads) if (work > PARALLEL_ELEMENTS)
    for (int64_t token = 0; token < a.num_tokens; token++) {
        const float *cosines = a.cos_sin + a.positions[token] * a.cos_sin_stride;
        T *q = (T *)a.q + token * a.q_stride;
        const T *k = (const T *)a.k + token * a.k_stride;
        const T *v = (const T *)a.v + token * a.v_stride;
        int64_t slot = a.slots[token] / a.block_size * a.block_stride +
                       a.slots[token] % a.block_size * a.head_dim;
        for (int64_t head = 0; head < a.num_heads; head++, q += a.head_dim)
            if (a.turns)
                NAME(rotate_and_turn_head)(q, cosines, a.head_dim);
            else
                NAME(rotate_head)(q, q, cosines, a.half);
        if (a.kv_format == FORMAT_SAME)
            NAME(store_kv)(&a, k, v, cosines, (T *)a.pool + slot, head_stride);
        else
            NAME(store_kv_fp8)(&a, k, v, cosines, (uint8_t *)a.pool + slot, head_stride);
    }
}

#undef T
#undef NAME
#undef TO_F32
#undef FROM_F32
#undef LOAD
#undef STORE
#undef LOAD_PART
#undef STORE_PART
