"""Schedulers for models with images, for vLLM's ``--scheduler-cls``. A prompt waits until a step has room for all its
images."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

HOOK = "_try_schedule_encoder_inputs"


class WholePrompts:
    """If a step's budget for the image encoder is spent, vLLM's scheduler computes a prompt up to the first image that
    does not fit. With this class the prompt waits for the next step instead, because it has to be routed as a whole."""

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int, **rest: Any
    ) -> tuple:
        found = super()._try_schedule_encoder_inputs(  # type: ignore[misc]  # of vLLM's class, the next base of the subclasses
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **rest
        )
        return found if found[1] == num_new_tokens else ([], 0, encoder_compute_budget, [], [])


class WholePromptScheduler(WholePrompts, Scheduler):
    """vLLM's scheduler, with whole prompts."""


class AsyncWholePromptScheduler(WholePrompts, AsyncScheduler):
    """vLLM's asynchronous scheduler, with whole prompts."""


def check_hook() -> None:
    """Raise an ImportError if vLLM's scheduler lacks the method that ``WholePrompts`` overrides."""
    if not hasattr(Scheduler, HOOK):
        raise ImportError(f"mixlora_kernels.serving does not know this vLLM: Scheduler.{HOOK} is gone")
