/* Softmax attention and its gradients in float32, never holding all scores at once (Dao et al. 2022, arXiv 2205.14135).
 *
 * A block of QUERIES queries lies across the lanes of a few vectors. Maxima, sums and gradients of the softmax then need
 * no operation across lanes, and the width of a head need not be a multiple of a vector. Every matrix product is one
 * function: scalars of the left matrix times rows of the right one. A head is computed by one thread in one order, so the
 * number of threads does not change the result.
 */
#include "lanes.h"

#define VECTORS 3
#define QUERIES (VECTORS * LANES)
#define KEYS 64       /* in a block, scored at once */
#define HIDDEN -1e30f /* a key whose mask is below this is hidden */

/* A tensor [batch][head][token][coordinate] with contiguous coordinates; the other strides count floats. */
struct heads {
    float *at; /* or NULL */
    int64_t batch, head, token;
};

struct attention {
    int64_t num_rows, num_heads, num_kv_heads, num_queries, num_keys, width;
    float scale;
    int32_t is_causal;
    struct heads query, key, value;
    struct heads mask;     /* added to the scores, or NULL: [batch][head][key][query], padded to whole query blocks */
    struct heads out;
    struct heads log_sums; /* log of the softmax's denominator: [batch][head][query] */
    struct heads grad_out; /* from here on for the backward pass only */
    struct heads grad_query, grad_key, grad_value;
};

INLINE float *head_of(const struct heads *tensor, int64_t row, int64_t head) {
    return tensor->at ? tensor->at + row * tensor->batch + head * tensor->head : NULL;
}

/* The left matrix of a product with any strides, so that a transpose costs nothing. */
struct left {
    const float *at;
    int64_t row, inner;
};

/* One tile of a product: to[row][lane] (+)= the sum over `inner` of left[row][inner] * right[inner][lane]. `rows` and
 * `vectors` are constants at every call, so the sums stay in registers and the loops are unrolled. */
