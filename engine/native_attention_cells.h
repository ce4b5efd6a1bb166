/* Attention in fp32 or in pairs of bf16: a chunk's keys, then its values. */

#define KEYS_AHEAD 32 /* keys that are fetched before they are needed */
#define ALONE ROWS    /* query rows that attend without panels */

/* Have LANES rows of keys or values on their way. */
static INLINE void fetch(const Kept *buffer, const int32_t *rows, long k, long count, long size) {
    for (long i = k; i < k + LANES; i++)
        for (long at = 0; at < size; at += 64 / (long)sizeof(Kept))
            _mm_prefetch((const char *)(buffer + rows[least(i, count - 1)] * size + at), _MM_HINT_T0);
}

/* LANES keys' words from the w-th on, one below the other; zeros behind the last key. */
static INLINE void words_of(const Kept *keys, const int32_t *rows, long count, long size, long w, Vector *block) {
    for (int i = 0; i < LANES; i++) block[i] = word_of(keys, rows, i, count, size, w);
    transpose(block);
}

/* PANEL columns of values as cells, `left` of them there: paired those of two keys (the other may be missing). */
static INLINE void columns_of(const Kept *one, const Kept *other, long left, Vector *low, Vector *high) {
#if PAIRED
    __mmask32 mask = left < 32 ? (1u << left) - 1 : ~0u;
    __m512i a = _mm512_maskz_loadu_epi16(mask, one);
    __m512i b = other ? _mm512_maskz_loadu_epi16(mask, other) : _mm512_setzero_si512();
    const __m512i first = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5,
                                           36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    *low = (Vector)_mm512_permutex2var_epi16(a, first, b);
    *high = (Vector)_mm512_permutex2var_epi16(a, _mm512_add_epi16(first, _mm512_set1_epi16(16)), b);
#else
    (void)other;
    *low = kept_at(one, left);
    *high = left > LANES ? kept_at(one + LANES, left - LANES) : V(setzero)();
#endif
}

static INLINE const Kept *other_of(const Kept *values, const int32_t *rows, long k, long count, long size) {
    return PAIR == 2 && k + 1 < count ? values + rows[k + 1] * size : 0;
}

/* Keys [*, size] as panels of keys: their cells one below the other. */
static INLINE void pack_keys(const Kept *keys, const int32_t *rows, long count, long size, float *panels) {
    long cells = size / PAIR;
    for (long k = 0; k < count; k += LANES) {
        float *to = panels + k / PANEL * PANEL * cells + k % PANEL;
        fetch(keys, rows, k + KEYS_AHEAD, count, size);
        for (long c = 0; c < cells; c += LANES * A_WORD) {
            Vector block[LANES];
            words_of(keys, rows + k, count - k, size, c / A_WORD, block);
            for (int i = 0; i < LANES * A_WORD && c + i < cells; i++)
                V(storeu)(to + (c + i) * PANEL, cell_of(block[i / A_WORD], i % A_WORD));
        }
    }
}

/* Values [*, size] as panels of columns: a cell is a value, paired that of a key and of the next. */
static INLINE void pack_values(const Kept *values, const int32_t *rows, long count, long size, float *panels) {
    for (long column = 0; column < size; column += PANEL)
        for (long k = 0; k < count; k += PAIR, panels += PANEL) {
            const Kept *other = other_of(values, rows, k, count, size);
            Vector low, high;
            columns_of(values + rows[k] * size + column, other ? other + column : 0, size - column, &low, &high);
            V(storeu)(panels, low);
            V(storeu)(panels + LANES, high);
        }
}

/* For a row or a few panels are not worth making: the same sums in the same order without them. */
static INLINE void score_few(int R, const Kept *keys, const Kept *values, const int32_t *rows, long count, long size,
                             const float *query, float *scores) {
    long cells = size / PAIR;
    for (long k = 0; k < count; k += LANES) {
        Vector sums[ALONE];
        UNROLL for (int r = 0; r < R; r++) sums[r] = V(setzero)();
        fetch(keys, rows, k + KEYS_AHEAD, count, size);
        fetch(values, rows, k, count, size); /* they are wanted when all keys are done */
        for (long c = 0; c < cells; c += LANES * A_WORD) {
            Vector block[LANES];
            words_of(keys, rows + k, count - k, size, c / A_WORD, block);
            UNROLL for (int i = 0; i < LANES * A_WORD; i++)
                if (c + i < cells) {
                    Vector cell = cell_of(block[i / A_WORD], i % A_WORD);
                    UNROLL for (int r = 0; r < R; r++) sums[r] = dot(sums[r], V(set1)(query[r * cells + c + i]), cell);
                }
        }
        UNROLL for (int r = 0; r < R; r++) V(storeu)(scores + r * CHUNK + k, sums[r]);
    }
}

/* Have a share of the next keys on their way, while nothing else is fetched: the part `done` of `of`. */
static INLINE void fetch_soon(const Attention *a, long done, long of) {
    for (long line = a->lines * done / of; line < a->lines * (done + 1) / of; line++)
        _mm_prefetch(a->soon + 64 * line, _MM_HINT_T1);
}

