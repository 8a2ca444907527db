"""Schedulers for models with images, given to vLLM as ``--scheduler-cls``: a prompt waits until all its images fit."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

HOOK = "_try_schedule_encoder_inputs"


class WholePrompts:
    """Where the image encoder's budget of a step is spent, vLLM computes a prompt up to the image that does not fit. A
    prompt that is routed as a whole waits for the next step instead."""

    def _try_schedule_encoder_inputs(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int, encoder_compute_budget: int, **rest: Any
    ) -> tuple:
        found = super()._try_schedule_encoder_inputs(  # type: ignore[misc]  # of the scheduler that it stands before
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, **rest
        )
        return found if found[1] == num_new_tokens else ([], 0, encoder_compute_budget, [], [])


class WholePromptScheduler(WholePrompts, Scheduler):
    """vLLM's scheduler, with whole prompts."""


class AsyncWholePromptScheduler(WholePrompts, AsyncScheduler):
    """vLLM's asynchronous scheduler, with whole prompts."""


def check_hook() -> None:
    """Raise an ImportError where vLLM's scheduler no longer asks for images by the method that is replaced."""
    if not hasattr(Scheduler, HOOK):
        raise ImportError(f"mixlora_kernels.serving does not know this vLLM: Scheduler.{HOOK} is gone")
