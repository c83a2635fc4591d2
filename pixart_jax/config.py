"""Every option of a run, as frozen dataclasses that are checked where they are built.

A recipe in configs/ is a function ``get_config() -> Config``. Overrides on the command line name
fields by their path (``--stages.1.optimizer.learning-rate 1e-4``, ``--mesh.fsdp 8``). Model sizes
are the dataclasses of pixart_jax/models.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.context import NAMES as CONTEXT_ATTENTIONS
from pixart_jax.models.t5 import T5Config
from pixart_jax.models.transformer import TransformerConfig
from pixart_jax.models.vae import VAEConfig

_MESH_AXES = ("data", "fsdp", "context", "tensor")


def _require(condition: bool, owner: object, field: str, what: str) -> None:
    if not condition:
        raise UserError(f"{type(owner).__name__}.{field} = {getattr(owner, field)!r}: {what}")


def _one_of(owner: object, field: str, known: tuple[str, ...]) -> None:
    value = getattr(owner, field)
    _require(value in known, owner, field, f"unknown{nearest(value, known)}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be −1: all devices that the others leave.

    context_attention: how keys and values meet all queries where context splits the image tokens:
    'all_gather' or 'ring', which holds less and hides its transfers behind the products
    (models/context.py). The numbers are the same.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    context_attention: str = "all_gather"

    def __post_init__(self):
        _one_of(self, "context_attention", CONTEXT_ATTENTIONS)
        for name in _MESH_AXES:
            _require(
                getattr(self, name) == -1 or getattr(self, name) >= 1,
                self,
                name,
                "a mesh axis is at least 1, or -1 for the rest",
            )
        if [self.data, self.fsdp, self.context, self.tensor].count(-1) > 1:
            raise UserError("MeshConfig: only one axis can be -1 (the rest)")

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """'fsdp=4,tensor=2' → the mesh of these sizes; data is the rest where it is not named.
        context_attention=ring may stand beside them. UserError for anything else.
        """
        sizes: dict[str, int | str] = {}
        known = [field.name for field in dataclasses.fields(cls)]
        for part in filter(None, text.replace(" ", "").split(",")):
            name, _, size = part.partition("=")
            if name not in known:
                raise UserError(
                    f"mesh {text!r}: {name!r} is no axis{nearest(name, known)}; AXIS=SIZE with "
                    "commas between, as fsdp=4,tensor=2"
                )
            try:
                sizes[name] = int(size) if name in _MESH_AXES else size
            except ValueError:
                raise UserError(
                    f"mesh {text!r}: {part!r} is not AXIS=SIZE with a whole number, as "
                    "fsdp=4,tensor=2"
                ) from None
        rest = 1 if -1 in sizes.values() else -1
        return cls(**{"data": rest, **sizes})


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The Optax chain of a stage: clip → AdamW or CAME → schedule, with the EMA as one more
    transform."""

    name: str = "adamw"  # adamw | came
    learning_rate: float = 2e-5
    schedule: str = "constant"  # constant | cosine | linear | rsqrt; each after the warm-up
    warmup_steps: int = 1000
    # of learning_rate, where cosine and linear end (the stage's last step)
    final_fraction: float = 0.0
    weight_decay: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-10
    b3: float = 0.9999  # CAME's third decay and two epsilons
    came_eps: tuple[float, float] = (1e-30, 1e-16)
    clip: float | None = 0.01  # global norm; None: no clipping
    ema: float = 0.9999
    accumulate: int = 1  # micro-batches a step; the stage's batch is the whole one
    sqrt_scale_from: int | None = None  # learning_rate · √(batch / this), as the official auto_lr

    def __post_init__(self):
        _one_of(self, "name", ("adamw", "came"))
        _one_of(self, "schedule", ("constant", "cosine", "linear", "rsqrt"))
        _require(self.learning_rate > 0, self, "learning_rate", "must be positive")
        _require(self.warmup_steps >= 0, self, "warmup_steps", "must not be negative")
        _require(0 <= self.final_fraction <= 1, self, "final_fraction", "must lie in [0, 1]")
        _require(0 <= self.ema < 1, self, "ema", "must lie in [0, 1); 0 keeps no average")
        _require(self.accumulate >= 1, self, "accumulate", "must be at least 1")
        for field in ("b1", "b2", "b3"):
            _require(0 <= getattr(self, field) < 1, self, field, "must lie in [0, 1)")
        for field in ("weight_decay", "eps"):
            _require(getattr(self, field) >= 0, self, field, "must not be negative")
        _require(
            self.sqrt_scale_from is None or self.sqrt_scale_from > 0,
            self,
            "sqrt_scale_from",
            "must be positive, or None",
        )
        _require(
            self.clip is None or self.clip > 0,
            self,
            "clip",
            "must be positive, or None for no clipping",
        )


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What the denoiser learns."""

    prediction: str = "epsilon"  # epsilon | v
    learned_range: bool = True  # mse + vb on the variance half of the output
    min_snr_gamma: float | None = None
    # captions (stage 2, 3) or labels (stage 1) replaced by the null condition
    condition_dropout: float = 0.1
    # embedding: the model's null caption, under the dropped caption's length (official);
    null_condition: str = "embedding"
    # empty: the text encoder's states of "" with their own length (what diffusers guides with)
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        _one_of(self, "prediction", ("epsilon", "v"))
        _one_of(self, "null_condition", ("embedding", "empty"))
        _require(0 <= self.condition_dropout <= 1, self, "condition_dropout", "must lie in [0, 1]")
        _require(self.timesteps >= 2, self, "timesteps", "must be at least 2")
        _require(
            0 < self.beta_start <= self.beta_end < 1,
            self,
            "beta_start",
            f"must lie in (0, beta_end = {self.beta_end}], below 1",
        )
        _require(
            self.min_snr_gamma is None or self.min_snr_gamma > 0,
            self,
            "min_snr_gamma",
            "must be positive, or None",
        )


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Weights of the autoencoder's loss: mean absolute and mean squared error of pixels in [-1, 1],
    and the KL a latent value."""

    l1_weight: float = 1.0
    l2_weight: float = 1.0
    kl_weight: float = 1e-6

    def __post_init__(self):
        for field in ("l1_weight", "l2_weight", "kl_weight"):
            _require(getattr(self, field) >= 0, self, field, "must not be negative")


