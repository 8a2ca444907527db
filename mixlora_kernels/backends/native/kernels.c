/* The operation on a CPU, in float32: what a layer adds to the frozen product in a few passes over x, y and dy.

An instance's tokens meet only the r factors that were chosen for it. No two threads write the same element, and every
sum has an order of its own, so the same input on as many threads gives the same bits. The library is loaded after torch
and shares its OpenMP threads. Nothing is allocated here but a thread's stack. */

#include "call.h"
#include "products.h"

INLINE int64_t begin(const call *c, int64_t b) { return c->starts ? c->starts[b] : c->N / c->B * b; }

INLINE int64_t instance_of(const call *c, int64_t token) {
    if (!c->starts) return token / (c->N / c->B);
    int64_t low = 0, high = c->B;
    while (high - low > 1) {
        int64_t middle = (low + high) / 2;
        if (c->starts[middle] <= token) low = middle;
        else high = middle;
    }
    return low;
}

/* What one pooled token counts in its instance's mean. */
INLINE float share_of(const call *c, int64_t b) {
    int64_t first = begin(c, b), end = begin(c, b + 1), pooled = end - first;
    if (c->mask) {
        pooled = 0;
        for (int64_t t = first; t < end; t++) pooled += c->mask[t] != 0;
    }
    return 1.0f / (float)(pooled ? pooled : 1);
}

/* Columns of one task, where the work is divided by columns: in whole cache lines, as many as give each thread some. */
INLINE int64_t slice(int64_t D, int64_t threads) {
    int64_t columns = (D + threads - 1) / threads, line = 4 * LANES;
    return least(SLICE, (columns + line - 1) / line * line);
}

#include "route.h"

/* The mean of each instance's pooled tokens, and the routers' products with it: the logits. */
static void pool(const call *c) {
    int64_t B = c->B, D = c->D, E = c->E, columns = slice(D, c->threads);
    const float *rows[2 * WIDEST];
    float one[STRIP];
    for (int64_t e = 0; e < E; e++) rows[e] = c->router_a + e * D, rows[E + e] = c->router_b + e * D;
    for (int t = 0; t < STRIP; t++) one[t] = 1;
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < B; b++)
            for (int64_t d = 0; d < D; d += columns) {
                float *out = c->mean + b * D + d, share = share_of(c, b);
                int64_t end = begin(c, b + 1), width = least(columns, D - d);
                memset(out, 0, width * sizeof(float));
                for (int64_t t = begin(c, b), n; t < end; t += n) {
                    n = 1;
                    if (c->mask && !c->mask[t]) continue; /* not multiplied by 0: padding may be infinite */
                    while (n < STRIP && t + n < end && !(c->mask && !c->mask[t + n])) n++;
                    collect_rows(c->x + t * c->stride + d, c->stride, n, &out, 1, width, one, 1);
                }
                for (int64_t k = 0; k < width; k++) out[k] *= share;
            }
#pragma omp for collapse(2) schedule(static)
        for (int64_t b = 0; b < B; b += TOKENS)
            for (int64_t e = 0; e < 2 * E; e += ROWS)
                project_rows(c->mean + b * D, D, least(TOKENS, B - b), rows + e, least(ROWS, 2 * E - e), D,
                             c->logits + b * 2 * E + e, 2 * E);
    }
}

/* weight[t, i] = scale gate_i chosen[t, i] for n tokens of instance b */
INLINE void weigh(const call *c, int64_t b, int64_t t, int64_t n, float *weight) {
    for (int64_t k = 0; k < n; k++)
        for (int64_t i = 0; i < c->r; i++)
            weight[k * c->r + i] = (float)c->scale * c->gate[b * c->r + i] * c->chosen[(t + k) * c->r + i];
}

/* chosen, and y = from + sum_i weight_i lora_B[index_b[i]]. */
static void expand(const call *c) {
    int64_t N = c->N, D = c->D, O = c->O, r = c->r, strip = least(STRIP, (N + c->threads - 1) / c->threads);
#pragma omp parallel for schedule(static) num_threads((int)c->threads)
    for (int64_t first = 0; first < N; first += strip) {
        const float *rows_a[WIDEST], *rows_b[WIDEST];
        float weight[STRIP * WIDEST];
        int64_t end = least(first + strip, N), b = instance_of(c, first);
        for (int64_t t = first, n; t < end; t += n, b++) {
            n = least(end, begin(c, b + 1)) - t;
            for (int64_t i = 0; i < r; i++) {
                rows_a[i] = c->lora_a + c->index_a[b * r + i] * D;
                rows_b[i] = c->lora_b + c->index_b[b * r + i] * O;
            }
            project_rows(c->x + t * c->stride, c->stride, n, rows_a, r, D, c->chosen + t * r, r);
            weigh(c, b, t, n, weight);
            update_rows(c->y + t * O, c->from + t * O, O, n, rows_b, r, O, weight, r);
        }
    }
}

/* grad [E, D] = the sum of the parts [parts, E, D], in their order; a single part is grad itself. */
static void add_parts(const float *part, int64_t parts, int64_t E, int64_t D, float *grad) {
#pragma omp for schedule(static)
    for (int64_t e = 0; e < (grad && parts > 1 ? E : 0); e++) {
        const float *rows[1], one[1] = {1};
        memcpy(grad + e * D, part + e * D, D * sizeof(float));
        for (int64_t k = 1; k < parts; k++) {
            rows[0] = part + (k * E + e) * D;
            update_rows(grad + e * D, grad + e * D, 0, 1, rows, 1, D, one, 0);
        }
    }
}

