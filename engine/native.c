/* A decoder layer over few rows, in fp32 with weights in fp16: what a step on a CPU is made of.

A step of one token streams all weights once; as separate operations it spends most of its time elsewhere (starting
hundreds of small kernels, and products that are made for many rows). Here a layer is one call: RMS norms, projections,
rotary positions, attention over what each slice sees, gated MLP. engine/native.py packs the weights and says which layers
qualify; engine/fuse.py has the same layer in torch's operations, which tests hold this one to.

A row's sums are added in the same order however many rows share the call, so a token that was drafted is computed as it
would be alone.

Panels: PANEL outputs of a weight side by side, for each input in turn: [outputs / PANEL][inputs][PANEL]. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL 16
#define ROWS 6     /* rows of input that share a pass over a panel: their sums fill the registers */
#define FEW 48     /* rows whose input stays in the second-level cache while the panels pass */
#define AHEAD 2048 /* bytes of weights fetched before they are needed */
#define TILE 16    /* tokens that one task of attention is about */
#define CHUNK 512  /* keys that one task of attention looks at */
#define MOST 256    /* the largest size of a head */
#define BLOCK 32   /* values that stay in the first-level cache while all query rows use them */
#define UNROLL _Pragma("GCC unroll 8") /* or sums live in memory and not in registers */
#define EXPORT __attribute__((visibility("default")))

typedef struct {
    int32_t hidden, heads, kv_heads, size, inner;
    float epsilon_in, epsilon_mlp, scaling;
    const float *norm_in, *norm_mlp;
    const uint16_t *qkv, *out, *gate_up, *down; /* panels; up's stand behind gate's */
    const float *qkv_bias, *out_bias, *gate_up_bias, *down_bias; /* or null */
} Layer;

typedef struct {
    int32_t n, row, ranges, capacity, width; /* new tokens; their first row; visible ranges; rows a head; mask columns */
    const int32_t *range;                    /* from, to, from, to ... of earlier rows */
    const float *mask;                       /* [n, width], added for the last keys; null: causal among the new tokens */
    float *keys, *values;                    /* this layer's [kv_heads, capacity, size] */
} Slice;

/* --- products --- */

static inline __m256 eight(const uint16_t *half) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)half));
}

#define PRODUCT(R)                                                                                                     \
    static void product##R(const uint16_t *panel, const float *x, long inputs, float sums[][PANEL]) {                  \
        __m256 low[R], high[R];                                                                                        \
        UNROLL for (int r = 0; r < R; r++) low[r] = high[r] = _mm256_setzero_ps();                                     \
        for (long i = 0; i < inputs; i++) {                                                                            \
            _mm_prefetch((const char *)(panel + i * PANEL) + AHEAD, _MM_HINT_T0);                                      \
            __m256 a = eight(panel + i * PANEL), b = eight(panel + i * PANEL + 8);                                     \
            UNROLL for (int r = 0; r < R; r++) {                                                                       \
                __m256 value = _mm256_broadcast_ss(x + r * inputs + i);                                                \
                low[r] = _mm256_fmadd_ps(value, a, low[r]);                                                            \
                high[r] = _mm256_fmadd_ps(value, b, high[r]);                                                          \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < R; r++) {                                                                           \
            _mm256_storeu_ps(sums[r], low[r]);                                                                         \
            _mm256_storeu_ps(sums[r] + 8, high[r]);                                                                    \
        }                                                                                                              \
    }
PRODUCT(1)
PRODUCT(2)
PRODUCT(3)
PRODUCT(4)
PRODUCT(5)
PRODUCT(6)

typedef void Product(const uint16_t *, const float *, long, float[][PANEL]);
static Product *const products[ROWS + 1] = {0, product1, product2, product3, product4, product5, product6};

