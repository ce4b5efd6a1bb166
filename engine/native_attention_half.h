/* Attention in fp16: 64 keys at a time. */

/* bf16 as fp16: three more bits behind the point, three fewer before it. Nothing is rounded from 2^-14 on; what is less loses
up to 2^-15, and what fp16 does not hold becomes the most it does, as if bf16 ended at 65280. */
static inline __m512i halves_of(__m512i x) {
    const __m512i sign = _mm512_set1_epi16((short)0x8000), lowest = _mm512_set1_epi16((127 - 15) << 7);
    __m512i size = _mm512_subs_epu16(_mm512_andnot_si512(sign, x), lowest);
    size = _mm512_slli_epi16(_mm512_min_epu16(size, _mm512_set1_epi16((30 << 7) + 127)), 3);
    return _mm512_ternarylogic_epi32(size, x, sign, 0xf8); /* size | x & sign */
}

/* `some` panels of keys [*, size]: their numbers one below the other. */
static INLINE void pack_keys(const Kept *keys, const int32_t *rows, long count, long size, long some, Weight *panels,
                             const char *soon) {
    for (long k = 0; k < some * PANEL; k += PANEL) {
        for (long c = 0; c < size; c += 2 * LANES) {
            Vector low[LANES], high[LANES];
            for (int i = 0; i < LANES; i++) {
                low[i] = word_of(keys, rows, k + 2 * i, count, size, c / 2);
                high[i] = word_of(keys, rows, k + 2 * i + 1, count, size, c / 2);
                _mm_prefetch(soon, FETCHED);
                soon += 64;
            }
            transpose(low);
            transpose(high);
            UNROLL for (int i = 0; i < LANES; i++) { /* a word: two numbers of an even key, or of an odd one */
                __m512i even = (__m512i)low[i], odd = (__m512i)high[i], mask = _mm512_set1_epi32(0xffff);
                __m512i first = _mm512_ternarylogic_epi32(_mm512_slli_epi32(odd, 16), even, mask, 0xf8);
                __m512i second = _mm512_ternarylogic_epi32(_mm512_srli_epi32(even, 16), odd, mask, 0xf4); /* | odd & ~mask */
                _mm512_storeu_si512(panels + (c + 2 * i) * WIDE + k, halves_of(first));
                _mm512_storeu_si512(panels + (c + 2 * i + 1) * WIDE + k, halves_of(second));
            }
        }
    }
}

/* `some` panels of columns of values, for `keys` keys in whole blocks. */
static INLINE void pack_values(const Kept *values, const int32_t *rows, long count, long size, long column, long some,
                               long keys, Weight *panels, const char *soon) {
    for (long k = 0; k < keys; k++, soon += 64) {
        _mm_prefetch(soon, FETCHED);
        for (long at = 0; at < some * PANEL; at += PANEL) {
            long left = k < count ? size - column - at : 0;
            __mmask32 there = left < PANEL ? (1u << left) - 1 : ~0u;
            __m512i x = _mm512_maskz_loadu_epi16(there, values + rows[least(k, count - 1)] * size + column + at);
            _mm512_storeu_si512(panels + k * WIDE + at, halves_of(x));
        }
    }
}

/* 2^(y - power) where the score is seen, and 0; 2^f on [0, 1) as a polynomial, whose relative error is 3e-6. */
static inline Vector weight_of(Vector score, Vector y, Vector power) {
    __mmask16 seen = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
    Vector n = _mm512_floor_ps(y), f = V(sub)(y, n);
    Vector p = V(fmadd)(V(set1)(0.013534106f), f, V(set1)(0.05201158f));
    p = V(fmadd)(p, f, V(set1)(0.24144269f));
    p = V(fmadd)(p, f, V(set1)(0.69300385f));
    return _mm512_maskz_scalef_ps(seen, V(fmadd)(p, f, V(set1)(1.0000026f)), V(sub)(n, power));
}

