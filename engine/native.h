/* A decoder layer: what a step on a CPU is made of. Compiled once for each kind of processor and number (native_*.c).

A step of one token streams all weights once; as separate operations it spends most of its time elsewhere (starting
hundreds of small kernels, and products that are made for many rows). Here a layer is one call: RMS norms, projections,
rotary positions, attention over what each slice sees, gated MLP. engine/native.py packs the weights and says which layers
qualify; engine/fuse.py has the same layer in torch's operations, which tests hold this one to.

In fp32 weights are fp16, everything else is fp32. In bf16 weights, keys and values are bf16; paired also what goes into a
product, which takes two at a time then; everything else is fp32. HALF is bf16 with products in fp16: what goes into a
product with weights is scaled block by block, so that the largest of a block is between 1 and 2 and nothing overflows, and
a block's sum is made in fp16 before it is added in fp32. That rounds about as much as bf16 does what goes into a product.

All products are of one kind, attention's too: rows of input times a panel. A cell is what one lane multiplies at a time: a
number, or two where products are paired. A panel is PANEL outputs side by side, for each cell of their inputs in turn:
[outputs / PANEL][cells][PANEL] (weights have WIDE in the place of PANEL). Keys and values are brought into panels chunk by chunk, on the way to the second-level cache.

A row's sums are added in the same order however many rows share the call, so a token is computed as it would be alone
(behind the branches of a tree its keys stand in other chunks, and the sums are rounded otherwise). */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL (2 * LANES) /* outputs side by side */
#if HALF
#define BLOCK PANEL /* inputs whose products are added in fp16; their scale stands behind them */
#define MANY 2      /* panels of weights that stand side by side, so that a register of each is in use */
#define AHEAD 12288 /* bytes of weights fetched before they are needed; they go by too fast for the first-level cache */
#define FETCHED _MM_HINT_T1
#else
#define BLOCK 1
#define MANY 1
#define AHEAD 6144
#define FETCHED _MM_HINT_T0
#endif
#define WIDE (MANY * PANEL) /* engine/native.py packs weights so */
#define FEW 96            /* rows whose input stays in the second-level cache while the panels pass */
#define KEYS_AHEAD 32     /* keys that are fetched before they are needed */
#define ALONE ROWS        /* query rows that attend without panels */
#define TILE 48           /* tokens that one task of attention is about */
#define CHUNK 512         /* keys that one task of attention looks at */
#define MOST 256          /* the largest size of a head */
#define UNROLL _Pragma("GCC unroll 32") /* or sums live in memory and not in registers */
#define EXPORT __attribute__((visibility("default")))
/* ROWS, from the including file: rows of input that share a pass over a panel; their sums fill the registers */

#if LANES == 16
typedef __m512 Vector;
#define V(name) _mm512_##name##_ps
#else
typedef __m256 Vector;
#define V(name) _mm256_##name##_ps
#endif

#if PAIRED
typedef uint16_t Number; /* what goes into a product; HALF: with keys or values */
typedef float Weight; /* a cell, whatever its bits mean */
#define PAIR 2
#else
typedef float Number;
typedef uint16_t Weight; /* fp16, or bf16 */
#define PAIR 1
#endif
#if BF16
typedef uint16_t Kept; /* a number of the cache */
#else
typedef float Kept;
#endif

typedef struct {
    int32_t index, hidden, heads, kv_heads, size, inner;
    float epsilon_in, epsilon_mlp, scaling;
    const float *norm_in, *norm_mlp;
    const Weight *qkv, *out, *gate_up, *down; /* panels; up's stand behind gate's */
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias; /* or null */
} Layer;

typedef struct {
    int32_t n, row, ranges, capacity, width; /* new tokens; their first row; visible ranges; rows a head; mask columns */
    const int32_t *range;                    /* from, to, from, to ... of earlier rows */
    const float *mask;                       /* [n, width], added for the last keys; null: causal among the new tokens */
    Kept *const *buffers;                    /* each layer's keys and values [kv_heads, capacity, size] */
} Slice;

#if HALF
typedef Weight Factor;
#else
typedef float Factor; /* a cell */
#endif

/* What an adapter adds to a product: the input times `down`, times `up`, both in panels; rank: in whole panels, or 0; cells:
of a column of `up`, which holds no padding beyond a cell or a block. */
typedef struct {
    int32_t rank, cells;
    const Factor *down, *up;
} LowRank;

enum { QKV, OUT, GATE_UP, DOWN, PRODUCTS };

/* Rows of a forward that an adapter acts on. */
typedef struct {
    int32_t from, to;
    const LowRank *low; /* [layers][PRODUCTS] */
} Span;

