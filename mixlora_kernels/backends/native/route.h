/* From the routers' logits to the factors of each instance, and back. Equations 6 to 8, as in backends/torch/route.py:

    p_A = softmax(logits_a)                           index_a = top_r(p_A)
    c_i = T[i, :, index_a[i]]                         T[i] = router_AB[i] . lora_A^T
    p_CFS = softmax(sum_i softmax(c_i))
    p_B = softmax(logits_b) + p_CFS                   index_b = top_r(p_B)

Of T only the columns that an instance looks up are computed. */

#include <math.h>

static void softmax(const float *x, int64_t stride, int64_t E, float *p) {
    float largest = x[0], sum = 0;
    for (int64_t e = 1; e < E; e++)
        if (x[e * stride] > largest) largest = x[e * stride];
    for (int64_t e = 0; e < E; e++) sum += p[e] = expf(x[e * stride] - largest);
    for (int64_t e = 0; e < E; e++) p[e] /= sum;
}

/* dx = p (dp - sum dp p). Taken relative to dp at the most probable, so that nothing cancels where p is all but 1. */
static void softmax_backward(const float *dp, const float *p, int64_t E, float *dx) {
    int64_t most = 0;
    float sum = 0;
    for (int64_t e = 1; e < E; e++)
        if (p[e] > p[most]) most = e;
    const float level = dp[most];
    for (int64_t e = 0; e < E; e++) sum += (dp[e] - level) * p[e];
    for (int64_t e = 0; e < E; e++) dx[e] = p[e] * (dp[e] - level - sum);
}

/* The r largest in descending order; ties go to the lower index. Distinct and in range whatever p is. */
static void top_r(const float *p, int64_t E, int64_t r, int64_t *index) {
    uint8_t taken[WIDEST] = {0};
    for (int64_t i = 0; i < r; i++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++)
            if (!taken[e] && (best < 0 || p[e] > p[best])) best = e;
        taken[best] = 1;
        index[i] = best;
    }
}

/* The chosen probabilities renormalised over the r chosen; returns their sum. */
static float shares(const float *p, const int64_t *index, int64_t r, float *share) {
    float sum = 0;
    for (int64_t i = 0; i < r; i++) sum += p[index[i]];
    for (int64_t i = 0; i < r; i++) share[i] = p[index[i]] / sum;
    return sum;
}

/* d of the chosen probabilities from d of their shares. */
static void shares_backward(const float *dshare, const float *share, float sum, int64_t r, float *dchosen) {
    float inner = 0;
    for (int64_t i = 0; i < r; i++) inner += dshare[i] * share[i];
    for (int64_t i = 0; i < r; i++) dchosen[i] = (dshare[i] - inner) / sum;
}

/* The columns of T[i] that instances look up: their numbers, and how many. */
static int64_t find_used(const call *c, int64_t i, int64_t *used) {
    uint8_t seen[WIDEST] = {0};
    int64_t count = 0;
    for (int64_t b = 0; b < c->B; b++) seen[c->index_a[b * c->r + i]] = 1;
    for (int64_t a = 0; a < c->E; a++)
        if (seen[a]) used[count++] = a;
    return count;
}

static void route(const call *c) {
    int64_t B = c->B, E = c->E, r = c->r, D = c->D;
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            softmax(c->logits + b * 2 * E, 1, E, c->probs_a + b * E);
            softmax(c->logits + b * 2 * E + E, 1, E, c->p_ifs + b * E);
            top_r(c->probs_a + b * E, E, r, c->index_a + b * r);
        }
#pragma omp for collapse(2) schedule(static)
        for (int64_t i = 0; i < (c->table && c->router_ab ? r : 0); i++)
            for (int64_t e = 0; e < E; e += TOKENS) {
                const float *rows[WIDEST];
                float products[TOKENS * WIDEST];
                int64_t used[WIDEST], count = find_used(c, i, used), n = least(TOKENS, E - e);
                for (int64_t k = 0; k < count; k++) rows[k] = c->lora_a + used[k] * D;
                project_rows(c->router_ab + (i * E + e) * D, D, n, rows, count, D, products, count);
                for (int64_t k = 0; k < n * count; k++)
                    c->table[(i * E + e + k / count) * E + used[k % count]] = products[k];
            }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            float *probs_a = c->probs_a + b * E, *probs_b = c->probs_b + b * E, *gate = c->gate + b * r;
            int64_t *index_a = c->index_a + b * r, *index_b = c->index_b + b * r;
            memcpy(probs_b, c->p_ifs + b * E, E * sizeof(float));
            if (c->table) {
                float sum[WIDEST] = {0};
                for (int64_t i = 0; i < r; i++) {
                    float *slot = c->q + (b * r + i) * E;
                    softmax(c->table + i * E * E + index_a[i], E, E, slot);
                    for (int64_t e = 0; e < E; e++) sum[e] += slot[e];
                }
                softmax(sum, 1, E, c->p_cfs + b * E);
                for (int64_t e = 0; e < E; e++) probs_b[e] += c->p_cfs[b * E + e];
            }
            top_r(probs_b, E, r, index_b);
            for (int64_t i = 0; i < r; i++) gate[i] = 1;
            if (c->gating == WEIGHTED) {
                float share_a[WIDEST], share_b[WIDEST];
                shares(probs_a, index_a, r, share_a);
                shares(probs_b, index_b, r, share_b);
                for (int64_t i = 0; i < r; i++) gate[i] = share_a[i] * share_b[i];
            }
        }
    }
}

