/* Vectors of numbers in fp32, and numbers as they are kept and multiplied. */

/* --- vectors --- */

#if LANES == 16

static inline Vector load_some(const float *x, long count) { /* the first `count`, and zeros */
    return _mm512_maskz_loadu_ps((__mmask16)((1u << least(count, 16)) - 1), x);
}
static inline Vector rounded(Vector x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vector times_power(Vector x, Vector n) { return _mm512_scalef_ps(x, n); } /* x 2^n */
static inline Vector where_seen(Vector score, Vector weight) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ), weight);
}

static void transpose(Vector *r) {
    Vector t[16];
    UNROLL for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        r[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
        r[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
    UNROLL for (int j = 0; j < 4; j++) { /* quarters: columns j, 4 + j, 8 + j, 12 + j of four rows each */
        Vector a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd);
        Vector c = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_f32x4(a, c, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(a, c, 0xdd);
        t[4 + j] = _mm512_shuffle_f32x4(b, d, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
    memcpy(r, t, sizeof t);
}

#else

static inline Vector load_some(const float *x, long count) { (void)count; return _mm256_loadu_ps(x); } /* sizes are whole eights */
static inline Vector rounded(Vector x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline Vector times_power(Vector x, Vector n) {
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(power));
}
static inline Vector where_seen(Vector score, Vector weight) {
    return _mm256_and_ps(_mm256_cmp_ps(score, _mm256_set1_ps(-INFINITY), _CMP_NEQ_UQ), weight);
}

static void transpose(Vector *r) {
    Vector t[8];
    UNROLL for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) UNROLL for (int j = 0; j < 2; j++) {
        __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
        r[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
        r[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
    UNROLL for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
    memcpy(r, t, sizeof t);
}

#endif

/* e^x for x <= 88, by 2^n times a polynomial. */
static inline Vector exponential(Vector x) {
    x = V(max)(x, V(set1)(-87.0f));
#if BF16 /* 2^f on [-1/2, 1/2], its coefficients by least squares of the relative error, which is 3e-6 */
    Vector y = V(mul)(x, V(set1)(1.44269504f)), n = rounded(y), f = V(sub)(y, n);
    Vector p = V(fmadd)(V(set1)(9.57009e-3f), f, V(set1)(5.591786e-2f));
    p = V(fmadd)(p, f, V(set1)(2.4024745e-1f));
    p = V(fmadd)(p, f, V(set1)(6.9312181e-1f));
    return times_power(V(fmadd)(p, f, V(set1)(9.9999926e-1f)), n);
#else /* e^r on [-ln 2 / 2, ln 2 / 2] (Cephes' expf): a relative error of 2e-7 */
    Vector n = rounded(V(mul)(x, V(set1)(1.44269504f)));
    Vector r = V(fnmadd)(n, V(set1)(0.693359375f), x);
    r = V(fnmadd)(n, V(set1)(-2.12194440e-4f), r);
    Vector p = V(set1)(1.9875691500e-4f);
    p = V(fmadd)(p, r, V(set1)(1.3981999507e-3f));
    p = V(fmadd)(p, r, V(set1)(8.3334519073e-3f));
    p = V(fmadd)(p, r, V(set1)(4.1665795894e-2f));
    p = V(fmadd)(p, r, V(set1)(1.6666665459e-1f));
    p = V(fmadd)(p, r, V(set1)(5.0000001201e-1f));
    return times_power(V(add)(V(fmadd)(p, V(mul)(r, r), r), V(set1)(1.0f)), n);
#endif
}

#if LANES == 16
static inline float sum_of(Vector x) { return _mm512_reduce_add_ps(x); }
static inline float largest_of(Vector x) { return _mm512_reduce_max_ps(x); }
#else
#define REDUCED(NAME, OP)                                                                                              \
    static inline float NAME(Vector x) {                                                                               \
        __m128 y = OP(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));                                         \
        y = OP(y, _mm_movehl_ps(y, y));                                                                                \
        return _mm_cvtss_f32(OP(y, _mm_movehdup_ps(y)));                                                               \
    }
REDUCED(sum_of, _mm_add_ps)
REDUCED(largest_of, _mm_max_ps)
#endif

/* --- numbers and cells --- */

#if LANES == 16
#define FIRST(count) ((__mmask16)((1u << least(count, 16)) - 1))
#endif
#if BF16
static inline Vector widened(__m256i x) { return (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }
static inline Vector kept_at(const Kept *x, long count) { return widened(_mm256_maskz_loadu_epi16(FIRST(count), x)); }
#else
static inline Vector kept_at(const Kept *x, long count) { return load_some(x, count); }
#endif
#if BF16 && !PAIRED
static inline __m256i narrowed(Vector x) { /* to the nearest, to even where two are; what is no number stays none */
    __m512i bits = (__m512i)x, odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i near = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    near = _mm512_mask_mov_epi32(near, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(near, 16));
}
#elif BF16
static inline __m256i narrowed(Vector x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#endif
#if BF16
static inline void keep_some(Kept *to, Vector x, long count) { _mm256_mask_storeu_epi16(to, FIRST(count), narrowed(x)); }
#endif

#if BF16 && !PAIRED
#define A_WORD 2 /* cells that four bytes of a key make */
static inline Vector cell_of(Vector word, int which) {
    __m512i bits = (__m512i)word;
    return (Vector)(which ? _mm512_and_si512(bits, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(bits, 16));
}
#else
#define A_WORD 1
static inline Vector cell_of(Vector word, int which) { return (void)which, word; }
#endif

#if PAIRED
static inline void put(Number *to, Vector x) { _mm256_storeu_si256((__m256i *)to, narrowed(x)); }
static inline void put_some(Number *to, Vector x, long count) { keep_some(to, x, count); }
static inline Vector dot(Vector sum, Vector x, Vector y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
static inline void weights_at(const Weight *panel, Vector *low, Vector *high) {
    *low = _mm512_loadu_ps(panel);
    *high = _mm512_loadu_ps(panel + LANES);
}
#else
static inline void put(Number *to, Vector x) { V(storeu)(to, x); }
static inline void put_some(Number *to, Vector x, long count) {
#if LANES == 16
    _mm512_mask_storeu_ps(to, FIRST(count), x);
#else
    (void)count;
    V(storeu)(to, x);
#endif
}
static inline Vector dot(Vector sum, Vector x, Vector y) { return V(fmadd)(x, y, sum); }
static inline void weights_at(const Weight *panel, Vector *low, Vector *high) {
#if BF16 /* each of the first half stands before one of the second */
    Vector words = _mm512_loadu_ps(panel);
    *low = cell_of(words, 0);
    *high = cell_of(words, 1);
#elif LANES == 16
    *low = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)panel));
    *high = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)panel + 1));
#else
    *low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)panel));
    *high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)panel + 1));