int omp_get_thread_num(void);
int omp_get_num_threads(void);

#define INLINE inline __attribute__((always_inline))

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long up(long count, long of) { return (count + of - 1) / of; }

/* --- vectors --- */

#if LANES == 16

static inline Vector some(const float *x, long count) { /* the first `count`, and zeros */
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

static inline Vector some(const float *x, long count) { (void)count; return _mm256_loadu_ps(x); } /* sizes are whole eights */
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
static inline Vector kept_at(const Kept *x, long count) { return some(x, count); }
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

static void put_all(Number *to, const float *x, long count) {
#if PAIRED
    for (long i = 0; i < count; i += LANES) put_some(to + i, some(x + i, count - i), count - i);
#else
    memcpy(to, x, count * sizeof *x);
#endif
}
static void keep_all(Kept *to, const float *x, long count) {
    for (long i = 0; i < count; i += LANES) keep_some(to + i, some(x + i, count - i), count - i);
}

/* --- what goes into a product with weights --- */

static inline long cells_of(long inputs) { return up(inputs, BLOCK) * BLOCK / PAIR; }
static inline long row_size(long inputs) { return up(inputs, BLOCK) * (BLOCK + HALF); }

#if HALF
/* A block: each number in fp16 twice, because four bytes are had in all lanes for nothing; then their scale. */
static inline void put_block(float *to, Vector low, Vector high) {
    const Vector unsigned_ = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fffffff));
    float largest = largest_of(_mm512_max_ps(_mm512_and_ps(low, unsigned_), _mm512_and_ps(high, unsigned_)));
    float power = fminf(fmaxf(_mm_cvtss_f32(_mm_getexp_ss(_mm_setzero_ps(), _mm_set_ss(largest))), -100.0f), 100.0f);
    Vector down = _mm512_set1_ps(-power);
    Vector part[2] = {low, high};
    for (int i = 0; i < 2; i++) {
        __m512i half = _mm512_cvtepu16_epi32(_mm512_cvtps_ph(_mm512_scalef_ps(part[i], down), _MM_FROUND_TO_NEAREST_INT));
        _mm512_storeu_si512(to + i * LANES, _mm512_or_si512(half, _mm512_slli_epi32(half, 16)));
    }
    to[BLOCK] = _mm512_cvtss_f32(_mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_set1_ps(power)));
}

/* Numbers at .. at + PANEL of a row. */
static inline void put_inputs(Number *row, long at, Vector low, Vector high) {
    put_block(row + at / BLOCK * (BLOCK + 1), low, high);
}

/* `count` numbers from `at` on, where a block begins; the last block is filled up. */
static void put_row(Number *row, long at, const float *x, long count) {
    for (long i = 0; i < count; i += PANEL) {
        long left = count - i;
        put_inputs(row, at + i, some(x + i, left), left > LANES ? some(x + i + LANES, left - LANES) : V(setzero)());
    }
}
#else
static inline void put_inputs(Number *row, long at, Vector low, Vector high) {
    put(row + at, low);
    put(row + at + LANES, high);
}
static void put_row(Number *row, long at, const float *x, long count) { put_all(row + at, x, count); }
#endif

/* --- products --- */

/* R rows of cells, `apart` from one to the next, times a panel -> out, `stride` from one to the next. Has what stands at
`soon` on its way, `step` bytes for each cell. */
#define PRODUCT(NAME, TYPE, LOAD, R)                                                                                   \
    static void NAME##R(const TYPE *panel, const float *x, long apart, long cells, float *out, long stride,            \
                        const char *soon, long step) {                                                                 \
        Vector low[R], high[R];                                                                                        \
        UNROLL for (int r = 0; r < R; r++) low[r] = high[r] = V(setzero)();                                            \
        for (long i = 0; i < cells; i++) {                                                                             \
            for (long line = 0; line < (long)sizeof(TYPE) * PANEL; line += 64)                                         \
                _mm_prefetch(soon + i * step + line, FETCHED);                                                         \
            Vector a, b;                                                                                               \
            LOAD(panel + i * PANEL, &a, &b);                                                                           \
            UNROLL for (int r = 0; r < R; r++) {                                                                       \
                Vector value = V(set1)(x[r * apart + i]);                                                              \
                low[r] = dot(low[r], value, a);                                                                        \
                high[r] = dot(high[r], value, b);                                                                      \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < R; r++) {                                                                           \
            V(storeu)(out + r * stride, low[r]);                                                                       \
            V(storeu)(out + r * stride + LANES, high[r]);                                                              \
        }                                                                                                              \
    }
#define ALL_PRODUCTS(NAME, TYPE, LOAD)                                                                                     \
    PRODUCT(NAME, TYPE, LOAD, 1)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 2)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 3)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 4)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 5)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 6)                                                                                       \
    MORE(NAME, TYPE, LOAD)                                                                                             \
    static void (*const NAME[ROWS + 1])(const TYPE *, const float *, long, long, float *, long, const char *, long) = { \
        0, NAME##1, NAME##2, NAME##3, NAME##4, NAME##5, NAME##6 LISTED(NAME)};
#if ROWS == 14
#define MORE(NAME, TYPE, LOAD)                                                                                         \
    PRODUCT(NAME, TYPE, LOAD, 7)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 8)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 9)                                                                                       \
    PRODUCT(NAME, TYPE, LOAD, 10)                                                                                      \
    PRODUCT(NAME, TYPE, LOAD, 11)                                                                                      \
    PRODUCT(NAME, TYPE, LOAD, 12)                                                                                      \
    PRODUCT(NAME, TYPE, LOAD, 13)                                                                                      \
    PRODUCT(NAME, TYPE, LOAD, 14)