/* From dgate, dprobs_a and dprobs_b to dlogits and, with conditioning, dtable. */
static void route_backward(const call *c) {
    int64_t B = c->B, E = c->E, r = c->r;
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; b++) {
            const int64_t *index_a = c->index_a + b * r, *index_b = c->index_b + b * r;
            const float *probs_a = c->probs_a + b * E, *probs_b = c->probs_b + b * E;
            float da[WIDEST] = {0}, db[WIDEST] = {0}, dchosen_a[WIDEST], dchosen_b[WIDEST], *dgate = c->dgate + b * r;
            if (c->dprobs_a) memcpy(da, c->dprobs_a + b * E, E * sizeof(float));
            if (c->dprobs_b) memcpy(db, c->dprobs_b + b * E, E * sizeof(float));
            for (int64_t i = 0; i < r; i++) {
                if (c->dgate_given) dgate[i] += c->dgate_given[b * r + i];
                dchosen_a[i] = dchosen_b[i] = c->gating == BINARY ? 0 : dgate[i];
            }
            if (c->gating == WEIGHTED) {
                float share_a[WIDEST], share_b[WIDEST];
                float sum_a = shares(probs_a, index_a, r, share_a), sum_b = shares(probs_b, index_b, r, share_b);
                for (int64_t i = 0; i < r; i++) dchosen_a[i] *= share_b[i], dchosen_b[i] *= share_a[i];
                shares_backward(dchosen_a, share_a, sum_a, r, dchosen_a);
                shares_backward(dchosen_b, share_b, sum_b, r, dchosen_b);
            }
            for (int64_t i = 0; i < r; i++) da[index_a[i]] += dchosen_a[i], db[index_b[i]] += dchosen_b[i];
            softmax_backward(da, probs_a, E, c->dlogits + b * 2 * E);
            softmax_backward(db, c->p_ifs + b * E, E, c->dlogits + b * 2 * E + E);
            if (c->dtable) softmax_backward(db, c->p_cfs + b * E, E, c->dq + b * E);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < (c->dtable ? r : 0); i++) {
            float dc[WIDEST], *dtable = c->dtable + i * E * E;
            memset(dtable, 0, E * E * sizeof(float));
            for (int64_t b = 0; b < B; b++) {
                softmax_backward(c->dq + b * E, c->q + (b * r + i) * E, E, dc);
                for (int64_t e = 0; e < E; e++) dtable[e * E + c->index_a[b * r + i]] += dc[e];
            }
        }
    }
}

/* What comes through T = router_AB . lora_A^T: drouter_ab, and dlora_a's share, which is added. */
static void table_backward(const call *c) {
    int64_t E = c->E, r = c->r, D = c->D, columns = slice(D, c->threads);
#pragma omp parallel num_threads((int)c->threads)
    {
        const float *rows[WIDEST];
        float *grads[WIDEST], weight[STRIP * WIDEST];
        int64_t used[WIDEST];
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < (c->drouter_ab ? r : 0); i++) {
            int64_t count = find_used(c, i, used);
            for (int64_t k = 0; k < count; k++) rows[k] = c->lora_a + used[k] * D;
            for (int64_t e = 0, n; e < E; e += n) {
                float *out = c->drouter_ab + (i * E + e) * D;
                n = least(STRIP, E - e);
                for (int64_t k = 0; k < n * count; k++)
                    weight[k] = c->dtable[(i * E + e + k / count) * E + used[k % count]];
                memset(out, 0, n * D * sizeof(float));
                update_rows(out, out, D, n, rows, count, D, weight, count);
            }
        }
#pragma omp for schedule(static)
        for (int64_t d = 0; d < (c->dlora_a ? D : 0); d += columns)
            for (int64_t i = 0; i < r; i++) {
                int64_t count = find_used(c, i, used);
                for (int64_t k = 0; k < count; k++) grads[k] = c->dlora_a + used[k] * D + d;
                for (int64_t e = 0, n; e < E; e += n) {
                    n = least(STRIP, E - e);
                    for (int64_t k = 0; k < n * count; k++)
                        weight[k] = c->dtable[(i * E + e + k / count) * E + used[k % count]];
                    collect_rows(c->router_ab + (i * E + e) * D + d, D, n, grads, count, least(columns, D - d), weight,
                                 count);
                }
            }
    }
}
