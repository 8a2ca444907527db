"""The method in PEFT: caches and kept routing, prompts, siblings, checkpointing, what is refused on loading."""

from . import Mutation

_PEFT = "mixlora_kernels/peft"

MUTATIONS = [
    Mutation(
        "cache: the prompt's routing is not kept", f"{_PEFT}/side_information.py",
        "forward_pass.keep_routing(cache)", "pass",
        "tests/peft/test_exact_generation.py::test_one_routing_from_prefill_to_the_end",
    ),
    Mutation(
        "cache: every step routes anew", f"{_PEFT}/forward_pass.py",
        'if self.cached and config.decode == "prompt":', "if False:",
        "tests/peft/test_exact_generation.py::test_one_routing_from_prefill_to_the_end",
    ),
    Mutation(
        "cache: an unknown kind is let through", f"{_PEFT}/cache.py",
        'if name in NAMES or "cache" in type(value).__name__.lower():', "if False:",
        "tests/peft/test_cache.py::test_caches_of_an_unknown_kind",
    ),
    Mutation(
        "cache: a missing one is not noticed", f"{_PEFT}/forward_pass.py",
        "raise unseen_cache_error(evidence, self.training)", "pass",
        "tests/peft/test_cache.py::test_a_step_without_a_cache",
    ),
    Mutation(
        "cache: a prompt in chunks is let through", f"{_PEFT}/cache.py",
        "if kept is None or verifies or self.length > kept.length or (self.length == kept.length and kept.seen):",
        "if True:", "tests/peft/test_refused_inputs.py::test_a_prompt_in_chunks",
    ),
    Mutation(
        "cache: a generation without one is let through", f"{_PEFT}/model_inputs.py",
        "return before.device == ids.device and torch.equal(ids[:, :-1], before)", "return False",
        "tests/peft/test_refused_inputs.py::test_generation_without_a_cache",
    ),
    Mutation(
        "cache: one that was cut keeps its routing", f"{_PEFT}/cache.py",
        "if self.length < self.kept.length:", "if False:",
        "tests/peft/test_refused_inputs.py::test_a_cache_that_was_cut_or_reset",
    ),
    Mutation(
        "shapes: hidden states that begin with the tokens are instances", f"{_PEFT}/forward_pass.py",
        "if whole and x.shape[0] == B and x.dim() <= 3 and not last:", "if whole:",
        "tests/peft/test_refused_inputs.py::test_hidden_states_that_begin_with_the_tokens",
    ),
    Mutation(
        "shapes: a head is routed by the last token", f"{_PEFT}/forward_pass.py",
        "x.dim() <= 3 and not last:", "x.dim() <= 3:",
        "tests/peft/test_refused_inputs.py::test_a_head_that_gets_the_last_token_alone",
    ),
    Mutation(
        "shapes: packed rows keep the mask of rows", f"{_PEFT}/forward_pass.py",
        "mask = None if mask is None else mask.reshape(1, -1)", "pass",
        "tests/peft/test_exact_training.py::test_the_prompts_of_several_packed_rows",
    ),
    Mutation(
        "cache: a routing is any row's", f"{_PEFT}/cache.py",
        "if kept_rows != rows:", "if False:",
        "tests/peft/test_refused_inputs.py::test_rows_that_had_another_adapter_in_the_prompt",
    ),
    Mutation(
        "task: fewer embeddings are repeated in every forward", f"{_PEFT}/forward_pass.py",
        "elif self.inputs.repeats_task:", "else:",
        "tests/peft/test_refused_inputs.py::test_fewer_task_embeddings_than_instances",
    ),
    Mutation(
        "devices: the mask stays where it was", f"{_PEFT}/forward_pass.py",
        "context = context.to(x.device)", "pass",
        "tests/peft/test_unusual_models.py::test_layers_on_several_devices",
    ),
    Mutation(
        "running: a forward within a forward takes its place", f"{_PEFT}/running.py",
        "self._outer.append((self.inputs, self.forward_pass, self.passes))", "pass",
        "tests/peft/test_unusual_models.py::test_a_forward_within_a_forward",
    ),
    Mutation(
        "prompt: the answer is pooled as well", f"{_PEFT}/forward_pass.py", "mask = self._prompt(mask, starts)", "pass",
        "tests/peft/test_exact_pooling.py::test_a_training_forward_with_labels",
    ),
    Mutation(
        "text: images are pooled as well", f"{_PEFT}/media.py",
        "text, instance = prompt & ~media,", "text, instance = prompt.clone(),",
        "tests/peft/test_text.py::test_the_mean_is_that_of_the_text",
    ),
    Mutation(
        "text: the answer is pooled as well", f"{_PEFT}/forward_pass.py",
        "mask = text_of_prompt(media, mask,", "mask = text_of_prompt(media, None,",
        "tests/peft/test_text.py::test_training_routes_as_the_prompt_alone_does",
    ),
    Mutation(
        "balance: the losses of the layers are summed, not averaged", f"{_PEFT}/balance.py",
        "total.append(weight / count *", "total.append(weight *",
        "tests/peft/test_balance.py::test_the_models_loss_has_it",
    ),
    Mutation(
        "balance: every accumulated batch adds all of it", f"{_PEFT}/balance.py",
        "loss = loss + _part(inputs, shifted) *", "loss = loss + 1.0 *",
        "tests/peft/test_balance.py::test_accumulated_batches_add_their_parts",
    ),
    Mutation(
        "balance: the probabilities are detached", "mixlora_kernels/balance.py",
        "probs.mean(-2)", "probs.detach().mean(-2)", "tests/peft/test_balance.py::test_its_gradient",
    ),
    Mutation(
        "prompt: later turns belong to it", f"{_PEFT}/tokens.py",
        "prompt = (count == begin[instance]) & real", "prompt = (labels == IGNORED).flatten() & real",
        "tests/peft/test_exact_pooling.py::test_prompt_masks",
    ),
    Mutation(
        "padding: it is pooled", f"{_PEFT}/tokens.py",
        "return mask[:, mask.shape[1] - L :] != 0", "return torch.ones_like(mask[:, mask.shape[1] - L :] != 0)",
        "tests/peft/test_exact_training.py",
    ),
    Mutation(
        "packing: a row is one instance", f"{_PEFT}/tokens.py",
        "return starts if several else None", "return None",
        "tests/peft/test_exact_training.py",
    ),
    Mutation(
        "checkpointing: a recomputation sees no forward", f"{_PEFT}/side_information.py",
        "self.function(_WithinPass(self.side, self.side.forward_pass, layer), *args, **kwargs)",
        "self.function(layer, *args, **kwargs)",
        "tests/peft/test_exact_checkpointing.py",
    ),
    Mutation(
        "siblings: x that has changed since is taken for the same", f"{_PEFT}/siblings.py",
        "pending.x is x and _is_unchanged(x, pending.version) and", "pending.x is x and",
        "tests/peft/test_siblings.py::test_x_that_is_changed_between_the_calls",
    ),
    Mutation(
        "siblings: equal values are taken for the same x", f"{_PEFT}/siblings.py",
        "pending.x is x and _is_unchanged(x, pending.version) and", "torch.equal(pending.x, x) and",
        "tests/peft/test_siblings.py::test_equal_values_are_not_the_same_x",
    ),
    Mutation(
        "siblings: a layer's hooks do not run", f"{_PEFT}/siblings.py",
        "and not has_hooks(layer.base_layer)", "", "tests/peft/test_siblings.py",
    ),
    Mutation(
        "siblings: results outlive the forward", f"{_PEFT}/siblings.py",
        "idle = self._refused.union(self._pending)\n        self._pending.clear()\n",
        "idle = self._refused.union(self._pending)\n",
        "tests/peft/test_siblings.py",
    ),
    Mutation(
        "siblings: an adapter of another configuration joins in", f"{_PEFT}/siblings.py",
        "        id(layer.configs.get(name)),\n", "",
        "tests/peft/test_siblings.py::test_adapters_that_differ_compute_alone",
    ),
    Mutation(
        "training: the routers of a binary gate learn", f"{_PEFT}/layer.py",
        "parameter.requires_grad_(False)", "parameter.requires_grad_(True)",
        "tests/peft/test_method.py",
    ),
    Mutation(
        "adapter_names: rows of the base are adapted", f"{_PEFT}/layer.py",
        "if row_name == name]", "]", "tests/peft/test_method.py",
    ),
    Mutation(
        "loading: values that are not finite", f"{_PEFT}/files.py",
        "if not _is_finite(a, b.dtype)]", "if False]", "tests/peft/hostile",
    ),
    Mutation(
        "loading: finite in the file, infinite in the model", f"{_PEFT}/files.py",
        "part.to(dtype).isfinite()", "part.isfinite()", "tests/peft/hostile",
    ),
    Mutation(
        "loading: other shapes", f"{_PEFT}/files.py",
        "if b.shape is not None and a.shape != b.shape]", "if False]",
        "tests/peft/test_refusals.py",
    ),
    Mutation(
        "loading: tensors that the adapter does not have", f"{_PEFT}/files.py", "    if unknown:\n", "    if False:\n",
        "tests/peft/test_refusals.py",
    ),
    Mutation(
        "loading: dtypes that are no weights'", f"{_PEFT}/files.py",
        "if not _is_dtype_right(a, b)]", "if False]", "tests/peft/hostile",
    ),
    Mutation(
        "loading: code in a pickle runs", f"{_PEFT}/files.py",
        'torch.load(file, map_location="cpu", weights_only=True, mmap=True)',
        'torch.load(file, map_location="cpu", weights_only=False, mmap=True)',
        "tests/peft/hostile",
    ),
]  # fmt: skip