@dataclasses.dataclass(frozen=True)
class TextToTextConfig:
    """What the text encoder's training asks for: the target caption of each sample, written from
    one of the stage's mix."""

    target: str = "dense"  # kind of caption
    # share of the words that are hidden where the target is written from itself
    hidden: float = 0.15
    decoder_layers: int = 1

    def __post_init__(self):
        _require(0 <= self.hidden < 1, self, "hidden", "must lie in [0, 1)")
        _require(self.decoder_layers >= 1, self, "decoder_layers", "must be at least 1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where a stage's samples come from, and the shapes they take.

    source: 'tfds:NAME/CONFIG' (the embedded world is 'tfds:shapes/plain', '/free', '/rich'; any
    other set by its name), a folder of encoded ArrayRecord shards, 'folder:DIR' of pictures,
    'webdataset:TARS', 'pixart:ROOT' (the official layout), 'pixart-features:ROOT' (its .npz and
    .npy), or a mixture of these, '0.7*folder:a + 0.3*folder:b' (docs/data_sources.md).
    captions: kinds and their weights in the mix; a sample that lacks one takes its others in
    proportion. buckets: (height, width) in pixels; each sample goes to the nearest aspect ratio; a
    batch holds one bucket only.
    """

    source: str = "tfds:shapes/plain"
    split: str = "train"
    limit: int | None = None  # the first so many samples of the split
    # a filter by name: single (one object), labelled, or package.module:function
    where: str | None = None
    captions: tuple[tuple[str, float], ...] = (("dense", 1.0),)
    buckets: tuple[tuple[int, int], ...] = ((64, 64),)
    max_text_tokens: int = 120
    workers: int = 2  # threads that read ahead
    # stop at the first sample that cannot be used; otherwise it is named, counted and left out
    strict: bool = False

    def __post_init__(self):
        _require(self.source.strip() != "", self, "source", "name a set")
        _require(len(self.buckets) > 0, self, "buckets", "name at least one (height, width)")
        _require(
            all(h > 0 and w > 0 for h, w in self.buckets), self, "buckets", "sides must be positive"
        )
        _require(self.workers >= 0, self, "workers", "must not be negative")
        _require(
            self.limit is None or self.limit > 0, self, "limit", "must be positive, or None for all"
        )
        _require(self.max_text_tokens > 0, self, "max_text_tokens", "must be positive")
        _require(
            all(w >= 0 for _, w in self.captions) and sum(w for _, w in self.captions) > 0,
            self,
            "captions",
            "weights must not be negative, nor all 0",
        )


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a curriculum.

    task: class_conditional (the DiT of stage 1), text_to_image (stages 2 and 3), autoencoder and
    text_to_text (the frozen parts that a curriculum rests on). start: 'fresh', 'previous' (the
    stage before, converted where the task differs), or a folder with weights to open.
    """

    name: str
    task: str = "text_to_image"
    steps: int = 1000
    batch_size: int = 32
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    autoencoder: AutoencoderConfig = dataclasses.field(default_factory=AutoencoderConfig)
    text_to_text: TextToTextConfig = dataclasses.field(default_factory=TextToTextConfig)
    start: str = "previous"
    # base size of the position table in this stage, latent/patch units; None: the model's
    position_base: int | None = None
    position_scale: float | None = None

    def __post_init__(self):
        _require(
            re.fullmatch(r"[\w.-]+", self.name) is not None,
            self,
            "name",
            "letters, digits, '.', '_' and '-' only: files bear it",
        )
        _one_of(self, "task", ("class_conditional", "text_to_image", "autoencoder", "text_to_text"))
        _require(self.steps >= 0, self, "steps", "must not be negative")
        _require(self.batch_size >= 1, self, "batch_size", "must be at least 1")
        _require(
            self.batch_size % self.optimizer.accumulate == 0,
            self,
            "batch_size",
            f"must be a multiple of optimizer.accumulate = {self.optimizer.accumulate}",
        )


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """The sample grid drawn during a text-to-image or class-conditional stage."""

    every: int = 0  # steps; 0: only at the end of each stage
    prompts: tuple[str, ...] = ()
    steps: int = 20
    guidance: float = 4.5  # also what the exported model names as its own
    seed: int = 0

    def __post_init__(self):
        _require(
            self.every >= 0,
            self,
            "every",
            "must not be negative; 0 draws at the end of each stage only",
        )
        _require(self.steps >= 1, self, "steps", "must be at least 1")
        _require(self.seed >= 0, self, "seed", "must not be negative")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and when a run gives up. A step whose loss or gradient is not finite
    is never taken.

    spike_factor: nor is one whose loss or gradient norm is this many times its running mean over
    the last 100 good steps of the stage; None: only what is not finite is skipped.
    bad_steps_in_row: so many in a row stop the run.
    """

    spike_factor: float | None = 20.0
    bad_steps_in_row: int = 10

    def __post_init__(self):
        _require(
            self.spike_factor is None or self.spike_factor > 1,
            self,
            "spike_factor",
            "must be above 1, or None for no limit",
        )
        _require(self.bad_steps_in_row >= 1, self, "bad_steps_in_row", "must be at least 1")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace → WORKDIR/profile. steps: (first, last) by the run's own count, total_step
    in metrics.jsonl; None: no trace."""

    steps: tuple[int, int] | None = None

    def __post_init__(self):
        _require(
            self.steps is None or 1 <= self.steps[0] <= self.steps[1],
            self,
            "steps",
            "want the first and the last step, counted from 1, the first not above the last",
        )


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
    """What the ledger assumes where nothing measures it."""

    watts_per_device: float = 400.0
    usd_per_device_hour: float = 2.0
    gco2_per_kwh: float = 57.0  # the paper's figure

    def __post_init__(self):
        for field in ("watts_per_device", "usd_per_device_hour", "gco2_per_kwh"):
            _require(getattr(self, field) >= 0, self, field, "must not be negative")


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: the model, the frozen parts it rests on, and its stages in order."""

    name: str
    stages: tuple[StageConfig, ...]
    model: TransformerConfig = dataclasses.field(default_factory=TransformerConfig)
    num_classes: int = 1000  # of the class-conditional stage
    vae: str | None = "assets/shapes"  # folder of the whole model or of the VAE alone
    text_encoder: str | None = "assets/shapes"  # likewise; the tokenizer lies beside it
    vae_model: VAEConfig | None = None  # only where a stage trains it
    text_model: T5Config | None = None
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # a name of models/remat.py, or "auto": the fastest that fits the device
    # (training/memory.py)
    remat: str = "none"
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000  # steps of a stage; its last step is saved always
    keep_checkpoints: int = 3  # the newest so many stay …
    # … and for good each at a multiple of so many steps of the run, which is saved in any case
    keep_every: int | None = None
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)
    preview: PreviewConfig = dataclasses.field(default_factory=PreviewConfig)
    hardware: HardwareConfig = dataclasses.field(default_factory=HardwareConfig)

    def __post_init__(self):
        _require(len(self.stages) > 0, self, "stages", "a run needs at least one stage")
        names = [s.name for s in self.stages]
        _require(
            len(set(names)) == len(names), self, "stages", f"stage names must differ, got {names}"
        )
        _one_of(self, "compute_dtype", ("bfloat16", "float32"))
        _require(self.seed >= 0, self, "seed", "must not be negative")
        for field in ("log_every", "checkpoint_every", "keep_checkpoints", "num_classes"):
            _require(getattr(self, field) >= 1, self, field, "must be at least 1")
        _require(
            self.keep_every is None or self.keep_every >= 1,
            self,
            "keep_every",
            "must be at least 1, or None",
        )
        unit = 8 * self.model.patch_size
        for stage in self.stages:
            for height, width in stage.data.buckets:
                if stage.task != "text_to_text" and (height % unit or width % unit):
                    raise UserError(
                        f"stage {stage.name}: bucket {height}×{width} is not divisible by {unit} "
                        "(8 × patch size)"
                    )
