/* A decoder layer: what a step on a CPU is made of. Compiled once for each kind of processor and number (native_*.c).

A step of one token streams all weights once; as separate operations it spends most of its time elsewhere (starting
hundreds of small kernels, and products that are made for many rows). Here a layer is one call: RMS norms, projections,
rotary positions, attention over what each slice sees, gated MLP. engine/native.py packs the weights and says which layers
qualify; engine/fuse.py has the same layer in torch's operations, which tests hold this one to.

In fp32 weights are fp16, everything else is fp32. In bf16 keys and values are bf16, and weights too; PAIRED also what goes
into a product, which takes two at a time then; everything else is fp32. HALF is bf16 multiplied in fp16: weights are fp16, keys
and values become so on their way, what they are multiplied with is scaled block by block so that no sum overflows, and the
products of a block are added in fp16 before they are added to others in fp32. That rounds about as much as bf16 does what goes
into a product.

All products are of one kind, attention's too: rows of input times a panel. A cell is what one lane multiplies at a time: a
number, or two where products are paired. A panel is PANEL outputs side by side, for each cell of their inputs in turn, and MANY
panels stand side by side: [outputs / WIDE][cells][WIDE]. Keys and values are brought into panels chunk by chunk, on the way to
the second-level cache.

A row's sums are added in the same order however many rows share the call, so a token is computed as it would be alone
(behind the branches of a tree its keys stand in other chunks, and the sums are rounded otherwise). */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PANEL (2 * LANES) /* outputs side by side */
#if HALF
#define BLOCK PANEL       /* inputs whose products are added in fp16; their scale stands behind them */
#define MANY 2            /* panels side by side, a register each */
#define AHEAD 12288       /* bytes of weights fetched before they are needed */
#define FETCHED _MM_HINT_T1
#else
#define BLOCK 1
#define MANY 1
#define AHEAD 6144
#define FETCHED _MM_HINT_T0
#endif
#define WIDE (MANY * PANEL) /* engine/native.py packs weights so */
#define FEW 96            /* rows whose input stays in the second-level cache while the panels pass */
#define TILE 48           /* tokens that one task of attention is about */
#define CHUNK 512         /* keys that one task of attention looks at */
#define SCORES (CHUNK + HALF * CHUNK / BLOCK) /* room for a row's scores, then for its weights */
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
typedef uint16_t Number; /* what goes into a product */
typedef float Weight; /* a cell, whatever its bits mean */
#define PAIR 2
#else
typedef float Number; /* HALF: an fp16 number twice, or a block's scale */
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

/* What an adapter adds to a product: the input times `down`, times `up`, both in panels; rank: in whole WIDE, or 0; cells:
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

#include "native_numbers.h"
#include "native_products.h"
#include "native_attention.h"

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

/* gate [LANES] * sigmoid(gate) * other [LANES] */
static inline Vector gated(const float *gate, const float *other) {
    Vector g = V(loadu)(gate);
    /* below -87 e^-g would overflow; there the product is 0 up to rounding */
    Vector e = exponential(V(min)(V(sub)(V(setzero)(), g), V(set1)(87.0f)));
    return V(mul)(V(div)(g, V(add)(V(set1)(1.0f), e)), V(loadu)(other));
}