#define LISTED(NAME) , NAME##7, NAME##8, NAME##9, NAME##10, NAME##11, NAME##12, NAME##13, NAME##14
#else
#define MORE(NAME, TYPE, LOAD)
#define LISTED(NAME)
#endif
ALL_PRODUCTS(with_cells, float, cells_at)
#if HALF
/* The same for `P` of the panels that stand side by side and rows of blocks; `cells`: in whole blocks, their scales not among
them. */
#undef PRODUCT
#define PRODUCT(NAME, TYPE, P, R)                                                                                      \
    static void NAME##R(const TYPE *panel, const float *x, long apart, long cells, float *out, long stride,            \
                        const char *soon, long step) {                                                                 \
        UNROLL for (int r = 0; r < R; r++)                                                                             \
            for (int i = 0; i < P * PANEL; i += LANES) _mm512_storeu_ps(out + r * stride + i, _mm512_setzero_ps());    \
        for (; cells; cells -= BLOCK, x += BLOCK + 1) {                                                                \
            __m512h sums[R][P];                                                                                        \
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++) sums[r][p] = _mm512_setzero_ph();    \
            for (int i = 0; i < BLOCK; i++, panel += WIDE, soon += step) {                                             \
                __m512h weights[P];                                                                                    \
                UNROLL for (int p = 0; p < P; p++) {                                                                   \
                    _mm_prefetch(soon + p * PANEL * (long)sizeof(TYPE), FETCHED);                                      \
                    weights[p] = _mm512_loadu_ph(panel + p * PANEL);                                                   \
                }                                                                                                      \
                UNROLL for (int r = 0; r < R; r++) {                                                                   \
                    __m512h value = (__m512h)_mm512_set1_ps(x[r * apart + i]);                                         \
                    UNROLL for (int p = 0; p < P; p++) sums[r][p] = _mm512_fmadd_ph(value, weights[p], sums[r][p]);    \
                }                                                                                                      \
            }                                                                                                          \
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int p = 0; p < P; p++)                                      \
                add_block(out + r * stride + p * PANEL, x[r * apart + BLOCK], sums[r][p]);                             \
        }                                                                                                              \
    }

/* A block's sums, times its scale. */
static inline void add_block(float *out, float scale, __m512h sums) {
    __m512i bits = (__m512i)sums;
    Vector low = _mm512_cvtph_ps(_mm512_castsi512_si256(bits)), high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    _mm512_storeu_ps(out, _mm512_fmadd_ps(low, _mm512_set1_ps(scale), _mm512_loadu_ps(out)));
    _mm512_storeu_ps(out + LANES, _mm512_fmadd_ps(high, _mm512_set1_ps(scale), _mm512_loadu_ps(out + LANES)));
}
ALL_PRODUCTS(with_one, Weight, 1)
ALL_PRODUCTS(with_two, Weight, 2)
typedef void (*const *Products)(const Weight *, const float *, long, long, float *, long, const char *, long);
static const Products with_weights[MANY + 1] = {0, with_one, with_two};
#define with_factors with_weights
#else
ALL_PRODUCTS(with_one, Weight, weights_at)
typedef void (*const *Products)(const Weight *, const float *, long, long, float *, long, const char *, long);
typedef void (*const *CellProducts)(const float *, const float *, long, long, float *, long, const char *, long);
static const Products with_weights[MANY + 1] = {0, with_one};
static const CellProducts with_factors[MANY + 1] = {0, with_cells};
#endif

/* Where a panel begins among those of a weight with so many cells. */
static inline long start_of_panel(long panel, long cells) { return panel / MANY * cells * WIDE + panel % MANY * PANEL; }

