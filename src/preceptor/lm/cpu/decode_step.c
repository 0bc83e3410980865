/* One token of every row of a batch through the layers of a decoder: the same mathematics as CpuEngine._forward.
 *
 * A small model could decode as fast as its weights stream from the processor's cache. What slows it down is a
 * framework's overhead for every product, norm and copy, so here one call does all of them.
 *
 * Weights are packed in panels of PANEL outputs, [output / PANEL][input][PANEL], in float32 or bfloat16. Cached keys are
 * [row][head][coordinate][slot] and cached values [row][head][slot][coordinate], in float32.
 */
#include "lanes.h"

#define PANEL 32
#define VECTORS 2 /* per row of a tile */
#define BLOCK 64  /* slots scored at once; the capacity of a cache is a multiple of it */

typedef uint32_t words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES), aligned(2)));

struct product {
    const void *weight;
    const float *bias; /* or NULL */
    int64_t inputs, outputs;
};

struct layer {
    const float *attention_norm, *attention_norm_bias, *feed_forward_norm, *feed_forward_norm_bias;
    const float *query_norm, *key_norm; /* or NULL */
    struct product query_key_value, attention_output, up, down;
    float *keys, *values;
};

struct model {
    int64_t num_layers, width, num_heads, num_kv_heads, head_width, capacity, captured_layer;
    int64_t is_bfloat16, is_layer_norm, is_gated;
    float norm_epsilon, head_norm_epsilon;
};

INLINE vec load_weights(const void *weight, int64_t at, int is_bfloat16) {
    if (!is_bfloat16) return load((const float *)weight + at);
    halves stored = *(const halves *)((const uint16_t *)weight + at);
    return (vec)(__builtin_convertvector(stored, words) << 16); /* bfloat16 is the upper half of a float32 */
}

/* PANEL outputs of `rows` rows, without bias. `rows` is a constant at every call, so the sums stay in registers. */
INLINE void panel_product(int rows, const float *x, int64_t inputs, const void *weight, int64_t at, int is_bfloat16,
                          float out[ROWS][PANEL]) {
    for (int64_t lane = 0; lane < PANEL; lane += VECTORS * LANES) {
        vec sums[ROWS][VECTORS] = {0};
        for (int64_t i = 0; i < inputs; i++) {
            vec first = load_weights(weight, at + i * PANEL + lane, is_bfloat16);
            vec second = load_weights(weight, at + i * PANEL + lane + LANES, is_bfloat16);
            for (int r = 0; r < rows; r++) {
                float scalar = x[r * inputs + i];
                sums[r][0] += scalar * first;
                sums[r][1] += scalar * second;
            }
        }
        for (int r = 0; r < rows; r++) {
            store(&out[r][lane], sums[r][0]);
            store(&out[r][lane + LANES], sums[r][1]);
        }
    }
}

/* out = x @ weight + bias, or with `add` out += x @ weight + bias. */
static void multiply(const struct product *product, int is_bfloat16, const float *x, float *out, int64_t rows, int add) {
    int64_t inputs = product->inputs, outputs = product->outputs;
    float part[ROWS][PANEL];
    for (int64_t start = 0; start < outputs; start += PANEL) {
        int64_t count = outputs - start < PANEL ? outputs - start : PANEL, at = start * inputs;
        for (int64_t row = 0; row < rows;) {
            const float *from = x + row * inputs;
            int64_t left = rows - row, done = left >= ROWS ? ROWS : left >= 4 ? 4 : left >= 2 ? 2 : 1;
#define CASE(R, B) panel_product(R, from, inputs, product->weight, at, B, part)
#define CASES(B) \
    if (done == ROWS) CASE(ROWS, B); \
    else if (done == 4) CASE(4, B); \
    else if (done == 2) CASE(2, B); \
    else CASE(1, B)
            if (is_bfloat16) { CASES(1); } else { CASES(0); }
            for (int64_t r = 0; r < done; r++) {
                float *to = out + (row + r) * outputs + start;
                for (int64_t o = 0; o < count; o++) {
                    float sum = part[r][o] + (product->bias ? product->bias[start + o] : 0);
                    to[o] = add ? to[o] + sum : sum;
                }
            }
            row += done;
        }
    }
}