/* One panel's outputs of the rows of a block: x [rows, inputs] -> out [rows, stride], put there or added. */
static void panel_of(const uint16_t *weight, const float *bias, long panel, long block, const float *x, long rows,
                     long inputs, float *out, long stride, int add) {
    float sums[ROWS][PANEL];
    x += block * FEW * inputs;
    out += block * FEW * stride;
    rows = rows - block * FEW < FEW ? rows - block * FEW : FEW;
    long groups = (rows + ROWS - 1) / ROWS;
    for (long g = 0; g < groups; g++) {
        long from = rows * g / groups, to = rows * (g + 1) / groups;
        products[to - from](weight + panel * inputs * PANEL, x + from * inputs, inputs, sums);
        for (long r = from; r < to; r++) {
            float *at = out + r * stride + panel * PANEL;
            for (int c = 0; c < PANEL; c++) {
                float sum = sums[r - from][c] + (bias ? bias[panel * PANEL + c] : 0.0f);
                at[c] = add ? at[c] + sum : sum;
            }
        }
    }
}

/* x [rows, inputs] -> out [rows, outputs]. */
EXPORT void longstride_product(const uint16_t *weight, const float *bias, const float *x, float *out, long rows,
                               long inputs, long outputs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
    for (long block = 0; block < (rows + FEW - 1) / FEW; block++)
        for (long panel = 0; panel < outputs / PANEL; panel++)
            panel_of(weight, bias, panel, block, x, rows, inputs, out, outputs, 0);
}

/* --- small functions --- */

/* e^x for x <= 88, by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf): a relative error of 2e-7. */
static inline __m256 exponential(__m256 x) {
    x = _mm256_max_ps(x, _mm256_set1_ps(-87.0f));
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 p = _mm256_set1_ps(1.9875691500e-4f);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
    p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

static void norm(const float *x, const float *weight, float epsilon, long size, float *out) {
    __m256 squares = _mm256_setzero_ps();
    for (long i = 0; i < size; i += 8) {
        __m256 part = _mm256_loadu_ps(x + i);
        squares = _mm256_fmadd_ps(part, part, squares);
    }
    float lanes[8], sum = 0.0f;
    _mm256_storeu_ps(lanes, squares);
    for (int i = 0; i < 8; i++) sum += lanes[i];
    float scale = 1.0f / sqrtf(sum / (float)size + epsilon);
    for (long i = 0; i < size; i++) out[i] = x[i] * scale * weight[i];
}

/* gate [16] and up [16] -> gate * sigmoid(gate) * up */
static inline void gated(const float *gate, const float *up, float *out) {
    for (int i = 0; i < PANEL; i += 8) {
        __m256 g = _mm256_loadu_ps(gate + i);
        /* below -87 e^-g would overflow; there the product is 0 up to rounding */
        __m256 e = exponential(_mm256_min_ps(_mm256_sub_ps(_mm256_setzero_ps(), g), _mm256_set1_ps(87.0f)));
        __m256 y = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
        _mm256_storeu_ps(out + i, _mm256_mul_ps(y, _mm256_loadu_ps(up + i)));
    }
}

/* Rotate a head [size] by its token's angles: x1 cos - x2 sin, x2 cos + x1 sin, for the halves x1 and x2; and scale it. */
static void rotate(float *x, const float *cosine, const float *sine, int size, float scale) {
    int half = size / 2;
    for (int i = 0; i < half; i++) {
        float a = x[i], b = x[i + half];
        x[i] = (a * cosine[i] - b * sine[i]) * scale;
        x[i + half] = (b * cosine[i + half] + a * sine[i + half]) * scale;
    }
}

/* --- attention --- */

/* Four keys' scores for R queries `apart` floats apart, to `scores` and on, CHUNK apart. */
#define SCORES(R)                                                                                                      \
    static void scores##R(const float *query, const long *apart, const float *keys, int size, float *scores) {         \
        __m256 sums[R][4];                                                                                             \
        UNROLL for (int r = 0; r < R; r++)                                                                             \
            UNROLL for (int k = 0; k < 4; k++) sums[r][k] = _mm256_setzero_ps();                                       \
        for (int i = 0; i < size; i += 8) {                                                                            \
            __m256 q[R];                                                                                               \
            UNROLL for (int r = 0; r < R; r++) q[r] = _mm256_loadu_ps(query + apart[r] + i);                           \
            UNROLL for (int k = 0; k < 4; k++) {                                                                       \
                __m256 key = _mm256_loadu_ps(keys + k * size + i);                                                     \
                UNROLL for (int r = 0; r < R; r++) sums[r][k] = _mm256_fmadd_ps(q[r], key, sums[r][k]);                \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < R; r++) {                                                                           \
            __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(sums[r][0], sums[r][1]), _mm256_hadd_ps(sums[r][2], sums[r][3])); \
            _mm_storeu_ps(scores + r * CHUNK, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1))); \
        }                                                                                                              \
    }