/* The outputs of `some` panels for the rows from..to: x [rows of `inputs`] -> out [rows, outputs], put there or added. The
last panel may hold fewer. Where rows share several passes over the panels, each fetches a part of the next. */
static void panels_of(const Weight *weight, const float *bias, long panel, long some, long outputs, long from, long to,
                      const Number *x, long inputs, float *out, int add) {
    float sums[ROWS][WIDE];
    long cells = cells_of(inputs), row = row_size(inputs), groups = up(to - from, ROWS), first = panel * PANEL;
    long columns = least(some * PANEL, outputs - first), line = WIDE * (long)sizeof(Weight), share = cells * line / groups;
    const Weight *own = weight + start_of_panel(panel, cells);
    const char *soon = (const char *)own + (groups > 1 ? cells * line : AHEAD);
    for (long g = 0; g < groups; g++, soon += share) {
        long a = from + (to - from) * g / groups, b = from + (to - from) * (g + 1) / groups;
        with_weights[some][b - a](own, (const float *)(x + a * row), row / PAIR, cells, sums[0], WIDE, soon, line / groups);
        for (long r = a; r < b; r++) {
            float *at = out + r * outputs + first;
            for (int c = 0; c < columns; c++) {
                float sum = sums[r - a][c] + (bias ? bias[first + c] : 0.0f);
                at[c] = add ? at[c] + sum : sum;
            }
        }
    }
}

/* Where a block of rows begins: all are of one size, so that threads that take a block each are done together. */
static inline long start_of_block(long rows, long block) { return rows * block / up(rows, FEW); }

/* What adapters act on in a product, and the inputs of a block of rows times `down`: each thread keeps its own while it goes
through the panels of a block, so that no thread waits for another. */
typedef struct {
    const Span *spans;
    int count;
    long product, block; /* the block that `low` holds, or -1 */
    float low[FEW * (MOST / BLOCK * (BLOCK + HALF))]; /* rows of MOST inputs */
} Adapted;

static void through_down(Adapted *adapted, const Number *x, long inputs, long from, long to) {
    long cells = cells_of(inputs), row = row_size(inputs);
    float sums[ROWS][MOST];
    for (int s = 0; s < adapted->count; s++) {
        const LowRank *low = adapted->spans[s].low + adapted->product;
        long last = least(to, adapted->spans[s].to);
        for (long a = adapted->spans[s].from > from ? adapted->spans[s].from : from; low->rank && a < last; a += ROWS) {
            long some = least(ROWS, last - a);
            for (long c = 0; c < low->rank; c += WIDE)
                with_factors[MANY][some](low->down + c * cells, (const float *)(x + a * row), row / PAIR, cells, sums[0] + c,
                                         MOST, (const char *)(low->down + c * cells) + AHEAD, WIDE * sizeof(Factor));
            for (long r = 0; r < some; r++)
                put_row((Number *)adapted->low + (a - from + r) * row_size(MOST), 0, sums[r], low->rank);
        }
    }
}

/* What adapters add to `some` panels' outputs for the rows from..to. */
static void adapt(Adapted *adapted, long panel, long some, long outputs, long from, long to, float *out) {
    long columns = least(some * PANEL, outputs - panel * PANEL), row = row_size(MOST);
    float sums[ROWS][WIDE];
    for (int s = 0; s < adapted->count; s++) {
        const LowRank *low = adapted->spans[s].low + adapted->product;
        long last = least(to, adapted->spans[s].to);
        for (long a = adapted->spans[s].from > from ? adapted->spans[s].from : from; low->rank && a < last; a += ROWS) {
            long count = least(ROWS, last - a);
            const Factor *own = low->up + start_of_panel(panel, low->cells);
            const Number *inner = (const Number *)adapted->low + (a - from) * row;
            with_factors[some][count](own, (const float *)inner, row / PAIR, low->cells, sums[0], WIDE, (const char *)own + AHEAD,
                                      WIDE * sizeof(Factor));
            for (long r = 0; r < count; r++)
                for (long c = 0; c < columns; c++) out[(a + r) * outputs + panel * PANEL + c] += sums[r][c];
        }
    }
}

