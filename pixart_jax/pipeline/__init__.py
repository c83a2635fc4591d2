"""Prompt → tokens → text states → latents → pixels: the one path that programs, the web page and
evaluation share."""

from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.prompt_encoder import PromptEncoder
from pixart_jax.pipeline.sampling import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.pipeline.shortcuts import CacheConfig
from pixart_jax.pipeline.text_states import TextStates

__all__ = [
    "Pipeline",
    "PromptEncoder",
    "SamplingConfig",
    "SchedulerConfig",
    "Shortcuts",
    "TextStates",
]
