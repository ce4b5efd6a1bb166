/* Products of rows of input with panels of weights, and what adapters add to them. */

/* R rows of cells, `apart` from one to the next, times a panel -> out, `stride` from one to the next; added to what is there, or
not. Has what stands at `soon` on its way, `step` bytes for each cell. */
#define PRODUCT(NAME, TYPE, LOAD, R)                                                                                   \
    static void NAME##R(const TYPE *panel, const float *x, long apart, long cells, float *out, long stride,            \
                        int add, const char *soon, long step) {                                                        \
        Vector low[R], high[R];                                                                                        \
        UNROLL for (int r = 0; r < R; r++) {                                                                           \
            low[r] = add ? V(loadu)(out + r * stride) : V(setzero)();                                                  \
            high[r] = add ? V(loadu)(out + r * stride + LANES) : V(setzero)();                                         \
        }                                                                                                              \
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
    static void (*const NAME[ROWS + 1])(const TYPE *, const float *, long, long, float *, long, int, const char *, long) = { \
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
#if HALF
/* The same for `P` of the panels that stand side by side and rows of blocks; `cells`: in whole blocks, scales not counted. */
#undef PRODUCT
#define PRODUCT(NAME, TYPE, P, R)                                                                                      \
    static void NAME##R(const TYPE *panel, const float *x, long apart, long cells, float *out, long stride,            \
                        int add, const char *soon, long step) {                                                        \
        for (; cells; cells -= BLOCK, x += BLOCK + 1, add = 1) {                                                       \
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
                put_sums(out + r * stride + p * PANEL, add ? -1 : 0, x[r * apart + BLOCK], sums[r][p]);                \
        }                                                                                                              \
    }

/* A block's sums, times its scale, and what is there already in the lanes that are to count. */
static inline void put_sums(float *out, __mmask16 there, float scale, __m512h sums) {
    __m512i bits = (__m512i)sums;
    Vector low = _mm512_cvtph_ps(_mm512_castsi512_si256(bits)), high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1));
    _mm512_storeu_ps(out, _mm512_fmadd_ps(low, _mm512_set1_ps(scale), _mm512_maskz_loadu_ps(there, out)));
    out += LANES;
    _mm512_storeu_ps(out, _mm512_fmadd_ps(high, _mm512_set1_ps(scale), _mm512_maskz_loadu_ps(there, out)));
}
ALL_PRODUCTS(with_one, Weight, 1)
ALL_PRODUCTS(with_two, Weight, 2)
typedef void (*const *Products)(const Weight *, const float *, long, long, float *, long, int, const char *, long);
static const Products with_weights[MANY + 1] = {0, with_one, with_two};
#define with_factors with_weights
#else
ALL_PRODUCTS(with_cells, float, cells_at)
ALL_PRODUCTS(with_one, Weight, weights_at)
typedef void (*const *Products)(const Weight *, const float *, long, long, float *, long, int, const char *, long);
typedef void (*const *CellProducts)(const float *, const float *, long, long, float *, long, int, const char *, long);
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
        with_weights[some][b - a](own, (const float *)(x + a * row), row / PAIR, cells, sums[0], WIDE, 0, soon,
                                  line / groups);
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
    int turn;            /* which counters the next product has */
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
                                         MOST, 0, (const char *)(low->down + c * cells) + AHEAD, WIDE * sizeof(Factor));
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
            with_factors[some][count](own, (const float *)inner, row / PAIR, low->cells, sums[0], WIDE, 0,
                                      (const char *)own + AHEAD, WIDE * sizeof(Factor));
            for (long r = 0; r < count; r++)
                for (long c = 0; c < columns; c++) out[(a + r) * outputs + panel * PANEL + c] += sums[r][c];
        }
    }
}

/* How far each thread's share of a product has been taken, by itself or by threads that were done with theirs: one whose
processor is wanted for something else would keep all others waiting. Products take turns with two rows of counters, so that
none is set back while somebody reads it. */
typedef struct {
    long taken, apart[7]; /* a line of cache each */
} Taken;

/* The next `*some` panels, of one block and side by side, that nobody took of a share from..to; false if there are none. */
static int take(Taken *share, long from, long to, long panels, long *task, long *some) {
    long taken = __atomic_load_n(&share->taken, __ATOMIC_RELAXED);
    do {
        *task = from + taken;
        if (*task >= to) return 0;
        long panel = *task % panels;
        *some = least(least(MANY - panel % MANY, panels - panel), to - *task);
    } while (!__atomic_compare_exchange_n(&share->taken, &taken, taken + *some, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return 1;
}

/* x [rows of `inputs`] -> out [rows, outputs], put there or added, by all threads of a team: each has its share of the panels,
a block of rows after the other, and helps the others then. `shares`: [2][threads], zeros before a team's first product. */
static void multiply(const Weight *weight, const float *bias, const Number *x, long rows, long inputs, float *out, long outputs,
                     int add, Adapted *adapted, Taken *shares) {
    long panels = up(outputs, PANEL), all = up(rows, FEW) * panels, threads = omp_get_num_threads();
    long own = omp_get_thread_num(), task, some;
    Taken *now = shares + adapted->turn * threads;
    adapted->turn ^= 1;
    shares[adapted->turn * threads + own].taken = 0;
    adapted->block = -1;
    for (long i = 0; i < threads; i++) {
        long whose = (own + i) % threads, from = all * whose / threads, to = all * (whose + 1) / threads;
        while (take(now + whose, from, to, panels, &task, &some)) {
            long block = task / panels, panel = task % panels;
            long first = start_of_block(rows, block), last = start_of_block(rows, block + 1);
            panels_of(weight, bias, panel, some, outputs, first, last, x, inputs, out, add);
            if (!adapted->count) continue;
            if (adapted->block != block) through_down(adapted, x, inputs, first, last);
            adapted->block = block;
            adapt(adapted, panel, some, outputs, first, last, out);
        }
    }
#pragma omp barrier
}

/* Floats that `longstride_product` needs for each row. */
EXPORT long longstride_row(long inputs) { return row_size(inputs); }

/* x [rows, inputs] -> out [rows, outputs]. */
EXPORT void longstride_product(const Weight *weight, const float *bias, const float *x, float *out, long rows, long inputs,
                               long outputs, float *scratch, int threads) {
    Taken shares[2 * threads];
    memset(shares, 0, sizeof shares);
#pragma omp parallel num_threads(threads)
    {
        Adapted none;
        none.count = none.turn = 0;
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) put_row((Number *)scratch + r * row_size(inputs), 0, x + r * inputs, inputs);
        multiply(weight, bias, (Number *)scratch, rows, inputs, out, outputs, 0, &none, shares);
    }
}