/* x [rows of `inputs`] -> out [rows, outputs], put there or added, by all threads of a team: each has its share of the panels,
a block of rows after the other. */
static void multiply(const Weight *weight, const float *bias, const Number *x, long rows, long inputs, float *out, long outputs,
                     int add, Adapted *adapted) {
    long panels = up(outputs, PANEL), all = up(rows, FEW) * panels, threads = omp_get_num_threads();
    long own = omp_get_thread_num(), end = all * (own + 1) / threads;
    adapted->block = -1;
    for (long task = all * own / threads, some; task < end; task += some) {
        long block = task / panels, panel = task % panels;
        long from = start_of_block(rows, block), to = start_of_block(rows, block + 1);
        some = least(least(MANY - panel % MANY, panels - panel), end - task);
        panels_of(weight, bias, panel, some, outputs, from, to, x, inputs, out, add);
        if (!adapted->count) continue;
        if (adapted->block != block) through_down(adapted, x, inputs, from, to);
        adapted->block = block;
        adapt(adapted, panel, some, outputs, from, to, out);
    }
#pragma omp barrier
}

/* Floats that `longstride_product` needs for each row. */
EXPORT long longstride_row(long inputs) { return row_size(inputs); }

/* x [rows, inputs] -> out [rows, outputs]. */
EXPORT void longstride_product(const Weight *weight, const float *bias, const float *x, float *out, long rows, long inputs,
                               long outputs, float *scratch, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Adapted none;
        none.count = 0;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) put_row((Number *)scratch + r * row_size(inputs), 0, x + r * inputs, inputs);
        multiply(weight, bias, (Number *)scratch, rows, inputs, out, outputs, 0, &none);
    }
}

/* --- small functions --- */

static void norm(const float *x, const float *weight, float epsilon, long size, Number *out) {
    Vector squares = V(setzero)();
    for (long i = 0; i < size; i += LANES) {
        Vector part = V(loadu)(x + i);
        squares = V(fmadd)(part, part, squares);
    }
    Vector scale = V(set1)(1.0f / sqrtf(sum_of(squares) / (float)size + epsilon));
    for (long i = 0; i < size; i += PANEL) {
        Vector low = V(mul)(V(mul)(V(loadu)(x + i), scale), V(loadu)(weight + i));
        Vector high = V(mul)(V(mul)(V(loadu)(x + i + LANES), scale), V(loadu)(weight + i + LANES));
        put_inputs(out, i, low, high);
    }
}

/* gate [LANES] * sigmoid(gate) * up [LANES] */
static inline Vector gated(const float *gate, const float *up) {
    Vector g = V(loadu)(gate);
    /* below -87 e^-g would overflow; there the product is 0 up to rounding */
    Vector e = exponential(V(min)(V(sub)(V(setzero)(), g), V(set1)(87.0f)));
    return V(mul)(V(div)(g, V(add)(V(set1)(1.0f), e)), V(loadu)(up));
}

/* A head [size] rotated by its token's angles: x1 cos - x2 sin, x2 cos + x1 sin, for the halves x1 and x2; and scaled. */
static void rotate(const float *x, const float *cosine, const float *sine, int size, float scale, float *turned) {
    int half = size / 2;
    for (int i = 0; i < half; i++) {
        turned[i] = (x[i] * cosine[i] - x[i + half] * sine[i]) * scale;
        turned[i + half] = (x[i + half] * cosine[i + half] + x[i] * sine[i + half]) * scale;
    }
}

/* --- attention --- */

/* Tokens of a slice, whose attention is shared out in tasks: one for each chunk of their keys and each KV head. */
typedef struct {
    const Slice *slice;
    long first, tokens; /* of the slice */
    long row;           /* of all rows */
    long keys, chunks;  /* that the last token sees */
    long task, part;    /* the first task; where in memory its outputs go */
} Tile;

/* Floats that a query row's output takes: its columns in whole panels, the weights' sum, the largest score. */
static long part_size(const Layer *layer) { return up(layer->size, PANEL) * PANEL + 2; }

static long earlier(const Slice *slice) {
    long keys = 0;
    for (int i = 0; i < slice->ranges; i++) keys += slice->range[2 * i + 1] - slice->range[2 * i];
    return keys;
}

static long tiles_of(const Slice *slices, int count) {
    long tiles = 0;
    for (int s = 0; s < count; s++) tiles += up(slices[s].n, TILE);
    return tiles;
}

/* Fills `tiles` and one more, which stands at the end of all. */
static void tile(const Layer *layer, const Slice *slices, int count, Tile *tiles) {
    Tile next = {0};
    for (int s = 0; s < count; s++)
        for (next.slice = slices + s, next.first = 0; next.first < slices[s].n; next.first += next.tokens) {
            next.tokens = least(TILE, slices[s].n - next.first);
            next.keys = earlier(slices + s) + (slices[s].mask ? slices[s].n : next.first + next.tokens);
            next.chunks = up(next.keys, CHUNK);
            *tiles++ = next;
            next.row += next.tokens;
            next.task += next.chunks * layer->kv_heads;
            next.part += next.chunks * next.tokens * layer->heads * part_size(layer);
        }
    *tiles = next;
}

