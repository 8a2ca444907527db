"""Serving MixLoRA adapters with vLLM.

vLLM calls ``plugin.register`` by its entry point in each of its processes. It registers the load format ``"mixlora"``.
``LLM(model, load_format="mixlora", model_loader_extra_config={"adapter": folder})`` then runs
``loader.MixLoRAModelLoader`` in each worker:

    loader      refuses what cannot be served exactly (refusals, versions), loads the frozen model, attaches the adapter
    saved       reads the adapter's folder
    placement   finds the served layer of each adapted layer, and its part of it: vLLM fuses q, k, v and gate, up
    layer       the parameters and the state of one fused layer, and the wrapper of its linear method
    state       the factors chosen for each running request, and the products with all factors
    rows        the products with the chosen rows alone, in one Triton launch, for few tokens
    op          the operation that each fused layer calls in a forward
    batch       what the operation needs to know about the running step: the request of each token, the new prompts
    runner      updates the batch before each step, for either of vLLM's model runners
    routing     chooses factors from the routers' logits, with the functions of the torch backend
    scheduler   lets a prompt with images wait until one step can compute it whole

A request is routed once, by its prompt's tokens, in the step that prefills it. The chosen factors are kept in a tensor,
at the index of the request's first KV block, which belongs to the request as long as it runs. Later steps read them
there.
"""
