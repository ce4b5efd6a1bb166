/* Attention of query rows over what their slices see, shared out among threads. */

/* Tokens of a slice, whose attention is shared out in tasks: one for each chunk of their keys and each KV head. */
typedef struct {
    const Slice *slice;
    long first, tokens; /* of the slice */
    long row;           /* of all rows */
    long keys, chunks;  /* that the last token sees */
    long task, part;    /* the first task; where in memory its outputs go */
} Tile;

/* Floats that a query row's output takes: its columns in whole WIDE, the weights' sum, the largest score. */
static long part_size(const Layer *layer) { return up(layer->size, WIDE) * WIDE + 2; }

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

/* A key's words from the w-th on; zeros where there is no such key. */
static INLINE Vector word_of(const Kept *keys, const int32_t *rows, long key, long count, long size, long w) {
    return key < count ? load_some((const float *)(keys + rows[key] * size) + w, size / (A_WORD * PAIR) - w) : V(setzero)();
}

/* See `weigh`; those of keys from `padded` on do not count. */
static void soften(float *scores, long padded, float *sum, float *most);

/* Scores [CHUNK] of a token over the keys from..to become weights, in place (HALF: a row of inputs, which is longer); returns their
sum and the largest score. */
static void weigh(const Slice *slice, long token, long past, long from, long to, float *scores, float *sum, float *most) {
    long among = slice->mask ? past + slice->n - slice->width : past; /* first key that a mask is about */
    for (long k = among > from ? among : from; k < to; k++) {
        if (slice->mask) scores[k - from] += slice->mask[token * slice->width + k - among];
        else if (k - among > token) scores[k - from] = -INFINITY;
    }
    long padded = up(to - from, PANEL) * PANEL;
    for (long k = to - from; k < padded; k++) scores[k] = -INFINITY;
    soften(scores, padded, sum, most);
}

/* Query rows [rows of `size`] of one KV head, scaled, before some keys and values. */
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

/* What becomes of a row's scores: see `weigh`. */
typedef struct {
    const Slice *slice;
    long first, group, past, from, to;
} Sight;

static void weigh_all(const Attention *a, const Sight *s) {
    for (long r = 0; r < a->rows; r++) {
        float *end = a->part + r * a->stride + a->stride - 2;
        weigh(s->slice, s->first + r / s->group, s->past, s->from, s->to, a->scores + r * SCORES, end, end + 1);
    }
}

#if HALF
#include "native_attention_half.h"
#else
#include "native_attention_cells.h"
#endif

/* What a thread keeps while it attends, in floats: scores, and panels of keys or of values. */
static long panels_at(const Layer *layer) { return TILE * (layer->heads / layer->kv_heads) * SCORES; }
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

/* For each row the unnormalised output, the weights' sum and the largest score. `query`: [tokens, group] rows of `size`, scaled;
`next`: the thread's next task, or null. */
static void attend(const Layer *layer, const Task *task, const Task *next, const Number *query, float *own, float *part) {
    const Tile *tile = task->tile;
    const Slice *slice = tile->slice;
    long size = layer->size, group = layer->heads / layer->kv_heads, from = task->from, to = task->to;
    const Kept *keys = slice->buffers[2 * layer->index] + start_of(layer, task);
    const Kept *values = slice->buffers[2 * layer->index + 1] + start_of(layer, task);
    int32_t seen[CHUNK];
    rows_of(slice, from, to, seen);
    Attention a = {keys, values, query, seen, tile->tokens * group, to - from, own, part, part_size(layer), (char *)own, 0};
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
