"""A model asked for from the loader as vLLM's worker does it, without an engine; and the page that names refusals."""

from collections.abc import Callable
from pathlib import Path

from .conftest import ROOT

(PAGE,) = (ROOT / "docs").rglob("serving.md")
DOCUMENTED = " ".join(PAGE.read_text(encoding="utf-8").split())


def load(saved: Path, change: Callable | None = None, **more) -> None:
    """Load ``saved / "model"`` with ``saved / "adapter"``.

    Args:
        change: is called with the configuration before the loader sees it.
        more: arguments of vLLM.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    from .engine import ENGINE

    options = ENGINE | {
        "model": str(saved / "model"),
        "model_loader_extra_config": {"adapter": str(saved / "adapter")},
        "disable_log_stats": True,
    }
    config = EngineArgs(**(options | more)).create_engine_config()
    if change is not None:
        change(config)
    get_model_loader(config.load_config).load_model(vllm_config=config, model_config=config.model_config)