/* A head [size] rotated by its token's angles: x1 cos - x2 sin, x2 cos + x1 sin, for the halves x1 and x2; and scaled. */
static void rotate(const float *x, const float *cosine, const float *sine, int size, float scale, float *turned) {
    int half = size / 2;
    for (int i = 0; i < half; i++) {
        turned[i] = (x[i] * cosine[i] - x[i + half] * sine[i]) * scale;
        turned[i + half] = (x[i + half] * cosine[i + half] + x[i] * sine[i + half]) * scale;
    }
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
    p.seen = p.query + rows * layer->heads * row_size(layer->size);
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
                const Tile *tiles, long many, Adapted *adapted, Taken *shares, long product, float *scratch,
                Places place) {
    long hidden = layer->hidden, inner = layer->inner, size = layer->size, heads = layer->heads, kv = layer->kv_heads;
    long group = heads / kv, width = (heads + 2 * kv) * size, stride = part_size(layer);
    long row_in = row_size(hidden), row_seen = row_size(heads * size), row_mid = row_size(inner), some = together(size);
    Number *normed = (Number *)(scratch + place.normed), *query = (Number *)(scratch + place.query);
    Number *seen = (Number *)(scratch + place.seen), *mid = (Number *)(scratch + place.inner);
    float *qkv = scratch + place.qkv, *both = scratch + place.gate_up, *parts = scratch + place.parts;
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) norm(x + r * hidden, layer->norm_in, layer->epsilon_in, hidden, normed + r * row_in);
    adapted->product = product + QKV;
    multiply(layer->qkv, layer->qkv_bias, normed, rows, hidden, qkv, width, 0, adapted, shares);
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) {
        const float *own = qkv + r * width, *turn = cosine + r * size, *angle = sine + r * size;
        float turned[MOST];
        long s = 0, token = r;
        while (token >= slices[s].n) token -= slices[s++].n;
        for (long h = 0; h < heads; h++) {
            rotate(own + h * size, turn, angle, (int)size, layer->scaling, turned);
            put_query(query + ((h / group * rows + r) * group + h % group) * row_size(size), turned, size);
        }
        for (long h = 0; h < kv; h++) {
            long at = (h * slices[s].capacity + slices[s].row + token) * size;
            rotate(own + (heads + h) * size, turn, angle, (int)size, 1.0f, turned);
            keep_all(slices[s].buffers[2 * layer->index] + at, turned, size);
            keep_all(slices[s].buffers[2 * layer->index + 1] + at, own + (heads + kv + h) * size, size);
        }
    }
    long tasks = tiles[many].task, threads = omp_get_num_threads();
#pragma omp for schedule(dynamic, 1)
    for (long number = 0; number < tasks; number++) {
        Task task = task_of(layer, tiles, number), next = task;
        if (number + threads < tasks) next = task_of(layer, tiles, number + threads);
        const Tile *own = task.tile;
        attend(layer, &task, number + threads < tasks ? &next : 0, query + (task.kv * rows + own->row) * group * row_size(size),
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
    multiply(layer->out, layer->out_bias, seen, rows, heads * size, x, hidden, 1, adapted, shares);
#pragma omp for schedule(static)
    for (long r = 0; r < rows; r++) norm(x + r * hidden, layer->norm_mlp, layer->epsilon_mlp, hidden, normed + r * row_in);
    adapted->product = product + GATE_UP;
    multiply(layer->gate_up, layer->gate_up_bias, normed, rows, hidden, both, 2 * inner, 0, adapted, shares);
#pragma omp for schedule(static) collapse(2)
    for (long r = 0; r < rows; r++)
        for (long at = 0; at < inner; at += PANEL) {
            const float *gate = both + r * 2 * inner + at, *other = gate + inner;
            put_inputs(mid + r * row_mid, at, gated(gate, other), gated(gate + LANES, other + LANES));
        }
    adapted->product = product + DOWN;
    multiply(layer->down, layer->down_bias, mid, rows, inner, x, hidden, 1, adapted, shares);
}

/* x [rows, hidden], the tokens of all slices one behind the other, becomes the output of `depth` layers of one shape. cosine,
sine: [rows, size]. Writes the new tokens' keys and values to their rows. `spans`: what adapters act on. */
EXPORT void longstride_layers(const Layer *layers, int depth, float *x, long rows, const float *cosine, const float *sine,
                              const Slice *slices, int count, const Span *spans, int adapted, float *scratch, int threads) {
    long many = tiles_of(slices, count);
    Tile tiles[many + 1];
    tile(layers, slices, count, tiles);
    Places place = places(layers, rows, tiles + many, threads);
    Taken shares[2 * threads];
    memset(shares, 0, sizeof shares);
#pragma omp parallel num_threads(threads)
    {
        Adapted own;
        own.spans = spans, own.count = adapted, own.turn = 0;
        for (int layer = 0; layer < depth; layer++)
            run(layers + layer, x, rows, cosine, sine, slices, tiles, many, &own, shares, layer * PRODUCTS, scratch, place);
    }
}