/* The cache rows of the keys from..to of those that a slice sees. */
static void rows_of(const Slice *slice, long from, long to, int32_t *rows) {
    for (long i = 0, at = 0; i <= slice->ranges && at < to; i++) {
        long first = i < slice->ranges ? slice->range[2 * i] : slice->row;
        long end = i < slice->ranges ? slice->range[2 * i + 1] : slice->row + slice->n;
        for (long k = at < from ? from : at; k < at + end - first && k < to; k++) rows[k - from] = (int32_t)(first + k - at);
        at += end - first;
    }
}

/* Have LANES rows of keys or values on their way. */
static INLINE void fetch(const Kept *buffer, const int32_t *rows, long k, long count, long size) {
    for (long i = k; i < k + LANES; i++)
        for (long at = 0; at < size; at += 64 / (long)sizeof(Kept))
            _mm_prefetch((const char *)(buffer + rows[least(i, count - 1)] * size + at), _MM_HINT_T0);
}

/* LANES keys' words from the w-th on, one below the other; zeros behind the last key. */
static INLINE void words_of(const Kept *keys, const int32_t *rows, long count, long size, long w, Vector *block) {
    for (int i = 0; i < LANES; i++)
        block[i] = i < count ? some((const float *)(keys + rows[i] * size) + w, size / (A_WORD * PAIR) - w) : V(setzero)();
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

/* Scores [CHUNK] of a token over the keys from..to become weights, in place; returns their sum and the largest score. */
static void weigh(const Slice *slice, long token, long past, long from, long to, float *scores, float *sum, float *most) {
    long among = slice->mask ? past + slice->n - slice->width : past; /* first key that a mask is about */
    for (long k = among > from ? among : from; k < to; k++) {
        if (slice->mask) scores[k - from] += slice->mask[token * slice->width + k - among];
        else if (k - among > token) scores[k - from] = -INFINITY;
    }
    long padded = up(to - from, PANEL) * PANEL;
    for (long k = to - from; k < padded; k++) scores[k] = -INFINITY;
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

/* Query rows [rows, size] of one KV head, scaled, before some keys and values. */
typedef struct {
    const Kept *keys, *values;
    const Number *query;
    const int32_t *seen; /* the keys' rows in the cache */
    long rows, count;
    float *scores, *part;
    long stride; /* of `part`: outputs, the weights' sum, the largest score */
    const char *soon; /* keys that this thread attends to next, */
    long lines;       /* so many lines of the cache */
} Attention;

/* Have a share of the next keys on their way, while nothing else is fetched: the part `done` of `of`. */
static INLINE void fetch_soon(const Attention *a, long done, long of) {
    for (long line = a->lines * done / of; line < a->lines * (done + 1) / of; line++)
        _mm_prefetch(a->soon + 64 * line, _MM_HINT_T1);
}

/* What becomes of a row's scores: see `weigh`. */
typedef struct {
    const Slice *slice;
    long first, group, past, from, to;
} Sight;

static void weigh_all(const Attention *a, const Sight *s) {
    for (long r = 0; r < a->rows; r++) {
        float *end = a->part + r * a->stride + a->stride - 2;
        weigh(s->slice, s->first + r / s->group, s->past, s->from, s->to, a->scores + r * CHUNK, end, end + 1);
    }
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
                                                 a->scores + r * CHUNK + k, CHUNK, soon, share / cells);
    weigh_all(a, s);
    pack_values(a->values, a->seen, a->count, size, panels);
    soon = a->lines ? a->soon : (const char *)panels;
    share = 64 * a->lines / (groups * up(size, PANEL));
    for (long r = 0; r < a->rows; r += ROWS)
        for (long column = 0; column < size; column += PANEL, soon += share)
            with_cells[least(ROWS, a->rows - r)](panels + column * pairs, a->scores + r * CHUNK, CHUNK, pairs,
                                                 a->part + r * a->stride + column, a->stride, soon, share / pairs);
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

/* What a thread keeps while it attends, in floats: scores, and panels of keys or of values. */
static long panels_at(const Layer *layer) { return TILE * (layer->heads / layer->kv_heads) * CHUNK; }
static long room(const Layer *layer) { return panels_at(layer) + CHUNK * up(layer->size, PANEL) * PANEL / PAIR; }

/* A task: a tile's rows of one KV head over a chunk of keys. */
typedef struct {
    const Tile *tile;
    long kv, chunk, from, to;
} Task;

static Task task_of(const Layer *layer, const Tile *tiles, long number) {
    while (number >= tiles[1].task) tiles++;
    Task t = {tiles, (number - tiles->task) % layer->kv_heads, (number - tiles->task) / layer->kv_heads, 0, 0};
    t.from = t.chunk * CHUNK;
    t.to = least(t.from + CHUNK, tiles->keys);
    return t;
}

/* Where a task's KV head begins in its cache's buffers. */
static long start_of(const Layer *layer, const Task *task) { return task->kv * task->tile->slice->capacity * layer->size; }

/* For each row the unnormalised output, the weights' sum and the largest score. `query`: [tokens, group, size], scaled;
`next`: the thread's next task, or null. */
static void attend(const Layer *layer, const Task *task, const Task *next, const Number *query, float *own, float *part) {
    const Tile *tile = task->tile;
    const Slice *slice = tile->slice;
    long size = layer->size, group = layer->heads / layer->kv_heads, from = task->from, to = task->to;
    const Kept *keys = slice->buffers[2 * layer->index] + start_of(layer, task);
    const Kept *values = slice->buffers[2 * layer->index + 1] + start_of(layer, task);
    int32_t seen[CHUNK];
    rows_of(slice, from, to, seen);
    Attention a = {keys, values, query, seen, tile->tokens * group, to - from, own, part, part_size(layer), 0, 0};
    if (next) { /* its rows mostly stand side by side */
        int32_t first;
        rows_of(next->tile->slice, next->from, next->from + 1, &first);
        a.soon = (const char *)(next->tile->slice->buffers[2 * layer->index] + start_of(layer, next) + first * size);
        a.lines = (next->to - next->from) * size * (long)sizeof(Kept) / 64;
    }
    Sight s = {slice, tile->first, group, earlier(slice), from, to};
    if (size == 64) attend_sized(64, &a, &s, own + panels_at(layer)); /* the widespread size, with its loops unrolled */
    else attend_sized(size, &a, &s, own + panels_at(layer));
}

/* Bring a query row's parts [chunks] (`apart` floats from one to the next) together -> all [size]. */
static void merge(const float *part, long chunks, long apart, long stride, long size, float *all) {
    float most = -INFINITY, sum = 0.0f;
    memset(all, 0, size * sizeof *all);
    for (long c = 0; c < chunks; c++) most = fmaxf(most, part[c * apart + stride - 1]);
    for (long c = 0; c < chunks; c++) {
        const float *own = part + c * apart;
        float weight = own[stride - 1] == -INFINITY ? 0.0f : expf(own[stride - 1] - most);
        sum += weight * own[stride - 2];
        for (int i = 0; i < size; i++) all[i] += weight * own[i];
    }
    for (int i = 0; i < size; i++) all[i] /= sum;
}

/* Heads whose outputs fill whole blocks together: sizes are whole eights. */
static long together(long size) {
    long heads = 1;
    while (heads * size % BLOCK) heads *= 2;
    return heads;
}

/* --- the layers --- */

/* Where things stand in the scratch memory, in floats; a number takes as many as one at most. */
typedef struct {
    long normed, qkv, query, seen, gate_up, inner, own, parts, end;
} Places;

static Places places(const Layer *layer, long rows, const Tile *end, int threads) {
    long wide = layer->heads * layer->size;
    Places p = {0};
    p.qkv = p.normed + rows * row_size(layer->hidden);
    p.query = p.qkv + rows * (layer->heads + 2 * layer->kv_heads) * layer->size;
    p.seen = p.query + rows * wide;
    p.gate_up = p.seen + rows * row_size(wide);
    p.inner = p.gate_up + rows * 2 * layer->inner;
    p.own = p.inner + rows * row_size(layer->inner);
    p.parts = p.own + threads * room(layer);
    p.end = p.parts + end->part;
    return p;
}

/* Floats of scratch memory that `longstride_layers` needs. */
EXPORT long longstride_scratch(const Layer *layer, long rows, const Slice *slices, int count, int threads) {
    long many = tiles_of(slices, count);
    Tile tiles[many + 1];
    tile(layer, slices, count, tiles);
    return places(layer, rows, tiles + many, threads).end;
}


/* All threads of a team run a layer together. */
static void run(const Layer *layer, float *x, long rows, const float *cosine, const float *sine, const Slice *slices,
                const Tile *tiles, long many, Adapted *adapted, long product, float *scratch, Places place) {
    long hidden = layer->hidden, inner = layer->inner, size = layer->size, heads = layer->heads, kv = layer->kv_heads;
    long group = heads / kv, width = (heads + 2 * kv) * size, stride = part_size(layer);
    long row_in = row_size(hidden), row_seen = row_size(heads * size), row_mid = row_size(inner), some = together(size);
    Number *normed = (Number *)(scratch + place.normed), *query = (Number *)(scratch + place.query);
    Number *seen = (Number *)(scratch + place.seen), *mid = (Number *)(scratch + place.inner);
    float *qkv = scratch + place.qkv, *both = scratch + place.gate_up, *parts = scratch + place.parts;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) norm(x + r * hidden, layer->norm_in, layer->epsilon_in, hidden, normed + r * row_in);
    adapted->product = product + QKV;
    multiply(layer->qkv, layer->qkv_bias, normed, rows, hidden, qkv, width, 0, adapted);
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *own = qkv + r * width, *turn = cosine + r * size, *angle = sine + r * size;
        float turned[MOST];
        long s = 0, token = r;
        while (token >= slices[s].n) token -= slices[s++].n;
        for (long h = 0; h < heads; h++) {
            rotate(own + h * size, turn, angle, (int)size, layer->scaling, turned);
            put_all(query + ((h / group * rows + r) * group + h % group) * size, turned, size);
        }
        for (long h = 0; h < kv; h++) {
            long at = (h * slices[s].capacity + slices[s].row + token) * size;
            rotate(own + (heads + h) * size, turn, angle, (int)size, 1.0f, turned);
            keep_all(slices[s].buffers[2 * layer->index] + at, turned, size);
            keep_all(slices[s].buffers[2 * layer->index + 1] + at, own + (heads + kv + h) * size, size);
        }
    }
    long tasks = tiles[many].task, threads = omp_get_num_threads();
#pragma omp for schedule(static, 1)
    for (long number = 0; number < tasks; number++) {
        Task task = task_of(layer, tiles, number), next = task;
        if (number + threads < tasks) next = task_of(layer, tiles, number + threads);
        const Tile *own = task.tile;
        attend(layer, &task, number + threads < tasks ? &next : 0, query + (task.kv * rows + own->row) * group * size,
               scratch + place.own + omp_get_thread_num() * room(layer),
               parts + own->part + (task.chunk * kv + task.kv) * own->tokens * group * stride);
    }
#pragma omp for schedule(static) collapse(2)
    for (long row = 0; row < rows; row++)
        for (long first = 0; first < heads; first += some) {
            const Tile *own = tiles;
            float merged[(BLOCK + 7) / 8 * MOST], *end = merged;
            while (row >= own[1].row) own++;
            for (long h = first; h < least(first + some, heads); h++, end += size) {
                const float *part = parts + own->part;
                part += (h / group * own->tokens * group + (row - own->row) * group + h % group) * stride;
                merge(part, own->chunks, heads * own->tokens * stride, stride, size, end);
            }
            put_row(seen + row * row_seen, first * size, merged, end - merged);
        }
    adapted->product = product + OUT;
    multiply(layer->out, layer->out_bias, seen, rows, heads * size, x, hidden, 1, adapted);
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) norm(x + r * hidden, layer->norm_mlp, layer->epsilon_mlp, hidden, normed + r * row_in);
    adapted->product = product + GATE_UP;
    multiply(layer->gate_up, layer->gate_up_bias, normed, rows, hidden, both, 2 * inner, 0, adapted);
