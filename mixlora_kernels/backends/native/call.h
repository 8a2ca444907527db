/* One call of the operation, filled in by call.py, field for field. Arrays are contiguous float32 (indices int64), x's
   rows may be further apart; what is NULL is not there, or not wanted. */

#include <stdint.h>

enum { BINARY, STRAIGHT_THROUGH, WEIGHTED };

typedef struct {
    int64_t B, N, D, O, E, r; /* instances, tokens, d_in, d_out, factors, chosen ones */
    int64_t stride;           /* between rows of x */
    int64_t gating;
    int64_t threads;
    int64_t parts; /* of a sum over tokens, each a thread's own */
    double scale;

    const int64_t *starts; /* [B + 1], where packed instances begin; NULL: rows of equal length */
    const uint8_t *mask;   /* [N], the tokens that are pooled; NULL: all */
    const float *lora_a, *lora_b, *router_a, *router_b, *router_ab;

    /* forward */
    const float *x, *from; /* [N, D], [N, O] */
    float *y;              /* [N, O]; may be from */
    float *mean;           /* [B, D]; NULL: no router reads x */
    float *logits;         /* [B, 2E]; NULL: the routing is given */
    float *table;          /* [r, E, E]; NULL: no conditioning. Filled in where there is a router_ab */
    int64_t *index_a, *index_b;               /* [B, r] */
    float *gate, *probs_a, *probs_b;          /* [B, r], [B, E], [B, E] */
    float *p_ifs, *p_cfs, *q;                 /* [B, E], [B, E], [B, r, E]: softmaxes on the way to probs_b */
    float *chosen;                            /* [N, r], lora_A[index_a[i]] . x */

    /* backward: gradients of what is named, in and out */
    const float *dy, *dgate_given, *dprobs_a, *dprobs_b;
    float *dx;       /* [N, D], added to */
    float *du;       /* [N, r], that of chosen */
    float *dgate;    /* [B, r], without and, where the routers learn, with dgate_given */
    float *dlogits;  /* [B, 2E]; NULL: no router learns */
    float *dq;       /* [B, E], the same for every slot */
    float *dtable;   /* [r, E, E] */
    float *dmean;    /* [B, D], a token's share of it */
    float *part_a, *part_b; /* [parts, E, D], [parts, E, O]; dlora_a and dlora_b themselves where parts is 1 */
    float *dlora_a, *dlora_b, *drouters, *drouter_ab; /* drouters [2E, D] */
} call;
