/* Softmax attention and its gradients, in float32, without ever holding all scores (Dao et al. 2022, arXiv 2205.14135).
 *
 * A block of QUERIES queries lies across the lanes of a few vectors, so maxima, sums and gradients of the softmax need
 * no step from lane to lane, and a head's width need not fill a vector. Every product is one function: scalars of one
 * matrix times rows of the other. A head is worked on by one thread, in one order, so the result does not depend on how
 * many threads there are.
 */
#include "lanes.h"

#define VECTORS 3
#define QUERIES (VECTORS * LANES)
#define KEYS 64       /* scored at once */
#define HIDDEN -1e30f /* a mask of less hides */

/* A tensor [batch][head][token][coordinate] whose coordinates lie side by side. */
struct heads {
    float *at; /* or NULL */
    int64_t batch, head, token;
};

struct attention {
    int64_t num_rows, num_heads, num_kv_heads, num_queries, num_keys, width;
    float scale;
    int32_t is_causal;
    struct heads query, key, value;
    struct heads mask;     /* added to the scores: [batch][head][key][query], padded to whole blocks of queries, or NULL */
    struct heads out;
    struct heads log_sums; /* of the exponentials: [batch][head][query] */
    struct heads slope;    /* of the output; from here on only the backward pass looks */
    struct heads for_query, for_key, for_value;
};

INLINE float *head_of(const struct heads *tensor, int64_t row, int64_t head) {
    return tensor->at ? tensor->at + row * tensor->batch + head * tensor->head : NULL;
}

/* A matrix as a left factor: its entry for output `row` at `inner`. */
struct left {
    const float *at;
    int64_t row, inner;
};

/* to[row][lane] = (add: itself +) the sum over `inner` of left[row][inner] * right[inner][lane], of one tile. */
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

/* The same of any number of rows and of `lanes`, a multiple of LANES; rows of `right` and `to` have that many. */
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

/* Queries first..first + count across lanes, [coordinate][QUERIES], times `scale`; 0 in the lanes that are left over. */
static void across_lanes(const float *from, int64_t token, int64_t count, int64_t width, float scale, float *to) {
    for (int64_t d = 0; d < width; d++)
        for (int64_t q = 0; q < QUERIES; q++) to[d * QUERIES + q] = q < count ? scale * from[q * token + d] : 0;
}

/* The same queries as rows of `padded` coordinates. */
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

/* Of `count` keys from `*key` on, how many there are from the first to the last that a query from `first` on sees; `*key`
 * becomes that first one. So a row may hold many texts at the cost of each. */
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

/* Scores [key][QUERIES] of `count` keys from `key` on and the queries from `first` on, with the mask. */
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
        for (int64_t s = key < first ? first - key : 0; s < count; s++)
            for (int64_t q = 0; q < least(key + s - first, QUERIES); q++) scores[s * QUERIES + q] = -INFINITY;
}

/* Keys that the queries of a block may attend to. */
INLINE int64_t keys_within(const struct attention *a, int64_t end_of_queries) {
    return a->is_causal ? least(end_of_queries, a->num_keys) : a->num_keys;
}

