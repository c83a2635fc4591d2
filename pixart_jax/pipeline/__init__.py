"""Prompt → tokens → text states → latents → pixels: the path that all programs share."""

import importlib
from typing import Any

_HOMES = {
    "Pipeline": "pipeline",
    "PromptEncoder": "prompt_encoder",
    "SamplingConfig": "sampling_config",
    "SchedulerConfig": "scheduler",
    "TextStates": "text_states",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # so that a program's --help imports no model code
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
