"""The Triton kernels, forward and backward."""

from . import Mutation

_KERNELS = "mixlora_kernels/backends/kernels"
_EVERY_MODE = "tests/backends/test_layer.py::test_every_mode"
_MODE = f"{_EVERY_MODE}[triton-instance-factors-straight_through]"

MUTATIONS = [
    Mutation(
        "project: padding is multiplied by 0", f"{_KERNELS}/project.py",
        "read = tl.where(pooled[:, None], read, 0.0)", "read = read * pooled[:, None].to(tl.float32)",
        "tests/backends/test_layer.py::test_padding_may_hold_anything",
    ),
    Mutation(
        "project: the last column is left out", f"{_KERNELS}/project.py", "inside = d < D", "inside = d < D - 1",
        _MODE,
    ),
    Mutation(
        "project: siblings drop the same", f"{_KERNELS}/project.py",
        "keep_tile(seeds + g, rows", "keep_tile(seeds, rows",
        "tests/backends/test_siblings.py::test_as_single_layers",
    ),
    Mutation(
        "decode: a transposed output is copied as it lies", f"{_KERNELS}/decode.py",
        "y.clone(memory_format=torch.contiguous_format)", "y.clone()",
        "tests/backends/test_strided.py::test_a_bases_output_while_decoding",
    ),
    Mutation(
        "pool: the mean is a sum", f"{_KERNELS}/pool.py",
        "row = tl.sum(total, 0) * token_weight", "row = tl.sum(total, 0)", _MODE,
    ),
    Mutation(
        "route: of equal probabilities the higher index", f"{_KERNELS}/route.py",
        "tl.min(tl.where(left == tl.max(left, 0), e, E_PAD - 1), 0)",
        "tl.max(tl.where(left == tl.max(left, 0), e, 0), 0)",
        "tests/backends/test_route.py::test_ties_go_to_the_lower_index",
    ),
    Mutation(
        "route: an index beyond the pool where logits are no numbers", f"{_KERNELS}/route.py",
        'tl.where(inside, tl.where(p == p, p, float("inf")), float("-inf"))', 'tl.where(inside, p, float("-inf"))',
        "tests/backends/test_route.py::test_indices_are_valid_whatever_the_logits",
    ),
    Mutation(
        "route: the last slot alone conditions B", f"{_KERNELS}/route.py", "said += q_i", "said = q_i",
        _MODE,
    ),
    Mutation(
        "route: B's gate has the sum of A's", f"{_KERNELS}/route.py",
        "gates *= TOTAL * weight / tl.sum(weight, 0)", "gates *= weight / tl.sum(weight, 0)",
        "tests/backends/test_route.py::test_the_gates_of_equal_probabilities",
    ),
    Mutation(
        "route, back: p_CFS is taken for its logits", f"{_KERNELS}/route.py",
        "dq = softmax_backward(dp, tl.load(kept + E + e, mask=inside, other=0.0))", "dq = dp",
        _MODE,
    ),
    Mutation(
        "route, back: a share's gradient as if its sum were constant", f"{_KERNELS}/route.py",
        "dchosen = TOTAL * (dchosen - tl.sum(dchosen * p, 0) / sum_p) / sum_p", "dchosen = TOTAL * dchosen / sum_p",
        f"{_EVERY_MODE}[triton-instance-none-weighted]",
    ),
    Mutation(
        "expand: the gate is left out", f"{_KERNELS}/expand.py",
        "u_tile * slot_weights(gate, scale, row, R, R_PAD)[None, :]", "u_tile * scale",
        f"{_EVERY_MODE}[triton-instance-none-weighted]",
    ),
    Mutation(
        "expand: the base is not added", f"{_KERNELS}/expand.py", "added += before", "added += 0.0",
        _MODE,
    ),
    Mutation(
        "expand, back: the gate's gradient without the scale", f"{_KERNELS}/expand_backward.py",
        "product = scale * tl.sum(acc * b_tile.to(tl.float32), 1)", "product = tl.sum(acc * b_tile.to(tl.float32), 1)",
        _MODE,
    ),
    Mutation(
        "expand, back: the first piece of du alone", f"{_KERNELS}/expand_backward.py",
        "for _ in range(first, last):", "for _ in range(first, first + 1):",
        "tests/backends/test_layer.py::test_shapes",
    ),
    Mutation(
        "expand, back: a given routing is of tied pairs", f"{_KERNELS}/expand_backward.py",
        "None if options.tied and group.given is None else", "None if options.tied else",
        "tests/backends/test_given.py::test_tied_pairs_may_be_untied",
    ),
    Mutation(
        "walk: x's gradient is not dropped", f"{_KERNELS}/walk.py", "step = tl.where(keep, step, 0.0)", "step = step",
        "tests/backends/test_dropout.py::test_the_layer_with_its_mask",
    ),
    Mutation(
        "walk: padding gets a share of the routers' gradient", f"{_KERNELS}/walk.py",
        "update += tl.where(pooled[:, None], spread_row[None, :], 0.0)",
        "update += tl.where(live[:, None], spread_row[None, :], 0.0)",
        "tests/backends/test_stages.py::test_as_plain_torch",
    ),
    Mutation(
        "walk: the second block of a chunk takes the first one's place", f"{_KERNELS}/walk.py",
        "            if parts is not None:\n                sums = added\n", "            sums = added\n",
        "tests/backends/test_layer.py::test_gradients_that_nobody_needs",
    ),
    Mutation(
        "dropout: every block of columns draws the first one's mask", f"{_KERNELS}/dropout.py",
        " + first_column // PER_DRAW", "", "tests/backends/test_dropout.py::test_the_mask",
    ),
    Mutation(
        "routers, back: the mean's share is left out", f"{_KERNELS}/routers_backward.py", "acc * token_weight", "acc",
        _MODE,
    ),
    Mutation(
        "project, back: what comes to lora_A through T is left out", f"{_KERNELS}/project_backward.py",
        'acc = tl.dot(turned, ab_tile, acc, input_precision="ieee")', "acc = acc",
        _MODE,
    ),
    Mutation(
        "gather: the gate is left out", f"{_KERNELS}/gather.py", "if gate is not None:", "if gate is None:",
        f"{_EVERY_MODE}[triton-instance-none-weighted]",
    ),
    Mutation(
        "tiles: a packed instance begins a tile too late", f"{_KERNELS}/tiles.py",
        "(upto > tile) & (upto - counts <= tile)", "(upto >= tile) & (upto - counts < tile)",
        "tests/backends/test_layer.py::test_packed",
    ),
    Mutation(
        "decode: the gate without the scale", f"{_KERNELS}/decode.py",
        "weight = scale * tl.load(gate", "weight = tl.load(gate",
        "tests/backends/test_ops.py::test_decoding_is_one_launch",
    ),
    Mutation(
        "decode: the first instance's choice for all", f"{_KERNELS}/decode.py",
        "row = (g * B + b) * R", "row = g * B * R + 0 * b", "tests/backends/test_ops.py::test_decoding_is_one_launch",
    ),
    Mutation(
        "launch: later launches pass their arguments in another order", f"{_KERNELS}/launch.py",
        "run(*arguments.values())", "run(*{**tensors, **arguments}.values())", "tests/backends/test_launcher.py",
    ),
]  # fmt: skip
