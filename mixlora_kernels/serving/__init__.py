"""Serving MixLoRA adapters with vLLM.

vLLM finds ``plugin.register`` by its entry point in every process that it starts, and that makes the load format
``"mixlora"`` known. ``LLM(model, load_format="mixlora", model_loader_extra_config={"adapter": folder})`` then runs, in
each worker, ``loader.MixLoRAModelLoader``:

    loader      refuses what cannot be exact (refusals, versions), loads the frozen model, and attaches the adapter
    saved       reads the adapter's folder
    placement   finds the served layer, and the place in it, of each adapted layer: vLLM fuses q, k, v and gate, up
    layer       the parameters and the state of one fused layer, and the wrap of its linear method
    state       what was chosen for each running request, and the products with all factors
    rows        the chosen rows alone, in one launch for few tokens: a Triton kernel
    op          the operation that a forward calls, one for each fused layer
    batch       what the operation knows of the running step: whose token is whose, which prompts begin
    runner      tells it to the batch before each step, for either of vLLM's model runners
    routing     from routers' logits to factors: the only use of the package's own arithmetic
    scheduler   lets a prompt with images wait until it fits whole

A prompt's tokens route the request, once, in the step that prefills it. What was chosen lies in a tensor indexed by the
request's first KV block, which is its own as long as the request runs; each later step reads it there.
"""