INLINE void tile(int rows, int vectors, int64_t inner, struct left left, const float *right, int64_t right_row, float *to,
                 int64_t to_row, int add) {
    vec sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sums[r][v] = add ? load(to + r * to_row + v * LANES) : all(0);
    for (int64_t i = 0; i < inner; i++) {
        vec factors[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) factors[v] = load(right + i * right_row + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            float scalar = left.at[r * left.row + i * left.inner];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sums[r][v] += scalar * factors[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) store(to + r * to_row + v * LANES, sums[r][v]);
}

/* The whole product, tile by tile. `lanes`, the row length of `right` and `to`, is a multiple of LANES. */
static void product(int64_t rows, int64_t lanes, int64_t inner, struct left left, const float *right, float *to, int add) {
    for (int64_t lane = 0, vectors; lane < lanes; lane += vectors * LANES) {
        vectors = least((lanes - lane) / LANES, VECTORS);
        struct left here = left;
        for (int64_t row = 0, done; row < rows; row += done, here.at += done * left.row) {
            done = rows - row >= ROWS ? ROWS : 1;
            float *out = to + row * lanes + lane;
#define CASE(R, V) tile(R, V, inner, here, right + lane, lanes, out, lanes, add)
#define CASES(V) \
    if (done == ROWS) CASE(ROWS, V); \
    else CASE(1, V)
            if (vectors == 3) {
                CASES(3);
            } else if (vectors == 2) {
                CASES(2);
            } else {
                CASES(1);
            }
        }
    }
}

/* `count` queries, transposed to [coordinate][QUERIES] and multiplied by `scale`; 0 in the lanes left over. */
static void across_lanes(const float *from, int64_t token, int64_t count, int64_t width, float scale, float *to) {
    for (int64_t d = 0; d < width; d++)
        for (int64_t q = 0; q < QUERIES; q++) to[d * QUERIES + q] = q < count ? scale * from[q * token + d] : 0;
}

/* The same queries as rows: [QUERIES][padded]. */
static void along_lanes(const float *from, int64_t token, int64_t count, int64_t width, int64_t padded, float scale,
                        float *to) {
    memset(to, 0, QUERIES * padded * sizeof(float));
    for (int64_t q = 0; q < count; q++)
        for (int64_t d = 0; d < width; d++) to[q * padded + d] = scale * from[q * token + d];
}

/* Whether any lane is true. */
INLINE int any(ints lanes) {
    int64_t parts[LANES / 2], found = 0;
    memcpy(parts, &lanes, sizeof parts);
    for (int i = 0; i < LANES / 2; i++) found |= parts[i];
    return found != 0;
}

/* Narrows the `count` keys from `*key` on to those between the first and the last that any query of the block (from
 * `first` on) attends to: moves `*key` to that first one and returns how many remain. Texts packed into one row
 * therefore cost no more than on their own. */
static int64_t seen_keys(const struct attention *a, const float *mask, int64_t first, int64_t count, int64_t *key) {
    int64_t low = count, end = 0;
    if (!mask) return count;
    for (int64_t s = 0; s < count; s++) {
        const float *added = mask + (*key + s) * a->mask.token + first;
        vec largest = load(added);
        for (int64_t lane = LANES; lane < QUERIES; lane += LANES) largest = larger(load(added + lane), largest);
        if (!any(largest > HIDDEN)) continue;
        low = least(low, s);
        end = s + 1;
    }
    *key += low;
    return end - low > 0 ? end - low : 0;
}

/* Masked scores [key][QUERIES] of `count` keys from `key` on and the block of queries from `first` on. */
static void score(const struct attention *a, const float *query_lanes, const float *keys, const float *mask, int64_t first,
                  int64_t key, int64_t count, float *scores) {
    product(count, QUERIES, a->width, (struct left){keys + key * a->key.token, a->key.token, 1}, query_lanes, scores, 0);
    if (mask)
        for (int64_t s = 0; s < count; s++)
            for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
                vec added = load(mask + (key + s) * a->mask.token + first + lane);
                float *at = scores + s * QUERIES + lane;
                store(at, choose(added < HIDDEN, all(-INFINITY), load(at) + added));
            }
    if (a->is_causal)
        for (int64_t s = key < first ? first - key : 0; s < count; s++) /* keys after the block's first query */
            for (int64_t q = 0; q < least(key + s - first, QUERIES); q++) scores[s * QUERIES + q] = -INFINITY;
}

/* Number of keys, from 0 on, that a block of queries ending at `end_of_queries` may attend to. */
INLINE int64_t keys_within(const struct attention *a, int64_t end_of_queries) {
    return a->is_causal ? least(end_of_queries, a->num_keys) : a->num_keys;
}

/* Output and log_sums of one head, by the streaming softmax: for each query the largest score so far, the sum of
 * exponentials relative to it, and the weighted sum of values (`means`, [coordinate][QUERIES]), all rescaled whenever a
 * block of keys raises the largest score. */
static void forward_head(const struct attention *a, int64_t row, int64_t head, float *scratch) {
    int64_t width = a->width, kv_head = head / (a->num_heads / a->num_kv_heads);
    const float *queries = head_of(&a->query, row, head), *keys = head_of(&a->key, row, kv_head);
    const float *values = head_of(&a->value, row, kv_head), *mask = head_of(&a->mask, row, head);
    float *out = head_of(&a->out, row, head), *log_sums = head_of(&a->log_sums, row, head);
    float *query_lanes = scratch, *means = query_lanes + width * QUERIES, *scores = means + width * QUERIES;
    for (int64_t first = 0; first < a->num_queries; first += QUERIES) {
        int64_t count = least(QUERIES, a->num_queries - first), end = keys_within(a, first + count);
        float largest[QUERIES], sums[QUERIES] = {0};
        for (int64_t q = 0; q < QUERIES; q++) largest[q] = -INFINITY;
        across_lanes(queries + first * a->query.token, a->query.token, count, width, a->scale, query_lanes);
        memset(means, 0, width * QUERIES * sizeof(float));
        for (int64_t start = 0; start < end; start += KEYS) {
            int64_t key = start, block = seen_keys(a, mask, first, least(KEYS, end - start), &key);
            if (!block) continue;
            score(a, query_lanes, keys, mask, first, key, block, scores);
            for (int64_t lane = 0; lane < QUERIES; lane += LANES) {
                float *at = scores + lane;
                vec before = load(largest + lane), top = before, sum = all(0);
                for (int64_t s = 0; s < block; s++) top = larger(load(at + s * QUERIES), top);
                store(largest + lane, top);
                vec base = choose(top == -INFINITY, all(0), top); /* no key so far: weights 0, not NaN */
                for (int64_t s = 0; s < block; s++) {
                    vec weight = exponential(load(at + s * QUERIES) - base);
                    store(at + s * QUERIES, weight);
                    sum += weight;
                }
                vec shrunk = exponential(before - base);
                store(sums + lane, load(sums + lane) * shrunk + sum);
                for (int64_t d = 0; start && d < width; d++) {
                    float *mean = means + d * QUERIES + lane;
                    store(mean, load(mean) * shrunk);
                }
            }
            struct left across = {values + key * a->value.token, 1, a->value.token};
            product(width, QUERIES, block, across, scores, means, 1);
        }
        for (int64_t q = 0; q < count; q++) {
            int sees_nothing = sums[q] == 0;
            float scale = sees_nothing ? 0 : 1 / sums[q];
            log_sums[first + q] = sees_nothing ? INFINITY : largest[q] + logf(sums[q]);
            for (int64_t d = 0; d < width; d++) out[(first + q) * a->out.token + d] = means[d * QUERIES + q] * scale;
        }
    }
}

/* Gradients of one head: writes grad_query; adds to grad_keys and grad_values [key][padded], which the query heads of a
 * group share. With p the softmax weights, recomputed from log_sums:
 *     grad_value = p' grad_out,  grad_p = grad_out value',  grad_score = p * (grad_p - sum over keys of p * grad_p),
 *     grad_query = scale * grad_score key,  grad_key = scale * grad_score' query.
 */
static void backward_head(const struct attention *a, int64_t row, int64_t head, int64_t padded, float *grad_keys,
                          float *grad_values, float *scratch) {
    int64_t width = a->width, kv_head = head / (a->num_heads / a->num_kv_heads);
    const float *keys = head_of(&a->key, row, kv_head), *values = head_of(&a->value, row, kv_head);
    const float *mask = head_of(&a->mask, row, head), *log_sums = head_of(&a->log_sums, row, head);
    float *grad_query = head_of(&a->grad_query, row, head);
    float *query_lanes = scratch, *grad_out_lanes = query_lanes + width * QUERIES;
    float *grad_query_lanes = grad_out_lanes + width * QUERIES, *query_rows = grad_query_lanes + width * QUERIES;
    float *grad_out_rows = query_rows + padded * QUERIES, *weights = grad_out_rows + padded * QUERIES;
    float *grad_scores = weights + KEYS * QUERIES;
    for (int64_t first = 0; first < a->num_queries; first += QUERIES) {
        int64_t count = least(QUERIES, a->num_queries - first), end = keys_within(a, first + count);
        const float *query = head_of(&a->query, row, head) + first * a->query.token;
        const float *grad_out = head_of(&a->grad_out, row, head) + first * a->grad_out.token;
        const float *out = head_of(&a->out, row, head) + first * a->out.token;
        across_lanes(query, a->query.token, count, width, a->scale, query_lanes);
        along_lanes(query, a->query.token, count, width, padded, a->scale, query_rows);
        across_lanes(grad_out, a->grad_out.token, count, width, 1, grad_out_lanes);
        along_lanes(grad_out, a->grad_out.token, count, width, padded, 1, grad_out_rows);
        memset(grad_query_lanes, 0, width * QUERIES * sizeof(float));
        float common[QUERIES] = {0}, log_sum[QUERIES]; /* common: sum over keys of p * grad_p, which is grad_out . out */
        for (int64_t q = 0; q < QUERIES; q++) {
            log_sum[q] = q < count ? log_sums[first + q] : INFINITY;
            for (int64_t d = 0; q < count && d < width; d++)
                common[q] += grad_out[q * a->grad_out.token + d] * out[q * a->out.token + d];
        }
        for (int64_t start = 0; start < end; start += KEYS) {
            int64_t key = start, block = seen_keys(a, mask, first, least(KEYS, end - start), &key);
            if (!block) continue;
            struct left rows = {values + key * a->value.token, a->value.token, 1};
            score(a, query_lanes, keys, mask, first, key, block, weights);
            product(block, QUERIES, width, rows, grad_out_lanes, grad_scores, 0);
            for (int64_t lane = 0; lane < QUERIES; lane += LANES)
                for (int64_t s = 0; s < block; s++) {
                    float *weight = weights + s * QUERIES + lane, *grad_score = grad_scores + s * QUERIES + lane;
                    store(weight, exponential(load(weight) - load(log_sum + lane)));
                    store(grad_score, load(weight) * (load(grad_score) - load(common + lane)));
                }
            product(block, padded, count, (struct left){weights, QUERIES, 1}, grad_out_rows, grad_values + key * padded, 1);
            product(block, padded, count, (struct left){grad_scores, QUERIES, 1}, query_rows, grad_keys + key * padded, 1);
            struct left across = {keys + key * a->key.token, 1, a->key.token};
            product(width, QUERIES, block, across, grad_scores, grad_query_lanes, 1);
        }
        for (int64_t q = 0; q < count; q++)
            for (int64_t d = 0; d < width; d++)
                grad_query[(first + q) * a->grad_query.token + d] = grad_query_lanes[d * QUERIES + q] * a->scale;
    }
}

/* Whether built with OpenMP; without it there is one thread. */
int preceptor_attention_is_threaded(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static float *scratch_of(int64_t floats) { return aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64); }

/* Writes `out` and `log_sums`. Returns 0, or 1 if out of memory. */
int preceptor_attention(const struct attention *a, int64_t num_threads) {
    int failed = 0;
#pragma omp parallel for num_threads((int)num_threads) schedule(dynamic) reduction(|| : failed)
    for (int64_t i = 0; i < a->num_rows * a->num_heads; i++) {
        float *scratch = scratch_of(QUERIES * (2 * a->width + KEYS));
        if (scratch) forward_head(a, i / a->num_heads, i % a->num_heads, scratch);
        failed = failed || !scratch;
        free(scratch);
    }
    return failed;
}

/* Writes `grad_query`, `grad_key` and `grad_value`; a thread has all query heads of a key-value head, whose gradients
 * add up. Returns 0, or 1 if out of memory. */
int preceptor_attention_backward(const struct attention *a, int64_t num_threads) {
    int64_t width = a->width, padded = (width + LANES - 1) / LANES * LANES, group = a->num_heads / a->num_kv_heads;
    int failed = 0;
#pragma omp parallel for num_threads((int)num_threads) schedule(dynamic) reduction(|| : failed)
    for (int64_t i = 0; i < a->num_rows * a->num_kv_heads; i++) {
        int64_t row = i / a->num_kv_heads, kv_head = i % a->num_kv_heads, total = a->num_keys * padded;
        float *scratch = scratch_of(2 * total + QUERIES * (3 * width + 2 * padded + 2 * KEYS));
        if (scratch) {
            float *grad_keys = scratch, *grad_values = grad_keys + total;
            memset(scratch, 0, 2 * total * sizeof(float));
            for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
                backward_head(a, row, head, padded, grad_keys, grad_values, grad_values + total);
            for (int64_t key = 0; key < a->num_keys; key++) {
                float *grad_key = head_of(&a->grad_key, row, kv_head) + key * a->grad_key.token;
                float *grad_value = head_of(&a->grad_value, row, kv_head) + key * a->grad_value.token;
                memcpy(grad_key, grad_keys + key * padded, width * sizeof(float));
                memcpy(grad_value, grad_values + key * padded, width * sizeof(float));
            }
        }
        failed = failed || !scratch;
        free(scratch);
    }
    return failed;
}