SCORES(1)
SCORES(2)
SCORES(3)

/* For R rows of weights, CHUNK apart: outs, `apart` floats apart, += weights [count] times values [count, size]; 8 W columns. */
#define WEIGHTED(R, W)                                                                                                 \
    static void weighted##R##x##W(const float *weights, const float *values, long count, int size, float *outs, long apart) { \
        __m256 sums[R][W];                                                                                             \
        UNROLL for (int r = 0; r < R; r++)                                                                             \
            UNROLL for (int w = 0; w < W; w++) sums[r][w] = _mm256_loadu_ps(outs + r * apart + 8 * w);                 \
        for (long k = 0; k < count; k++) {                                                                             \
            __m256 value[W];                                                                                           \
            UNROLL for (int w = 0; w < W; w++) value[w] = _mm256_loadu_ps(values + k * size + 8 * w);                  \
            UNROLL for (int r = 0; r < R; r++) {                                                                       \
                __m256 weight = _mm256_broadcast_ss(weights + r * CHUNK + k);                                          \
                UNROLL for (int w = 0; w < W; w++) sums[r][w] = _mm256_fmadd_ps(weight, value[w], sums[r][w]);         \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int r = 0; r < R; r++)                                                                             \
            UNROLL for (int w = 0; w < W; w++) _mm256_storeu_ps(outs + r * apart + 8 * w, sums[r][w]);                 \
    }
WEIGHTED(1, 4)
WEIGHTED(2, 4)
WEIGHTED(3, 4)
WEIGHTED(1, 1)
WEIGHTED(2, 1)
WEIGHTED(3, 1)

#define TOGETHER 3 /* query rows that share the loads of a key or value */
typedef void Scores(const float *, const long *, const float *, int, float *);
typedef void Weighted(const float *, const float *, long, int, float *, long);
static Scores *const scores_of[TOGETHER + 1] = {0, scores1, scores2, scores3};
static Weighted *const weighted_of[TOGETHER + 1][2] = {
    {0}, {weighted1x1, weighted1x4}, {weighted2x1, weighted2x4}, {weighted3x1, weighted3x4}};

/* Tokens of a slice, whose attention is shared out in tasks: one for each chunk of their keys and each KV head. */
typedef struct {
    const Slice *slice;
    long first, tokens; /* of the slice */
    long row;           /* of all rows */
    long keys, chunks;  /* that the last token sees */
    long task, part;    /* the first task; where in memory its outputs go */
} Tile;

static long earlier(const Slice *slice) {
    long keys = 0;
    for (int i = 0; i < slice->ranges; i++) keys += slice->range[2 * i + 1] - slice->range[2 * i];
    return keys;
}

static long tiles_of(const Slice *slices, int count) {
    long tiles = 0;
    for (int s = 0; s < count; s++) tiles += (slices[s].n + TILE - 1) / TILE;
    return tiles;
}

/* Fills `tiles` and one more, which stands at the end of all. */
static void tile(const Layer *layer, const Slice *slices, int count, Tile *tiles) {
    Tile next = {0};
    for (int s = 0; s < count; s++)
        for (next.slice = slices + s, next.first = 0; next.first < slices[s].n; next.first += next.tokens) {
            long left = slices[s].n - next.first;
            next.tokens = left < TILE ? left : TILE;
            next.keys = earlier(slices + s) + (slices[s].mask ? slices[s].n : next.first + next.tokens);
            next.chunks = (next.keys + CHUNK - 1) / CHUNK;
            *tiles++ = next;
            next.row += next.tokens;
            next.task += next.chunks * layer->kv_heads;
            next.part += next.chunks * next.tokens * layer->heads * (layer->size + 2);
        }
    *tiles = next;
}

