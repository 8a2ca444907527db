"""Update the batch before each step, for either of vLLM's model runners.

The first runner (``vllm.v1.worker.gpu_model_runner``, and its CPU form) calls the model in ``_model_forward``, which
its documentation names as the place to inspect a step. The runner's arguments to the model do not tell the length of a
prompt. It is needed for preempted requests, whose prompt and generated tokens are computed again together. Therefore
this module replaces ``_model_forward`` for models with a ``Batch``. With the second runner, a model can have its own
``ModelState``, which gets all that is needed.
"""

import inspect
from functools import wraps
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger

from .batch import Batch
from .layer import ServedLayer

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's logger, to use its handlers
ATTRIBUTE = "mixlora_batch"  # the served model's attribute that holds its batch
FORWARD = "_model_forward"
STATE = "get_model_state_cls"
STATE_METHODS = {
    "initialize_kv_cache": ["kv_cache_config", "block_tables"],
    "preprocess_state": ["input_batch", "block_tables", "kv_cache_config", "num_computed_tokens"],
    "prepare_inputs": ["input_batch", "req_states"],
    "prepare_dummy_inputs": ["num_reqs", "num_tokens"],
}


def follow_first_runner() -> None:
    """Make vLLM's first model runner update the batch before each step. Further calls change nothing.

    Raises:
        ImportError: vLLM's runner is not as expected.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    forward = getattr(GPUModelRunner, FORWARD, None)
    if getattr(forward, ATTRIBUTE, False):
        return
    if forward is None or list(inspect.signature(forward).parameters)[:3] != ["self", "input_ids", "positions"]:
        raise ImportError(f"mixlora_kernels.serving does not know this vLLM: GPUModelRunner.{FORWARD} is not as it was")

    @wraps(forward)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = getattr(self.get_model(), ATTRIBUTE, None)
        if batch is None:
            return forward(self, *args, **kwargs)
        reserve(self.get_model(), batch, self.kv_cache_config.num_blocks)
        requests, R = self.input_batch, self.input_batch.num_reqs
        batch.begin(
            starts=self.query_start_loc.np[: R + 1],
            computed=requests.num_computed_tokens_cpu[:R],
            prompt_lengths=requests.num_prompt_tokens[:R],
            first_blocks=torch.from_numpy(requests.block_table[0].get_numpy_array()[:R, 0]),
            ids=requests.token_ids_cpu[:R] if batch.media else None,
        )
        try:
            return forward(self, *args, **kwargs)
        finally:
            batch.end()

    setattr(told, ATTRIBUTE, True)
    setattr(GPUModelRunner, FORWARD, told)


def follow_second_runner(model: nn.Module, vllm_config: Any) -> None:
    """Give a served model a ``ModelState`` that updates its batch before each step.

    Raises:
        ImportError: vLLM's runner is not as expected.
    """
    from vllm.v1.worker.gpu.model_states import resolve_model_state_cls

    base: Any = resolve_model_state_cls(vllm_config, model)
    check_second_runner(base)
    batch: Batch = getattr(model, ATTRIBUTE)

    class MixLoRAModelState(base):
        block_tables: Any = None  # of the step that is being prepared, if it has requests

        def initialize_kv_cache(self, kv_cache_config: Any, block_tables: Any) -> None:
            super().initialize_kv_cache(kv_cache_config, block_tables)
            reserve(model, batch, kv_cache_config.num_blocks)

        def preprocess_state(
            self, input_batch: Any, block_tables: Any, kv_cache_config: Any, num_computed_tokens: Any
        ) -> Any:
            # vLLM calls this method only for steps with requests, and prepare_inputs also in profiling runs.
            self.block_tables = block_tables
            return super().preprocess_state(input_batch, block_tables, kv_cache_config, num_computed_tokens)

        def prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
            batch.end()
            if self.block_tables is not None:
                R = input_batch.num_reqs
                batch.begin(
                    starts=input_batch.query_start_loc_np[: R + 1],
                    computed=input_batch.num_computed_tokens_np[:R],
                    prompt_lengths=req_states.prompt_len.np[input_batch.idx_mapping_np[:R]],
                    first_blocks=self.block_tables[0][:R, 0],
                )
                self.block_tables = None
            return super().prepare_inputs(input_batch, req_states)

        def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> Any:
            batch.end()
            return super().prepare_dummy_inputs(num_reqs, num_tokens)

    setattr(model, STATE, lambda: MixLoRAModelState)


def check_second_runner(state: type) -> None:
    """Raise an ImportError if vLLM's ``ModelState`` has other methods or parameters than MixLoRA's needs."""
    for name, parameters in STATE_METHODS.items():
        method = getattr(state, name, None)
        if method is None or list(inspect.signature(method).parameters)[1:] != parameters:
            raise ImportError(
                f"mixlora_kernels.serving does not know this vLLM: {state.__name__}.{name} is not as it was"
            )


def reserve(model: nn.Module, batch: Batch, num_blocks: int) -> None:
    """Allocate the state of ``num_blocks`` KV blocks, after vLLM has allocated the blocks."""
    if batch.num_blocks != num_blocks:
        for module in model.modules():
            if isinstance(module, ServedLayer):
                module.reserve(num_blocks)
        batch.num_blocks = num_blocks
        logger.info("MixLoRA keeps %d bytes for %d KV blocks", state_bytes(model), num_blocks)


def state_bytes(model: nn.Module) -> int:
    """The bytes that the requests' choices take in this process. They do not depend on the number of requests."""
    layers = (module for module in model.modules() if isinstance(module, ServedLayer))
    return sum(tensor.nbytes for layer in layers for kept in layer.kept for tensor in kept.tensors)
