"""The reference, routing, gates, pooling, dropout and siblings of the layer; the backend in plain torch."""

from . import Mutation

_REFERENCE, _OP, _ROUTING = "mixlora_kernels/reference.py", "mixlora_kernels/op.py", "mixlora_kernels/routing.py"
_NODE, _DROPOUT = "mixlora_kernels/backends/node.py", "mixlora_kernels/dropout.py"
_EAGER = "mixlora_kernels/backends/eager"
_EVERY_MODE = "tests/test_functional.py::test_every_mode"

MUTATIONS = [
    Mutation(
        "operation: a given gate keeps its low precision", "mixlora_kernels/routing.py",
        "gate.to(torch.promote_types(gate.dtype, dtype))", "gate",
        "tests/backends/test_given.py::test_a_gate_of_low_precision_is_a_number_like_any_other",
    ),
    Mutation(
        "project: a block's tokens belong to its first instance", "mixlora_kernels/backends/eager/project.py",
        "index_add_(0, instance[rows] - first, part)", "index_add_(0, instance[rows] * 0, part)",
        "tests/test_invariances.py::test_packed_equals_separate",
    ),
    Mutation(
        "reference: of equal probabilities the higher index", _REFERENCE,
        "torch.sort(p, descending=True, stable=True).indices[:r]",
        "len(p) - 1 - torch.sort(p.flip(0), descending=True, stable=True).indices[:r]",
        "tests/test_reference.py::test_ties_go_to_the_lower_index",
    ),
    Mutation(
        "reference: Equation 7 without its inner softmax", _REFERENCE,
        "(torch.softmax(router_AB[i] @ A[i], dim=-1)", "(router_AB[i] @ A[i]",
        "tests/test_reference.py::test_conditional_router_by_hand",
    ),
    Mutation(
        "reference: normalized gates have a sum of 1, not a mean", _REFERENCE,
        "(len(p) * p / p.sum()", "(p / p.sum()",
        "tests/test_reference.py",
    ),
    Mutation(
        "reference: the mean runs over padding", _REFERENCE, "h = h[mask.bool()]", "h = h",
        "tests/test_reference.py::test_masked_average",
    ),
    Mutation(
        "routing: of equal probabilities the higher index", f"{_EAGER}/route.py",
        "torch.sort(p, dim=-1, descending=True, stable=True)[1][..., :r]",
        "(p.shape[-1] - 1 - torch.sort(p.flip(-1), dim=-1, descending=True, stable=True)[1])[..., :r]",
        "tests/test_invariances.py::test_ties_go_to_the_lower_index",
    ),
    Mutation(
        "routing: slots in the order of their index", f"{_EAGER}/route.py",
        "stable=True)[1][..., :r].contiguous()", "stable=True)[1][..., :r].sort(-1)[0]",
        _EVERY_MODE,
    ),
    Mutation(
        "routing: T is looked up the wrong way round", f"{_EAGER}/route.py",
        "lora_A.T).view(router_AB.shape[0], -1, lora_A.shape[0])",
        "lora_A.T).view(router_AB.shape[0], -1, lora_A.shape[0]).mT.contiguous()",
        _EVERY_MODE,
    ),
    Mutation(
        "routing: Equation 8 without p_CFS", f"{_EAGER}/route.py", "probs_b = p_ifs + p_cfs", "probs_b = p_ifs",
        _EVERY_MODE,
    ),
    Mutation(
        "routing: half precision", "mixlora_kernels/backends/base.py",
        "torch.promote_types(self.dtype, torch.float32)", "self.dtype",
        "tests/test_precision.py::test_routing_is_computed_in_float32",
    ),
    Mutation(
        "routing: random factors with repetition", _OP,
        "torch.rand(count, config.num_factors, device=device).argsort(-1)[:, : config.r]",
        "torch.randint(config.num_factors, (count, config.r), device=device)",
        "tests/test_functional.py::test_random_routing_draws_distinct_factors_from_torchs_generator",
    ),
    Mutation(
        "gates: straight-through forgets B's probabilities", f"{_EAGER}/route.py",
        "return [dgate] * len(choices)", "return [dgate, *[0 * dgate for _ in choices[1:]]]",
        "tests/test_functional.py::test_straight_through",
    ),
    Mutation(
        "gates: a renormalised probability's gradient as if its sum were constant", f"{_EAGER}/route.py",
        "(dp - (dp * p).sum(-1, keepdim=True) / p.sum(-1, keepdim=True)) / total", "dp / total",
        "tests/test_functional.py::test_gradcheck",
    ),
    Mutation(
        "gates: weighted is the normalized one", f"{_EAGER}/route.py",
        'if gate == "normalized" else p.sum', 'if gate != "binary" else p.sum',
        _EVERY_MODE,
    ),
    Mutation(
        "gates: that of a kept routing gets no gradient", _NODE,
        "None, dgate, None, None, *down", "None, None, None, None, *down",
        "tests/test_functional.py::test_kept_routing_repeats_the_choice_and_passes_the_gradient_to_its_gate",
    ),
    Mutation(
        "backward: the routers' share of x's gradient is left out", f"{_EAGER}/project.py",
        "_mean_backward(dx, routers.read, instances)", "pass",
        _EVERY_MODE,
    ),
    Mutation(
        "backward: an unchosen factor's gradient is only nearly zero", f"{_EAGER}/rank_r.py",
        "total = torch.zeros(chosen.pool.shape,", "total = torch.full(chosen.pool.shape, 1e-30,",
        "tests/test_invariances.py::test_a_factor_that_nobody_chose_has_an_exactly_zero_gradient",
    ),
    Mutation(
        "backward: what comes to lora_A through T is left out", f"{_EAGER}/project.py",
        "d.to(table.dtype).add_(table)", "d",
        _EVERY_MODE,
    ),
    Mutation(
        "pooling: padding is multiplied by 0", f"{_EAGER}/project.py",
        "part.masked_fill(~mask[rows, None], 0)", "part * mask[rows, None]",
        "tests/test_invariances.py::test_what_stands_in_the_padding_may_be_anything",
    ),
    Mutation(
        "pooling: the mean counts padding", _ROUTING,
        "return 1.0 / pooled.clamp(min=1)",
        "return torch.full_like(pooled, 1.0 / (instances.length or 1))",
        "tests/test_invariances.py::test_padding_changes_nothing",
    ),
    Mutation(
        "pooling: a packed instance loses its first token to the one before", _ROUTING,
        "cu_seqlens[1:], right=True", "cu_seqlens[1:], right=False",
        "tests/test_invariances.py::test_packed_equals_separate",
    ),
    Mutation(
        "torch: of two slots of one factor the last is kept", f"{_EAGER}/rank_r.py", "scatter_add_(", "scatter_(",
        "tests/backends/test_given.py::test_a_factor_may_be_paired_twice",
    ),
    Mutation(
        "torch: a masked token gets a share of the mean's gradient", f"{_EAGER}/project.py",
        "token.masked_fill(~mask, instances.count)", "token", _EVERY_MODE,
    ),
    Mutation(
        "dropout: the backward forgets the mask", f"{_EAGER}/dropout.py",
        "dlora_A += du[rows].T @ part", "dlora_A += du[rows].T @ x[rows]",
        "tests/test_dropout.py::test_the_backward_drops_what_the_forward_dropped",
    ),
    Mutation(
        "dropout: the scale is that of a p which is not applied", _DROPOUT,
        "1.0 / (1.0 - dropped_levels(p) / LEVELS)", "1.0 / (1.0 - p)",
        "tests/test_dropout.py",
    ),
    Mutation(
        "dropout: in evaluation too", _OP,
        "config.dropout if training and dropped_levels", "config.dropout if dropped_levels",
        "tests/test_dropout.py::test_no_dropout_in_evaluation_and_none_at_zero",
    ),
    Mutation(
        "dropout: siblings drop the same", _DROPOUT,
        "torch.randint(1 << 62, (count,), device=device)",
        "torch.randint(1 << 62, (1,), device=device).repeat(count)",
        "tests/test_siblings.py::test_as_single_layers",
    ),
    Mutation(
        "siblings: x gets the frozen gradient of the last alone", _NODE,
        "frozen_product_backward(dy, base.weight, dx)", "frozen_product_backward(dy, base.weight, None)",
        "tests/test_siblings.py::test_as_single_layers",
    ),
    Mutation(
        "siblings: one that nobody used gets a gradient of zeros", _NODE,
        "d is not None and not unused[g] else None", "d is not None else None",
        "tests/test_siblings.py::test_a_member_that_nobody_used_has_no_gradient",
    ),
    Mutation(
        "layer: a base that was given as an output is written to", f"{_EAGER}/expand.py",
        "[own and not torch.compiler.is_compiling() for own in fresh]", "[True for _ in fresh]",
        "tests/test_linear.py::test_a_base_that_returns_its_input_is_not_written_to",
    ),
]  # fmt: skip