/* What `attend` works on: the query rows of one KV head, token by token, and its rows of the cache. */
typedef struct {
    int size, group, rows;
    long stride;        /* from a token's query to the next one's */
    const float *query; /* the first token's first head */
    const float *keys, *values;
    float *scores, *part;
} Head;

static inline int fewer(int rows) { return rows < TOGETHER ? rows : TOGETHER; }

/* Scores of `count` keys from a cache row on, which are the keys from `at` on of the chunk. */
static void score(const Head *head, long row, long at, long count) {
    int size = head->size;
    for (long k = 0; k < count; k += 4)
        for (int r = 0; r < head->rows; r += TOGETHER) {
            int some = fewer(head->rows - r);
            long apart[TOGETHER];
            const float *key = head->keys + (row + k) * size;
            float *own = head->scores + r * CHUNK + at + k;
            for (int i = 0; i < some; i++)
                apart[i] = (r + i) / head->group * head->stride + (r + i) % head->group * size;
            if (count - k >= 4) {
                scores_of[some](head->query, apart, key, size, own);
                continue;
            }
            float last[4 * MOST], few[TOGETHER * CHUNK]; /* what is left of a run, filled up */
            memset(last, 0, sizeof(float) * 4 * (size_t)size);
            memcpy(last, key, sizeof(float) * (size_t)((count - k) * size));
            scores_of[some](head->query, apart, last, size, few);
            for (int i = 0; i < some; i++) memcpy(own + i * CHUNK, few + i * CHUNK, sizeof(float) * (size_t)(count - k));
        }
}

/* Add their values, weighted by what has become of their scores. */
static void weigh(const Head *head, long row, long at, long count) {
    int size = head->size;
    for (long k = 0; k < count; k += BLOCK)
        for (int r = 0; r < head->rows; r += TOGETHER)
            for (int column = 0, wide; column < size; column += wide ? 32 : 8) {
                wide = size - column >= 32;
                weighted_of[fewer(head->rows - r)][wide](
                    head->scores + r * CHUNK + at + k, head->values + (row + k) * size + column,
                    count - k < BLOCK ? count - k : BLOCK, size, head->part + r * (size + 2) + column, size + 2);
            }
}

typedef void Run(const Head *, long row, long at, long count);

/* Calls `run` for every run of cache rows among the keys from..to of those that a slice sees. */
static void runs(const Slice *slice, long from, long to, Run *run, const Head *head) {
    for (long i = 0, at = 0; i <= slice->ranges && at < to; i++) {
        long first = i < slice->ranges ? slice->range[2 * i] : slice->row;
        long end = i < slice->ranges ? slice->range[2 * i + 1] : slice->row + slice->n;
        long a = at < from ? from - at : 0, b = end - first < to - at ? end - first : to - at;
        if (a < b) run(head, first + a, at + a - from, b - a);
        at += end - first;
    }
}

