/* Three products with rows that are gathered by pointer, never copied:

    project     out[t, i]  = x[t] . row_i                     reads x once
    update      y[t]       = from[t] + sum_i weight[t, i] row_i
    collect     grad_i    += sum_t weight[t, i] x[t]          reads x once

Each runs over tiles of up to four tokens and rows whose sums stay in registers; a row's length is arbitrary. */

#include <stdint.h>
#include <string.h>

/* Compiled once for each of three generations of x86, chosen when the library is loaded; elsewhere once. */
#ifndef EACH_CPU
#if defined(__x86_64__) && defined(__gnu_linux__) && __GNUC__ >= 12 && !defined(__clang__)
#define EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define EACH_CPU __attribute__((noinline))
#endif
#endif
#define INLINE static inline __attribute__((always_inline))

enum {
    LANES = 16,
    TOKENS = 4,   /* of a tile, whose sums stay in registers */
    ROWS = 4,     /* of a tile */
    UPDATED = 5,  /* rows of an update's tile: four factors and the mean's gradient */
    STRIP = 32,   /* tokens that are handled while they are in the cache */
    CHUNK = 1024, /* columns of four rows that stay in the first-level cache */
    SLICE = 512,  /* columns of a task, at most, where the work is divided by columns */
    WIDEST = 512, /* factors in a pool, at most; Python checks it */
};
typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE float total(vec v) {
    float part[LANES];
    for (int i = 0; i < LANES; i++) part[i] = v[i];
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

/* n tokens from t on, in tiles of TILE(T, R), and the choice of R, both of which the compiler has to know. */
#define TILES(R)                                              \
    {                                                         \
        for (; t + TOKENS <= n; t += TOKENS) TILE(TOKENS, R); \
        for (; t < n; t++) TILE(1, R);                        \
    }
#define UP_TO_FOUR(rows, RUN) \
    switch (rows) {           \
        case 1: RUN(1) break; \
        case 2: RUN(2) break; \
        case 3: RUN(3) break; \
        default: RUN(4)       \
    }

/* ---- project ---------------------------------------------------------------------------------------------------- */

INLINE void project_tile(int T, int R, const float *x, int64_t stride, const float *const *rows, int64_t D, float *out,
                         int64_t out_stride) {
    vec sums[TOKENS][ROWS];
    float rest[TOKENS][ROWS];
    int64_t d = 0;
    for (int t = 0; t < T; t++)
        for (int i = 0; i < R; i++) sums[t][i] = (vec){0}, rest[t][i] = 0;
    for (; d + LANES <= D; d += LANES) {
        vec row[ROWS];
        for (int i = 0; i < R; i++) row[i] = load(rows[i] + d);
        for (int t = 0; t < T; t++) {
            vec value = load(x + t * stride + d);
            __builtin_prefetch(x + (t + T) * stride + d); /* the next tile's, which no hardware foresees */
            for (int i = 0; i < R; i++) sums[t][i] += value * row[i];
        }
    }
    for (; d < D; d++)
        for (int t = 0; t < T; t++)
            for (int i = 0; i < R; i++) rest[t][i] += x[t * stride + d] * rows[i][d];
    for (int t = 0; t < T; t++)
        for (int i = 0; i < R; i++) out[t * out_stride + i] += total(sums[t][i]) + rest[t][i];
}

/* out[t, i] = x[t] . row_i for n tokens and R rows. */
EACH_CPU static void project_rows(const float *x, int64_t stride, int64_t n, const float *const *rows, int64_t R,
                                  int64_t D, float *out, int64_t out_stride) {
    for (int64_t t = 0; t < n; t++) memset(out + t * out_stride, 0, R * sizeof(float));
    for (int64_t i = 0; i < R; i += ROWS)
        for (int64_t d = 0; d < D; d += CHUNK) {
            const float *part[ROWS];
            int64_t columns = least(CHUNK, D - d), width = least(ROWS, R - i), t = 0;
            for (int64_t k = 0; k < width; k++) part[k] = rows[i + k] + d;
#define TILE(T, R) project_tile(T, R, x + t * stride + d, stride, part, columns, out + t * out_stride + i, out_stride)
            UP_TO_FOUR(width, TILES)
#undef TILE
        }
}

/* ---- update ----------------------------------------------------------------------------------------------------- */

INLINE void update_tile(int T, int R, float *y, const float *from, int64_t stride, const float *const *rows, int64_t D,
                        const float *weight, int64_t weight_stride) {
    int64_t d = 0;
    for (; d + LANES <= D; d += LANES) {
        vec row[UPDATED];
        for (int i = 0; i < R; i++) row[i] = load(rows[i] + d);
        for (int t = 0; t < T; t++) {
            vec value = load(from + t * stride + d);
            for (int i = 0; i < R; i++) value += weight[t * weight_stride + i] * row[i];
            store(y + t * stride + d, value);
        }
    }
    for (; d < D; d++)
        for (int t = 0; t < T; t++) {
            float value = from[t * stride + d];
            for (int i = 0; i < R; i++) value += weight[t * weight_stride + i] * rows[i][d];
            y[t * stride + d] = value;
        }
}

/* y[t] = from[t] + sum_i weight[t, i] row_i for n tokens and R rows. */
EACH_CPU static void update_rows(float *y, const float *from, int64_t stride, int64_t n, const float *const *rows,
                                 int64_t R, int64_t D, const float *weight, int64_t weight_stride) {
    for (int64_t i = 0; i < R; i += UPDATED, from = y) {
        int64_t t = 0;
#define TILE(T, R)                                                                                         \
    update_tile(T, R, y + t * stride, from + t * stride, stride, rows + i, D, weight + t * weight_stride + i, \
                weight_stride)
        switch (least(UPDATED, R - i)) {
            case 1: TILES(1) break;
            case 2: TILES(2) break;
            case 3: TILES(3) break;
            case 4: TILES(4) break;
            default: TILES(5)
        }
#undef TILE
    }
}

/* ---- collect ---------------------------------------------------------------------------------------------------- */

INLINE void collect_tile(int R, int vectors, const float *x, int64_t stride, int64_t n, float *const *grads, int64_t d,
                         const float *weight, int64_t weight_stride) {
    vec sums[ROWS][4];
    for (int i = 0; i < R; i++)
        for (int k = 0; k < vectors; k++) sums[i][k] = (vec){0};
    for (int64_t t = 0; t < n; t++) {
        vec value[4];
        for (int k = 0; k < vectors; k++) {
            value[k] = load(x + t * stride + d + k * LANES);
            __builtin_prefetch(x + t * stride + d + (k + vectors) * LANES, 0, 2); /* the next block's */
        }
        for (int i = 0; i < R; i++)
            for (int k = 0; k < vectors; k++) sums[i][k] += weight[t * weight_stride + i] * value[k];
    }
    for (int i = 0; i < R; i++)
        for (int k = 0; k < vectors; k++) {
            float *grad = grads[i] + d + k * LANES;
            store(grad, load(grad) + sums[i][k]);
        }
}

/* grad_i += sum_t weight[t, i] x[t] for n tokens and R rows. */
EACH_CPU static void collect_rows(const float *x, int64_t stride, int64_t n, float *const *grads, int64_t R, int64_t D,
                                  const float *weight, int64_t weight_stride) {
    for (int64_t i = 0; i < R; i += ROWS) {
        int64_t d = 0;
#define TILE(R, vectors) collect_tile(R, vectors, x, stride, n, grads + i, d, weight + i, weight_stride)
#define COLUMNS(R)                                             \
    {                                                          \
        for (; d + 4 * LANES <= D; d += 4 * LANES) TILE(R, 4); \
        for (; d + LANES <= D; d += LANES) TILE(R, 1);         \
    }
        int64_t width = least(ROWS, R - i);
        UP_TO_FOUR(width, COLUMNS)
#undef TILE
        for (; d < D; d++)
            for (int64_t k = i; k < i + width; k++) {
                float sum = 0;
                for (int64_t t = 0; t < n; t++) sum += weight[t * weight_stride + k] * x[t * stride + d];
                grads[k][d] += sum;
            }
    }
}