#endif
}
#endif
#if !BF16
static inline void keep_some(Kept *to, Vector x, long count) { put_some(to, x, count); }
#endif

static inline void cells_at(const float *panel, Vector *low, Vector *high) {
    *low = V(loadu)(panel);
    *high = V(loadu)(panel + LANES);
}

static void keep_all(Kept *to, const float *x, long count) {
    for (long i = 0; i < count; i += LANES) keep_some(to + i, load_some(x + i, count - i), count - i);
}

/* --- what goes into a product --- */

static inline long cells_of(long inputs) { return up(inputs, BLOCK) * BLOCK / PAIR; }
static inline long row_size(long inputs) { return up(inputs, BLOCK) * (BLOCK + HALF); }

#if HALF
#define UNDER 6 /* 32 products with keys or values of 65280 at most are less than 65504, the most that fp16 holds */

static inline float *block_at(Number *row, long at) { return row + at / BLOCK * (BLOCK + 1); }

/* A block: each number in fp16 twice, because four bytes are had in all lanes for nothing; then their scale. */
static inline void put_halves(float *to, Vector low, Vector high, float scale) {
    const __m512i twice = _mm512_set_epi16(15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4,
                                           3, 3, 2, 2, 1, 1, 0, 0);
    __m512i a = _mm512_castsi256_si512(_mm512_cvtps_ph(low, _MM_FROUND_TO_NEAREST_INT));
    __m512i b = _mm512_castsi256_si512(_mm512_cvtps_ph(high, _MM_FROUND_TO_NEAREST_INT));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(twice, a));
    _mm512_storeu_si512(to + LANES, _mm512_permutexvar_epi16(twice, b));
    to[BLOCK] = scale;
}

/* The same of numbers over a power of two, so that the largest is below 2^(1 - under). */
static inline void put_block(float *to, Vector low, Vector high, float under) {
    const Vector bits = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff)); /* all but the sign */
    float largest = largest_of(_mm512_max_ps(_mm512_and_ps(low, bits), _mm512_and_ps(high, bits)));
    float power = _mm_cvtss_f32(_mm_getexp_ss(_mm_setzero_ps(), _mm_set_ss(largest)));
    power = fminf(fmaxf(power, -120.0f), 120.0f) + under; /* of 0 it would be infinite */
    Vector down = _mm512_set1_ps(-power), scale = _mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_set1_ps(power));
    put_halves(to, _mm512_scalef_ps(low, down), _mm512_scalef_ps(high, down), _mm512_cvtss_f32(scale));
}

/* Numbers at .. at + PANEL of a row. */
static inline void put_inputs(Number *row, long at, Vector low, Vector high) { put_block(block_at(row, at), low, high, 0.0f); }

/* `count` numbers from `at` on, where a block begins; the last block is filled up. */
static INLINE void put_blocks(Number *row, long at, const float *x, long count, float under) {
    for (long i = 0; i < count; i += PANEL) {
        long left = count - i;
        Vector high = left > LANES ? load_some(x + i + LANES, left - LANES) : V(setzero)();
        put_block(block_at(row, at + i), load_some(x + i, left), high, under);
    }
}
static void put_row(Number *row, long at, const float *x, long count) { put_blocks(row, at, x, count, 0.0f); }
static void put_query(Number *row, const float *x, long count) { put_blocks(row, 0, x, count, UNDER); }
#else
static void put_all(Number *to, const float *x, long count) {
#if PAIRED
    for (long i = 0; i < count; i += LANES) put_some(to + i, load_some(x + i, count - i), count - i);
#else
    memcpy(to, x, count * sizeof *x);
#endif
}
static inline void put_inputs(Number *row, long at, Vector low, Vector high) {
    put(row + at, low);
    put(row + at + LANES, high);
}
static void put_row(Number *row, long at, const float *x, long count) { put_all(row + at, x, count); }
static void put_query(Number *row, const float *x, long count) { put_all(row, x, count); }
#endif