/* A tile's rows of one KV head over the keys from..to: for each the unnormalised output, the weights' sum and the largest
score, [size + 2]. `query`: the first token's first head; tokens `stride` apart. */
static void attend(const Layer *layer, const Tile *tile, long kv, long from, long to, const float *query, long stride,
                   float *scores, float *part) {
    const Slice *slice = tile->slice;
    int size = layer->size, group = layer->heads / layer->kv_heads, rows = (int)tile->tokens * group;
    long start = kv * slice->capacity * size, past = earlier(slice);
    Head head = {size, group, rows, stride, query, slice->keys + start, slice->values + start, scores, part};
    runs(slice, from, to, score, &head);
    long among = slice->mask ? past + slice->n - slice->width : past; /* first key that a mask is about */
    for (int r = 0; r < rows; r++) {
        float *own = scores + r * CHUNK, *out = part + r * (size + 2);
        long token = tile->first + r / group;
        for (long k = among > from ? among : from; k < to; k++) {
            if (slice->mask) own[k - from] += slice->mask[token * slice->width + k - among];
            else if (k - among > token) own[k - from] = -INFINITY;
        }
        long width = to - from, padded = (width + 7) / 8 * 8;
        for (long k = width; k < padded; k++) own[k] = -INFINITY;
        __m256 most = _mm256_loadu_ps(own);
        for (long k = 8; k < padded; k += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(own + k));
        float lanes[8], largest = -INFINITY;
        _mm256_storeu_ps(lanes, most);
        for (int i = 0; i < 8; i++) largest = lanes[i] > largest ? lanes[i] : largest;
        out[size + 1] = largest;
        __m256 shift = _mm256_set1_ps(largest == -INFINITY ? 0.0f : largest), none = _mm256_set1_ps(-INFINITY);
        __m256 total = _mm256_setzero_ps();
        for (long k = 0; k < padded; k += 8) {
            __m256 score = _mm256_loadu_ps(own + k), weight = exponential(_mm256_sub_ps(score, shift));
            weight = _mm256_andnot_ps(_mm256_cmp_ps(score, none, _CMP_EQ_OQ), weight); /* unseen: exactly 0 */
            _mm256_storeu_ps(own + k, weight);
            total = _mm256_add_ps(total, weight);
        }
        _mm256_storeu_ps(lanes, total);
        out[size] = 0.0f;
        for (int i = 0; i < 8; i++) out[size] += lanes[i];
        memset(out, 0, sizeof(float) * (size_t)size);
    }
    runs(slice, from, to, weigh, &head);
}

/* Bring a query row's parts [chunks] (`apart` floats from one to the next) together. */
static void merge(const float *part, long chunks, long apart, int size, float *out) {
    float most = -INFINITY, sum = 0.0f;
    for (long c = 0; c < chunks; c++) most = fmaxf(most, part[c * apart + size + 1]);
    memset(out, 0, sizeof(float) * (size_t)size);
    for (long c = 0; c < chunks; c++) {
        const float *own = part + c * apart;
        float weight = own[size + 1] == -INFINITY ? 0.0f : expf(own[size + 1] - most);
        sum += weight * own[size];
        for (int i = 0; i < size; i++) out[i] += weight * own[i];
    }
    for (int i = 0; i < size; i++) out[i] /= sum;
}

/* --- the layer --- */

/* Where things stand in the scratch memory, in floats. */
typedef struct {
    long normed, qkv, seen, gate_up, inner, scores, parts, end;
} Places;

static Places places(const Layer *layer, long rows, const Tile *end, int threads) {
    Places p = {0};
    p.qkv = p.normed + rows * layer->hidden;
    p.seen = p.qkv + rows * (layer->heads + 2 * layer->kv_heads) * layer->size;
    p.gate_up = p.seen + rows * layer->heads * layer->size;
    p.inner = p.gate_up + rows * 2 * layer->inner;
    p.scores = p.inner + rows * layer->inner;
    p.parts = p.scores + threads * TILE * (layer->heads / layer->kv_heads) * CHUNK;
    p.end = p.parts + end->part;
    return p;
}

/* Floats of scratch memory that `longstride_layer` needs. */
EXPORT long longstride_scratch(const Layer *layer, long rows, const Slice *slices, int count, int threads) {
    long many = tiles_of(slices, count);
    Tile tiles[many + 1];
    tile(layer, slices, count, tiles);
    return places(layer, rows, tiles + many, threads).end;
}

int omp_get_thread_num(void);