static void forward_head(const struct attention *a, int64_t row, int64_t head, float *scratch) {
    int64_t width = a->width, kept = head / (a->num_heads / a->num_kv_heads);
    const float *queries = head_of(&a->query, row, head), *keys = head_of(&a->key, row, kept);
    const float *values = head_of(&a->value, row, kept), *mask = head_of(&a->mask, row, head);
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
                vec base = choose(top == -INFINITY, all(0), top); /* nothing was seen yet: weights 0, not NaN */
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

/* Gradients of one head, added to those of the kept head: for_keys and for_values, [key][padded]. */
static void backward_head(const struct attention *a, int64_t row, int64_t head, int64_t padded, float *for_keys,
                          float *for_values, float *scratch) {
    int64_t width = a->width, kept = head / (a->num_heads / a->num_kv_heads);
    const float *keys = head_of(&a->key, row, kept), *values = head_of(&a->value, row, kept);
    const float *mask = head_of(&a->mask, row, head), *log_sums = head_of(&a->log_sums, row, head);
    float *for_query = head_of(&a->for_query, row, head);
    float *query_lanes = scratch, *slope_lanes = query_lanes + width * QUERIES;
    float *for_query_lanes = slope_lanes + width * QUERIES, *query_rows = for_query_lanes + width * QUERIES;
    float *slope_rows = query_rows + padded * QUERIES, *weights = slope_rows + padded * QUERIES;
    float *for_scores = weights + KEYS * QUERIES;
    for (int64_t first = 0; first < a->num_queries; first += QUERIES) {
        int64_t count = least(QUERIES, a->num_queries - first), end = keys_within(a, first + count);
        const float *query = head_of(&a->query, row, head) + first * a->query.token;
        const float *slope = head_of(&a->slope, row, head) + first * a->slope.token;
        const float *out = head_of(&a->out, row, head) + first * a->out.token;
        across_lanes(query, a->query.token, count, width, a->scale, query_lanes);
        along_lanes(query, a->query.token, count, width, padded, a->scale, query_rows);
        across_lanes(slope, a->slope.token, count, width, 1, slope_lanes);
        along_lanes(slope, a->slope.token, count, width, padded, 1, slope_rows);
        memset(for_query_lanes, 0, width * QUERIES * sizeof(float));
        float common[QUERIES] = {0}, log_sum[QUERIES]; /* common: the sum over keys of weight * slope of the weight */
        for (int64_t q = 0; q < QUERIES; q++) {
            log_sum[q] = q < count ? log_sums[first + q] : INFINITY;
            for (int64_t d = 0; q < count && d < width; d++)
                common[q] += slope[q * a->slope.token + d] * out[q * a->out.token + d];
        }
        for (int64_t start = 0; start < end; start += KEYS) {
            int64_t key = start, block = seen_keys(a, mask, first, least(KEYS, end - start), &key);
            if (!block) continue;
            struct left rows = {values + key * a->value.token, a->value.token, 1};
            score(a, query_lanes, keys, mask, first, key, block, weights);
            product(block, QUERIES, width, rows, slope_lanes, for_scores, 0);
            for (int64_t lane = 0; lane < QUERIES; lane += LANES)
                for (int64_t s = 0; s < block; s++) {
                    float *weight = weights + s * QUERIES + lane, *for_score = for_scores + s * QUERIES + lane;
                    store(weight, exponential(load(weight) - load(log_sum + lane)));
                    store(for_score, load(weight) * (load(for_score) - load(common + lane)));
                }
            product(block, padded, count, (struct left){weights, QUERIES, 1}, slope_rows, for_values + key * padded, 1);
            product(block, padded, count, (struct left){for_scores, QUERIES, 1}, query_rows, for_keys + key * padded, 1);
            struct left across = {keys + key * a->key.token, 1, a->key.token};
            product(width, QUERIES, block, across, for_scores, for_query_lanes, 1);
        }
        for (int64_t q = 0; q < count; q++)
            for (int64_t d = 0; d < width; d++)
                for_query[(first + q) * a->for_query.token + d] = for_query_lanes[d * QUERIES + q] * a->scale;
    }
}

/* Whether more than one thread works; without OpenMP there is one. */
int preceptor_attention_is_threaded(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

static float *scratch_of(int64_t floats) { return aligned_alloc(64, (sizeof(float) * floats + 63) / 64 * 64); }

/* Writes `out` and `log_sums`. Returns 0, or 1 where memory is out. */
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

/* Writes `for_query`, `for_key` and `for_value`. Returns 0, or 1 where memory is out. */
int preceptor_attention_backward(const struct attention *a, int64_t num_threads) {
    int64_t width = a->width, padded = (width + LANES - 1) / LANES * LANES, group = a->num_heads / a->num_kv_heads;
    int failed = 0;
#pragma omp parallel for num_threads((int)num_threads) schedule(dynamic) reduction(|| : failed)
    for (int64_t i = 0; i < a->num_rows * a->num_kv_heads; i++) {
        int64_t row = i / a->num_kv_heads, kept = i % a->num_kv_heads, total = a->num_keys * padded;
        float *scratch = scratch_of(2 * total + QUERIES * (3 * width + 2 * padded + 2 * KEYS));
        if (scratch) {
            float *for_keys = scratch, *for_values = for_keys + total;
            memset(scratch, 0, 2 * total * sizeof(float));
            for (int64_t head = kept * group; head < (kept + 1) * group; head++)
                backward_head(a, row, head, padded, for_keys, for_values, for_values + total);
            for (int64_t key = 0; key < a->num_keys; key++) {
                float *for_key = head_of(&a->for_key, row, kept) + key * a->for_key.token;
                float *for_value = head_of(&a->for_value, row, kept) + key * a->for_value.token;
                memcpy(for_key, for_keys + key * padded, width * sizeof(float));
                memcpy(for_value, for_values + key * padded, width * sizeof(float));
            }
        }
        failed = failed || !scratch;
        free(scratch);
    }
    return failed;
}