/* Layer norm, or RMS norm (whose mean is taken to be 0), of one row. */
static void normalise(const float *x, const float *weight, const float *bias, float epsilon, int is_layer_norm,
                      float *out, int64_t width) {
    float mean = 0, square = 0;
    if (is_layer_norm) {
        for (int64_t i = 0; i < width; i++) mean += x[i];
        mean /= width;
    }
    for (int64_t i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
    float scale = 1 / sqrtf(square / width + epsilon);
    for (int64_t i = 0; i < width; i++) out[i] = (x[i] - mean) * scale * weight[i] + (bias ? bias[i] : 0);
}

/* In place: silu(gate) * up, or GELU in its tanh form, which equals x * sigmoid(2u) with 2u = 1.596 (x + 0.0447 x^3). */
static void activate(float *x, int64_t outputs, int64_t rows, int is_gated) {
    int64_t hidden = is_gated ? outputs / 2 : outputs;
    for (int64_t row = 0; row < rows; row++) {
        const float *from = x + row * outputs;
        float *to = x + row * hidden; /* gated rows shrink and move up, never past what is unread */
        for (int64_t i = 0; i < hidden; i += LANES) {
            int64_t count = hidden - i < LANES ? hidden - i : LANES;
            vec a = {0}, b = (vec){0} + 1.0f;
            memcpy(&a, from + i, count * sizeof(float));
            if (is_gated) memcpy(&b, from + hidden + i, count * sizeof(float));
            vec u = is_gated ? a : 1.5957691216f * (a + 0.044715f * a * a * a);
            vec y = a / (1.0f + exponential(-u)) * b;
            memcpy(to + i, &y, count * sizeof(float));
        }
    }
}

/* Softmax attention of the new token of one row and head; `filled` is 0 at padding, or NULL if there is none. */
static void attend(const struct model *model, const float *query, const float *keys, const float *values,
                   const uint8_t *filled, int64_t slots, float *scores, float *out) {
    int64_t width = model->head_width, capacity = model->capacity, padded = (slots + BLOCK - 1) / BLOCK * BLOCK;
    float scale = 1 / sqrtf((float)width);
    for (int64_t start = 0; start < slots; start += 4 * LANES) {
        vec sums[4] = {0};
        for (int64_t d = 0; d < width; d++) {
            float q = query[d] * scale;
            const float *from = keys + d * capacity + start;
            for (int i = 0; i < 4; i++) sums[i] += q * load(from + i * LANES);
        }
        memcpy(scores + start, sums, sizeof sums);
    }
    for (int64_t s = slots; s < padded; s++) scores[s] = -INFINITY;
    if (filled)
        for (int64_t s = 0; s < slots; s++) scores[s] = filled[s] ? scores[s] : -INFINITY;
    /* The softmax, as exponentials relative to the largest score; the division by their sum comes last. */
    vec largest = load(scores);
    for (int64_t s = LANES; s < padded; s += LANES) largest = larger(load(scores + s), largest);
    float top = largest[0];
    for (int i = 1; i < LANES; i++) top = largest[i] > top ? largest[i] : top;
    vec total = {0};
    for (int64_t s = 0; s < padded; s += LANES) {
        vec p = exponential(load(scores + s) - top);
        store(scores + s, p);
        total += p;
    }
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += total[i];
    if (width < LANES) {
        for (int64_t d = 0; d < width; d++) {
            float mean = 0;
            for (int64_t s = 0; s < slots; s++) mean += scores[s] * values[s * width + d];
            out[d] = mean / sum;
        }
        return;
    }
    for (int64_t start = 0; start < width; start += LANES) {
        int64_t d = start + LANES > width ? width - LANES : start; /* the last vector may overlap the one before */
        vec means[4] = {0}; /* four independent sums, since each addition waits for the one before */
        int64_t s = 0;
        for (; s + 4 <= slots; s += 4)
            for (int i = 0; i < 4; i++) means[i] += scores[s + i] * load(values + (s + i) * width + d);
        for (; s < slots; s++) means[0] += scores[s] * load(values + s * width + d);
        store(out + d, ((means[0] + means[1]) + (means[2] + means[3])) / sum);
    }
}

/* Norm and rotary embedding of one head. The two of a pair come out next to each other, as in CpuEngine. */
static void prepare_head(float *head, const float *norm, float epsilon, const float *rotary, int64_t width) {
    float turned[width];
    if (norm) normalise(head, norm, NULL, epsilon, 0, head, width);
    if (!rotary) return;
    for (int64_t i = 0; i < width / 2; i++) {
        float a = head[i], b = head[i + width / 2], cosine = rotary[2 * i], sine = rotary[2 * i + 1];
        turned[2 * i] = a * cosine - b * sine;
        turned[2 * i + 1] = a * sine + b * cosine;
    }
    memcpy(head, turned, width * sizeof(float));
}

/* The step for rows first..first + rows - 1. Returns 0, or 1 if out of memory. */
static int step_rows(const struct model *model, const struct layer *layers, int64_t first, int64_t rows, float *states,
                     const float *rotary, const uint8_t *filled, int64_t slot, float *captured) {
    int64_t width = model->width, head_width = model->head_width, kv_heads = model->num_kv_heads, slots = slot + 1;
    int64_t group = model->num_heads / kv_heads, projected = (model->num_heads + 2 * kv_heads) * head_width;
    int64_t hidden = layers[0].up.outputs, attended_width = model->num_heads * head_width, capacity = model->capacity;
    float *scratch = malloc(sizeof(float) * (rows * (width + projected + attended_width + hidden) + capacity + BLOCK));
    if (!scratch) return 1;
    /* Per row: normed [width], heads [queries, keys, values], attended [num_heads * head_width], up [hidden]. */
    float *normed = scratch, *heads = normed + rows * width, *attended = heads + rows * projected;
    float *up = attended + rows * attended_width, *scores = up + rows * hidden;
    states += first * width;
    for (int64_t l = 0; l < model->num_layers; l++) {
        const struct layer *layer = layers + l;
        for (int64_t r = 0; r < rows; r++)
            normalise(states + r * width, layer->attention_norm, layer->attention_norm_bias, model->norm_epsilon,
                      model->is_layer_norm, normed + r * width, width);
        multiply(&layer->query_key_value, model->is_bfloat16, normed, heads, rows, 0);
        for (int64_t r = 0; r < rows; r++) {
            float *query = heads + r * projected, *key = query + attended_width, *value = key + kv_heads * head_width;
            const float *row_rotary = rotary ? rotary + (first + r) * head_width : NULL;
            const uint8_t *counts = filled ? filled + (first + r) * slots : NULL;
            for (int64_t h = 0; h < model->num_heads; h++)
                prepare_head(query + h * head_width, layer->query_norm, model->head_norm_epsilon, row_rotary, head_width);
            for (int64_t h = 0; h < kv_heads; h++) {
                float *keys = layer->keys + ((first + r) * kv_heads + h) * capacity * head_width;
                float *values = layer->values + ((first + r) * kv_heads + h) * capacity * head_width;
                prepare_head(key + h * head_width, layer->key_norm, model->head_norm_epsilon, row_rotary, head_width);
                for (int64_t d = 0; d < head_width; d++) keys[d * capacity + slot] = key[h * head_width + d];
                memcpy(values + slot * head_width, value + h * head_width, head_width * sizeof(float));
                for (int64_t g = h * group; g < (h + 1) * group; g++)
                    attend(model, query + g * head_width, keys, values, counts, slots, scores,
                           attended + r * attended_width + g * head_width);
            }
        }
        multiply(&layer->attention_output, model->is_bfloat16, attended, states, rows, 1);
        for (int64_t r = 0; r < rows; r++)
            normalise(states + r * width, layer->feed_forward_norm, layer->feed_forward_norm_bias, model->norm_epsilon,
                      model->is_layer_norm, normed + r * width, width);
        multiply(&layer->up, model->is_bfloat16, normed, up, rows, 0);
        activate(up, hidden, rows, model->is_gated);
        multiply(&layer->down, model->is_bfloat16, up, states, rows, 1);
        if (l == model->captured_layer) memcpy(captured + first * width, states, rows * width * sizeof(float));
    }
    free(scratch);
    return 0;
}

/* Replaces `states` [row][width] by the output of the last layer and writes slot `slot` of every layer's keys and values.
 * `rotary` is [row][head_width / 2][2] (cosine, sine) or NULL, `filled` [row][slot + 1] or NULL, `captured` [row][width]
 * the output of layer `captured_layer`. Rows are independent, so each thread takes its share of them. Returns 0, or 1 if
 * out of memory. */
int preceptor_step(const struct model *model, const struct layer *layers, int64_t rows, int64_t num_threads,
                   float *states, const float *rotary, const uint8_t *filled, int64_t slot, float *captured) {
    int64_t share = (rows + num_threads - 1) / num_threads;
    int failed = 0;
#pragma omp parallel for num_threads((int)num_threads) schedule(static) reduction(|| : failed)
    for (int64_t first = 0; first < rows; first += share) {
        int64_t here = rows - first < share ? rows - first : share;
        failed = step_rows(model, layers, first, here, states, rotary, filled, slot, captured) || failed;
    }
    return failed;
}