/* x [rows, hidden], the tokens of all slices one behind the other, becomes the layer's output. cosine, sine: [rows,
size]. Writes the new tokens' keys and values to their rows. */
EXPORT void longstride_layer(const Layer *layer, float *x, long rows, const float *cosine, const float *sine,
                             const Slice *slices, int count, float *scratch, int threads) {
    long many = tiles_of(slices, count);
    Tile tiles[many + 1];
    tile(layer, slices, count, tiles);
    Places place = places(layer, rows, tiles + many, threads);
    long hidden = layer->hidden, inner = layer->inner, size = layer->size, heads = layer->heads, kv = layer->kv_heads;
    long group = heads / kv, width = (heads + 2 * kv) * size, blocks = (rows + FEW - 1) / FEW;
    float *normed = scratch + place.normed, *qkv = scratch + place.qkv, *out = scratch + place.seen;
    float *both = scratch + place.gate_up, *mid = scratch + place.inner, *parts = scratch + place.parts;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) norm(x + r * hidden, layer->norm_in, layer->epsilon_in, hidden, normed + r * hidden);
#pragma omp for schedule(static) collapse(2)
        for (long block = 0; block < blocks; block++)
            for (long panel = 0; panel < width / PANEL; panel++)
                panel_of(layer->qkv, layer->qkv_bias, panel, block, normed, rows, hidden, qkv, width, 0);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) {
            long s = 0, token = r;
            while (token >= slices[s].n) token -= slices[s++].n;
            for (long h = 0; h < heads + kv; h++)
                rotate(qkv + r * width + h * size, cosine + r * size, sine + r * size, (int)size, h < heads ? layer->scaling : 1);
            for (long h = 0; h < kv; h++) {
                long at = (h * slices[s].capacity + slices[s].row + token) * size;
                memcpy(slices[s].keys + at, qkv + r * width + (heads + h) * size, sizeof(float) * (size_t)size);
                memcpy(slices[s].values + at, qkv + r * width + (heads + kv + h) * size, sizeof(float) * (size_t)size);
            }
        }
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < tiles[many].task; task++) {
            const Tile *own = tiles;
            while (task >= own[1].task) own++;
            long chunk = (task - own->task) / kv, h = (task - own->task) % kv;
            long from = chunk * CHUNK, to = from + CHUNK < own->keys ? from + CHUNK : own->keys;
            attend(layer, own, h, from, to, qkv + own->row * width + h * group * size, width,
                   scratch + place.scores + omp_get_thread_num() * TILE * group * CHUNK,
                   parts + own->part + (chunk * kv + h) * own->tokens * group * (size + 2));
        }
#pragma omp for schedule(static)
        for (long t = 0; t < many; t++) {
            const Tile *own = tiles + t;
            for (long r = 0; r < own->tokens; r++)
                for (long h = 0; h < heads; h++)
                    merge(parts + own->part + (h / group * own->tokens * group + r * group + h % group) * (size + 2),
                          own->chunks, heads * own->tokens * (size + 2), (int)size, out + ((own->row + r) * heads + h) * size);
        }
#pragma omp for schedule(static) collapse(2)
        for (long block = 0; block < blocks; block++)
            for (long panel = 0; panel < hidden / PANEL; panel++)
                panel_of(layer->out, layer->out_bias, panel, block, out, rows, heads * size, x, hidden, 1);
#pragma omp for schedule(static)
        for (long r = 0; r < rows; r++) norm(x + r * hidden, layer->norm_mlp, layer->epsilon_mlp, hidden, normed + r * hidden);
#pragma omp for schedule(static) collapse(2)
        for (long block = 0; block < blocks; block++)
            for (long panel = 0; panel < inner / PANEL; panel++) {
                long end = rows < (block + 1) * FEW ? rows : (block + 1) * FEW, up = panel + inner / PANEL;
                panel_of(layer->gate_up, layer->gate_up_bias, panel, block, normed, rows, hidden, both, 2 * inner, 0);
                panel_of(layer->gate_up, layer->gate_up_bias, up, block, normed, rows, hidden, both, 2 * inner, 0);
                for (long r = block * FEW; r < end; r++)
                    gated(both + r * 2 * inner + panel * PANEL, both + r * 2 * inner + up * PANEL, mid + r * inner + panel * PANEL);
            }
#pragma omp for schedule(static) collapse(2)
        for (long block = 0; block < blocks; block++)
            for (long panel = 0; panel < hidden / PANEL; panel++)
                panel_of(layer->down, layer->down_bias, panel, block, mid, rows, inner, x, hidden, 1);
    }
}