/* From dy: du, dgate and dlora_b. */
static void expand_backward(const call *c) {
    int64_t N = c->N, O = c->O, E = c->E, r = c->r;
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for schedule(static)
        for (int64_t k = 0; k < c->parts; k++) {
            const float *rows[WIDEST];
            float *grads[WIDEST], weight[STRIP * WIDEST], *part = c->part_b + k * E * O;
            int64_t end = N * (k + 1) / c->parts, b = 0;
            if (c->dlora_b) memset(part, 0, E * O * sizeof(float));
            for (int64_t t = N * k / c->parts, n; t < end; t += n) {
                b = instance_of(c, t);
                n = least(STRIP, least(end, begin(c, b + 1)) - t);
                for (int64_t i = 0; i < r; i++) rows[i] = c->lora_b + c->index_b[b * r + i] * O;
                project_rows(c->dy + t * O, O, n, rows, r, O, c->du + t * r, r);
                if (!c->dlora_b) continue;
                for (int64_t i = 0; i < r; i++) grads[i] = part + c->index_b[b * r + i] * O;
                weigh(c, b, t, n, weight);
                collect_rows(c->dy + t * O, O, n, grads, r, O, weight, r);
            }
        }
#pragma omp for schedule(static) nowait
        for (int64_t b = 0; b < c->B; b++)
            for (int64_t i = 0; i < r; i++) {
                double sum = 0, weight = c->scale * c->gate[b * r + i];
                for (int64_t t = begin(c, b), end = begin(c, b + 1); t < end; t++) {
                    sum += (double)c->chosen[t * r + i] * c->du[t * r + i];
                    c->du[t * r + i] *= (float)weight;
                }
                c->dgate[b * r + i] = (float)(sum * c->scale);
            }
        add_parts(c->part_b, c->parts, E, O, c->dlora_b);
    }
}

/* From du and dlogits: dx, dlora_a and drouters. */
static void project_backward(const call *c) {
    int64_t B = c->B, N = c->N, D = c->D, E = c->E, r = c->r, pools = c->dlogits && c->mean, R = r + (pools != 0);
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < (pools && c->dx ? B : 0); b++) {
            const float *rows[2 * WIDEST];
            float weight[2 * WIDEST], share = share_of(c, b), *dmean = c->dmean + b * D;
            for (int64_t e = 0; e < E; e++) rows[e] = c->router_a + e * D, rows[E + e] = c->router_b + e * D;
            for (int64_t e = 0; e < 2 * E; e++) weight[e] = share * c->dlogits[b * 2 * E + e];
            memset(dmean, 0, D * sizeof(float));
            update_rows(dmean, dmean, 0, 1, rows, 2 * E, D, weight, 0);
        }
#pragma omp for schedule(static) nowait
        for (int64_t e = 0; e < (pools ? 2 * E : 0); e += ROWS) {
            float *grads[ROWS];
            int64_t width = least(ROWS, 2 * E - e);
            memset(c->drouters + e * D, 0, width * D * sizeof(float));
            for (int64_t i = 0; i < width; i++) grads[i] = c->drouters + (e + i) * D;
            for (int64_t b = 0; b < B; b += STRIP)
                collect_rows(c->mean + b * D, D, least(STRIP, B - b), grads, width, D, c->dlogits + b * 2 * E + e,
                             2 * E);
        }
#pragma omp for schedule(static)
        for (int64_t k = 0; k < c->parts; k++) {
            const float *rows[WIDEST + 1];
            float *grads[WIDEST], weight[STRIP * (WIDEST + 1)], *part = c->part_a + k * E * D;
            int64_t end = N * (k + 1) / c->parts, b = 0;
            if (c->dlora_a) memset(part, 0, E * D * sizeof(float));
            for (int64_t t = N * k / c->parts, n; t < end; t += n) {
                b = instance_of(c, t);
                n = least(STRIP, least(end, begin(c, b + 1)) - t);
                for (int64_t j = 0; j < n; j++) {
                    memcpy(weight + j * R, c->du + (t + j) * r, r * sizeof(float));
                    if (pools) weight[j * R + r] = !c->mask || c->mask[t + j];
                }
                if (c->dx) {
                    for (int64_t i = 0; i < r; i++) rows[i] = c->lora_a + c->index_a[b * r + i] * D;
                    rows[r] = c->dmean + b * D;
                    update_rows(c->dx + t * D, c->dx + t * D, D, n, rows, R, D, weight, R);
                }
                if (c->dlora_a) {
                    for (int64_t i = 0; i < r; i++) grads[i] = part + c->index_a[b * r + i] * D;
                    collect_rows(c->x + t * c->stride, c->stride, n, grads, r, D, weight, R);
                }
            }
        }
        add_parts(c->part_a, c->parts, E, D, c->dlora_a);
    }
}

/* What Python's side has to agree on before the first call. */
int mixlora_call_bytes(void) { return sizeof(call); }

/* 1 where an index that was given is out of range, else 0. */
int mixlora_forward(const call *c) {
    if (!c->logits)
        for (int64_t k = 0; k < c->B * c->r; k++)
            if (c->index_a[k] < 0 || c->index_a[k] >= c->E || c->index_b[k] < 0 || c->index_b[k] >= c->E) return 1;
    if (c->mean) pool(c);
    if (c->logits) route(c);
    expand(c);
    return 0;
}

int mixlora_backward(const call *c) {
    expand_backward(c);
    if (c->dlogits) route_backward(c);
    project_backward(c);
    if (c->dtable && c->router_ab) table_backward(c);
    return 0;
}