#pragma omp for schedule(static) collapse(2)
    for (long r = 0; r < rows; r++)
        for (long at = 0; at < inner; at += PANEL) {
            const float *gate = both + r * 2 * inner + at, *up = gate + inner;
            put_inputs(mid + r * row_mid, at, gated(gate, up), gated(gate + LANES, up + LANES));
        }
    adapted->product = product + DOWN;
    multiply(layer->down, layer->down_bias, mid, rows, inner, x, hidden, 1, adapted);
}

/* x [rows, hidden], the tokens of all slices one behind the other, becomes the output of `depth` layers of one shape. cosine,
sine: [rows, size]. Writes the new tokens' keys and values to their rows. `spans`: what adapters act on. */
EXPORT void longstride_layers(const Layer *layers, int depth, float *x, long rows, const float *cosine, const float *sine,
                              const Slice *slices, int count, const Span *spans, int adapted, float *scratch, int threads) {
    long many = tiles_of(slices, count);
    Tile tiles[many + 1];
    tile(layers, slices, count, tiles);
    Places place = places(layers, rows, tiles + many, threads);
#pragma omp parallel num_threads(threads)
    {
        Adapted own;
        own.spans = spans, own.count = adapted;
        for (int layer = 0; layer < depth; layer++)
            run(layers + layer, x, rows, cosine, sine, slices, tiles, many, &own, layer * PRODUCTS, scratch, place);
    }
}