static void soften(float *scores, long padded, float *sum, float *most) {
    Vector largest[2] = {V(loadu)(scores), V(loadu)(scores + LANES)}, total[2] = {V(setzero)(), V(setzero)()};
    for (long k = PANEL; k < padded; k += PANEL)
        for (int i = 0; i < 2; i++) largest[i] = V(max)(largest[i], V(loadu)(scores + k + i * LANES));
    *most = largest_of(V(max)(largest[0], largest[1]));
    Vector shift = V(set1)(*most == -INFINITY ? 0.0f : *most);
    for (long k = 0; k < padded; k += PANEL)
        for (int i = 0; i < 2; i++) { /* so that neither waits for the other */
            Vector score = V(loadu)(scores + k + i * LANES);
            Vector weight = where_seen(score, exponential(V(sub)(score, shift))); /* unseen: 0 */
            put((Number *)scores + k + i * LANES, weight);
            total[i] = V(add)(total[i], weight);
        }
    *sum = sum_of(V(add)(total[0], total[1]));
}

static INLINE void weigh_few(int R, long size, const Attention *a) {
    const Kept *values = a->values;
    const int32_t *rows = a->seen;
    const float *weights = a->scores;
    float *out = a->part;
    long count = a->count, stride = a->stride;
    const int span = R <= ALONE / 2 ? LANES / 8 : 1; /* panels of columns at once: as the registers allow */
    for (long column = 0; column < size; column += span * PANEL) {
        Vector sums[ALONE][LANES / 4];
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < 2 * span; v++) sums[r][v] = V(setzero)();
        for (long k = 0; k < count; k += PAIR) {
            if (column == 0) fetch_soon(a, k / PAIR, up(count, PAIR));
            const Kept *one = values + rows[k] * size, *other = other_of(values, rows, k, count, size);
            UNROLL for (int p = 0; p < span; p++) {
                long at = column + p * PANEL;
                if (at >= size) break;
                Vector low, high;
                columns_of(one + at, other ? other + at : 0, size - at, &low, &high);
                UNROLL for (int r = 0; r < R; r++) {
                    Vector weight = V(set1)(weights[r * CHUNK + k / PAIR]);
                    sums[r][2 * p] = dot(sums[r][2 * p], weight, low);
                    sums[r][2 * p + 1] = dot(sums[r][2 * p + 1], weight, high);
                }
            }
        }
        UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < 2 * span; v++)
            if (column + v * LANES < size) V(storeu)(out + r * stride + column + v * LANES, sums[r][v]);
    }
}

static INLINE void attend_few(int R, long size, const Attention *a, const Sight *s) {
    score_few(R, a->keys, a->values, a->seen, a->count, size, (const float *)a->query, a->scores);
    weigh_all(a, s);
    weigh_few(R, size, a);
}

/* What is read next is fetched while products are made, each a share: values before keys, the next keys before values. */
static INLINE void attend_many(long size, const Attention *a, const Sight *s, float *panels) {
    long cells = size / PAIR, pairs = up(a->count, PAIR), groups = up(a->rows, ROWS);
    const char *soon = (const char *)(a->values + a->seen[0] * size);
    long share = a->count * size * (long)sizeof(Kept) / (groups * up(a->count, PANEL));
    pack_keys(a->keys, a->seen, a->count, size, panels);
    for (long r = 0; r < a->rows; r += ROWS)
        for (long k = 0; k < a->count; k += PANEL, soon += share)
            with_cells[least(ROWS, a->rows - r)](panels + k * cells, (const float *)(a->query + r * size), cells, cells,
                                                 a->scores + r * CHUNK + k, CHUNK, 0, soon, share / cells);
    weigh_all(a, s);
    pack_values(a->values, a->seen, a->count, size, panels);
    soon = a->lines ? a->soon : (const char *)panels;
    share = 64 * a->lines / (groups * up(size, PANEL));
    for (long r = 0; r < a->rows; r += ROWS)
        for (long column = 0; column < size; column += PANEL, soon += share)
            with_cells[least(ROWS, a->rows - r)](panels + column * pairs, a->scores + r * CHUNK, CHUNK, pairs,
                                                 a->part + r * a->stride + column, a->stride, 0, soon, share / pairs);
}

#define FEW_CASE(R) case R: attend_few(R, size, a, s); break;

static INLINE void attend_sized(long size, const Attention *a, const Sight *s, float *panels) {
    switch (a->rows) {
    FEW_CASE(1) FEW_CASE(2) FEW_CASE(3) FEW_CASE(4) FEW_CASE(5) FEW_CASE(6)
#if ROWS == 14
    FEW_CASE(7) FEW_CASE(8) FEW_CASE(9) FEW_CASE(10) FEW_CASE(11) FEW_CASE(12) FEW_CASE(13) FEW_CASE(14)
#endif
    default: attend_many(size, a, s, panels);
    }
}