/* Weights over a power of two of each block, because many small ones may weigh more than a large one together. */
static void soften(float *scores, long padded, float *sum, float *most) {
    Vector largest[LANES], of_blocks, total[2] = {V(setzero)(), V(setzero)()};
    float powers[LANES], scales[LANES];
    for (long b = 0; b < LANES; b++) {
        const float *own = scores + b * BLOCK;
        largest[b] = b * BLOCK < padded ? V(max)(V(loadu)(own), V(loadu)(own + LANES)) : V(set1)(-INFINITY);
    }
    transpose(largest);
    of_blocks = largest[0];
    for (int i = 1; i < LANES; i++) of_blocks = V(max)(of_blocks, largest[i]);
    *most = largest_of(of_blocks);
    const Vector log2e = V(set1)(1.44269504f);
    Vector shift = V(mul)(V(set1)(*most == -INFINITY ? 0.0f : *most), log2e);
    Vector power = _mm512_fmsub_ps(of_blocks, log2e, shift);
    power = V(add)(_mm512_max_ps(_mm512_floor_ps(power), V(set1)(-120.0f)), V(set1)(UNDER));
    V(storeu)(powers, power);
    V(storeu)(scales, _mm512_scalef_ps(V(set1)(1.0f), power));
    for (long b = padded / BLOCK - 1; b >= 0; b--) { /* from the last on: weights take more room than scores */
        Vector weight[2];
        for (int i = 0; i < 2; i++) { /* so that neither waits for the other */
            Vector score = V(loadu)(scores + b * BLOCK + i * LANES);
            weight[i] = weight_of(score, _mm512_fmsub_ps(score, log2e, shift), V(set1)(powers[b]));
            total[i] = V(fmadd)(weight[i], V(set1)(scales[b]), total[i]);
        }
        put_halves(block_at(scores, b * BLOCK), weight[0], weight[1], scales[b]);
    }
    *sum = sum_of(V(add)(total[0], total[1]));
}
_Static_assert(CHUNK == LANES * BLOCK, "a block a lane");

/* The rows of a query times panels; what is read next is fetched meanwhile, `bytes` in all. */
static INLINE void through_panels(const Attention *a, const Weight *panels, long some, const float *x, long apart, long cells,
                                  float *out, long stride, int add, const Kept *next, long bytes) {
    long groups = up(a->rows, ROWS), share = bytes / groups;
    for (long g = 0; g < groups; g++) {
        long r = a->rows * g / groups, end = a->rows * (g + 1) / groups;
        with_weights[some][end - r](panels, x + r * apart, apart, cells, out + r * stride, stride, add,
                                    (const char *)next + g * share, share / cells);
    }
}

/* Keys in scores, scores in weights, values into `part`, panels by panels. */
static INLINE void attend_sized(long size, const Attention *a, const Sight *s, float *room) {
    long cells = cells_of(size), row = row_size(size), bytes = WIDE * size * (long)sizeof(Kept);
    Weight *panels = (Weight *)room;
    for (long k = 0; k < a->count; k += WIDE) {
        const Kept *next = k + WIDE < a->count ? a->keys + a->seen[k + WIDE] * size : a->values + a->seen[0] * size;
        long some = up(least(WIDE, a->count - k), PANEL);
        pack_keys(a->keys, a->seen + k, a->count - k, size, some, panels, (const char *)next);
        through_panels(a, panels, some, a->query, row, cells, a->scores + k, SCORES, 0, next + WIDE * size / 2, bytes / 2);
    }
    weigh_all(a, s);
    for (long k = 0; k < a->count; k += WIDE) {
        const Kept *next = k + WIDE < a->count ? a->values + a->seen[k + WIDE] * size : (const Kept *)a->soon;
        long keys = up(least(WIDE, a->count - k), BLOCK) * BLOCK;
        for (long column = 0; column < size; column += WIDE) {
            long some = up(least(WIDE, size - column), PANEL);
            pack_values(a->values, a->seen + k, a->count - k, size, column, some, keys, panels,
                        (const char *)(next + column * WIDE));
            through_panels(a, panels, some, block_at(a->scores, k), SCORES, keys, a->part + column, a->stride, k > 0,
                           next + column * WIDE + WIDE * WIDE / 2, bytes / up(size, WIDE) / 2);
        }
    }
}
