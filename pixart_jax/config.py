"""Every option of a run, as frozen dataclasses that are checked when they are built.

A recipe in configs/ is a function ``get_config() -> Config``. Overrides on the command line name
fields by their path (``--stages.1.optimizer.learning-rate 1e-4``, ``--mesh.fsdp 8``). Model sizes
are the dataclasses of pixart_jax/models.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import field
from typing import Literal

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.configs import CONTEXT_ATTENTIONS, T5Config, TransformerConfig, VAEConfig
from pixart_jax.task_config import (
    AutoencoderConfig,
    DreamBoothConfig,
    LcmConfig,
    LoraConfig,
    ObjectiveConfig,
    TdmConfig,
    TextToTextConfig,
    require,
    require_at_least,
    require_one_of,
    require_positive,
)

TASKS = (
    *("class_conditional", "text_to_image", "controlnet", "lcm", "tdm"),
    *("autoencoder", "text_to_text"),
)
DISTILLATIONS = ("lcm", "tdm")
TEXT_TO_IMAGE = ("text_to_image", *DISTILLATIONS)  # whose parameters may be a LoRA's
_MESH_AXES = ("data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: all devices that the others leave."""

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    # how keys and values reach all queries where context splits the image tokens: all_gather, or
    # ring, which holds less and overlaps its transfers with the products; the numbers are the same
    context_attention: str = "all_gather"

    def __post_init__(self):
        require_one_of(self, context_attention=CONTEXT_ATTENTIONS)
        sizes = {name: getattr(self, name) for name in _MESH_AXES}
        rule = "a mesh axis is at least 1, or -1 for the rest"
        require(self, rule, **{name: size == -1 or size >= 1 for name, size in sizes.items()})
        if list(sizes.values()).count(-1) > 1:
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
        return cls(**{"data": rest, **sizes})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The Optax chain of a stage: clip → AdamW or CAME → schedule → EMA."""

    # adamw | came
    name: str = "adamw"
    learning_rate: float = 2e-5
    # constant | cosine | linear | rsqrt; each after the warm-up
    schedule: str = "constant"
    warmup_steps: int = 1000
    # share of learning_rate at which cosine and linear end (the stage's last step)
    final_fraction: float = 0.0
    weight_decay: float = 0.03
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-10
    # CAME's third decay and two epsilons
    b3: float = 0.9999
    came_eps: tuple[float, float] = (1e-30, 1e-16)
    # global norm; None: no clipping
    clip: float | None = 0.01
    ema: float = 0.9999
    # micro-batches a step; batch_size is that of all of them
    accumulate: int = 1
    # learning_rate · √(batch / this), the official auto_lr
    sqrt_scale_from: int | None = None

    def __post_init__(self):
        require_one_of(
            self, name=("adamw", "came"), schedule=("constant", "cosine", "linear", "rsqrt")
        )
        require_positive(self, "learning_rate", "sqrt_scale_from")
        require_at_least(self, 0, "warmup_steps", "weight_decay", "eps")
        require_at_least(self, 1, "accumulate")
        require(self, "must lie in [0, 1]", final_fraction=0 <= self.final_fraction <= 1)
        require(self, "must lie in [0, 1); 0 keeps no average", ema=0 <= self.ema < 1)
        decays = {name: 0 <= getattr(self, name) < 1 for name in ("b1", "b2", "b3")}
        require(self, "must lie in [0, 1)", **decays)
        clip = self.clip is None or self.clip > 0
        require(self, "must be positive, or None for no clipping", clip=clip)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where a stage's samples come from, and their shapes.

    source: 'tfds:NAME/CONFIG' (the embedded world is 'tfds:shapes/plain', '/free', '/rich'; any
    other set by its name), a folder of encoded ArrayRecord shards, 'folder:DIR' of images,
    'webdataset:TARS', 'pixart:ROOT' (the official layout), 'pixart-features:ROOT' (its .npz and
    .npy), or a mixture of these, '0.7*folder:a + 0.3*folder:b' (docs/data_sources.md).
    captions: kinds and their weights in the mix; for a sample that lacks one, its others in
    proportion. buckets: (height, width) in pixels; each sample goes to the nearest aspect ratio; a
    batch is of one bucket. condition: of a ControlNet, as encode's: 'hed', 'canny' or 'folder:DIR';
    encoded shards must hold conditions of this kind.
    """

    source: str = "tfds:shapes/plain"
    split: str = "train"
    # the first so many samples of the split
    limit: int | None = None
    # a filter by name: single (one object), labelled, or package.module:function
    where: str | None = None
    captions: tuple[tuple[str, float], ...] = (("dense", 1.0),)
    buckets: tuple[tuple[int, int], ...] = ((64, 64),)
    max_text_tokens: int = 120
    # threads that read ahead
    workers: int = 2
    # encoded shards: so many of each size are shuffled together, after their own order was; 0: all,
    # which from a bucket must fit cache_gb
    shuffle_shards: int = 0
    # 10⁹ bytes of local disk for the shards of buckets
    cache_gb: float = 100.0
    # stop at the first unusable sample; otherwise it is named, counted and skipped
    strict: bool = False
    condition: str | None = None
    # of hed
    condition_weights: str | None = None

    def __post_init__(self):
        kind, _, folder = (self.condition or "hed").partition(":")
        known = kind in ("hed", "canny") and not folder or (kind == "folder" and bool(folder))
        require(self, "hed, canny or folder:DIR", condition=known)
        require(self, "name a set", source=self.source.strip() != "")
        require(self, "name at least one (height, width)", buckets=len(self.buckets) > 0)
        sides = all(h > 0 and w > 0 for h, w in self.buckets)
        require(self, "sides must be positive", buckets=sides)
        require_at_least(self, 0, "workers", "shuffle_shards")
        require_positive(self, "limit", "max_text_tokens", "cache_gb")
        weights = [weight for _, weight in self.captions]
        mix = all(weight >= 0 for weight in weights) and sum(weights) > 0
        require(self, "weights must not be negative, nor all 0", captions=mix)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Metrics of the averaged parameters during a stage, under ``evaluate/`` in metrics.jsonl and
    TensorBoard. Every evaluation sees the same records, prompts, noise and times."""

    # steps; 0: never. The stage's last step is evaluated too
    every: int = 0
    # loss and fid of held-out records; clip of prompts; shapes of the embedded world's prompts, at
    # the level of the stage's source. Images are generated as previews are
    metrics: tuple[str, ...] = ("loss",)
    # records, in whole batches of the stage's size; of other metrics images
    count: int = 256
    # the stage ends after an evaluation whose first metric is below
    stop_below: float | None = None
    # of fid: weights as of `evaluate fid`, or random:SEED, for tests
    inception: str | None = None
    # of clip: a folder or hub id
    clip: str | None = None
    # of clip: a file as sample.py's --prompts, such as held-out captions; None: preview.prompts
    prompts: str | None = None
    # of the records: None: the stage's own source
    source: str | None = None
    # None: 'test' of the stage's own source, 'train' of another
    split: str | None = None

    def __post_init__(self):
        require_at_least(self, 0, "every")
        require_at_least(self, 1, "count")
        known = 0 < len(self.metrics) and set(self.metrics) <= {"loss", "shapes", "fid", "clip"}
        require(self, "some of loss, shapes, fid and clip", metrics=known)
        given = "fid" not in self.metrics or self.inception is not None
        require(self, "fid needs Inception's weights", inception=given)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a curriculum.

    task: class_conditional (the DiT of stage 1), text_to_image (stages 2 and 3), controlnet (over
    start's model, which stays as it is), lcm and tdm (a student of few steps of start's model, all
    of its parameters or a LoRA), autoencoder and text_to_text (the frozen parts of a curriculum).
    start: 'fresh', 'previous' (the stage before, converted where the task differs), or a folder of
    weights.
    """

    name: str
    task: str = "text_to_image"
    steps: int = 1000
    batch_size: int = 32
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_to_text: TextToTextConfig = field(default_factory=TextToTextConfig)
    lcm: LcmConfig = field(default_factory=LcmConfig)
    tdm: TdmConfig = field(default_factory=TdmConfig)
    # text_to_image, lcm, tdm: an adapter of start's model is trained, and the model stays as it is
    lora: LoraConfig | None = None
    # text_to_image: learns a subject; batch_size counts its pictures, not the class images
    dreambooth: DreamBoothConfig | None = None
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    start: str = "previous"
    controlnet: str | None = None  # a path: task controlnet continues it; None: start's blocks
    # of this stage alone; None: the run's
    model: TransformerConfig | None = None
    vae: str | None = None
    # base size of the position table in this stage, latent/patch units; None: the model's
    position_base: int | None = None
    position_scale: float | None = None

    def __post_init__(self):
        named = re.fullmatch(r"[\w.-]+", self.name) is not None
        require(self, "letters, digits, '.', '_' and '-' only: files bear it", name=named)
        require_one_of(self, task=TASKS)
        require_at_least(self, 0, "steps")
        require_at_least(self, 1, "batch_size")
        accumulate = self.optimizer.accumulate
        rule = f"must be a multiple of optimizer.accumulate = {accumulate}"
        require(self, rule, batch_size=self.batch_size % accumulate == 0)
        if self.task == "controlnet":
            rule = "a ControlNet needs the folder or hub id of its model"
            require(self, rule, start=self.start not in ("fresh", "previous"))
            rule = "a ControlNet needs conditions: hed, canny or folder:DIR"
            require(self.data, rule, condition=self.data.condition is not None)
        rule = "only task controlnet continues one"
        require(self, rule, controlnet=self.controlnet is None or self.task == "controlnet")
        if self.lora is not None:
            require(self, "lora adapts a text_to_image model", task=self.task in TEXT_TO_IMAGE)
            rule = "lora needs the folder or hub id of the model that it adapts"
            require(self, rule, start=self.start not in ("fresh", "previous"))
        if self.task in DISTILLATIONS:
            rule = f"task {self.task} needs the folder or hub id of its teacher"
            require(self, rule, start=self.start not in ("fresh", "previous"))
            if self.lora is not None:
                rule = f"task {self.task} has no dropout"
                require(self.lora, rule, dropout=self.lora.dropout == 0)
        if self.task == "lcm":
            rule = f"must divide objective.timesteps = {self.objective.timesteps}"
            fits = self.objective.timesteps % self.lcm.solver_steps == 0
            require(self.lcm, rule, solver_steps=fits)
        if self.task == "tdm":
            rule = "task tdm has no loss on held-out records"
            scored = self.evaluate.every == 0 or "loss" not in self.evaluate.metrics
            require(self.evaluate, rule, metrics=scored)
            pictures = self.evaluate.source is not None or not self.data.source.startswith(
                "states:"
            )
            compared = self.evaluate.every == 0 or "fid" not in self.evaluate.metrics or pictures
            require(self.evaluate, "texts have no images: name a set for fid", source=compared)
        if (subject := self.dreambooth) is not None:
            rule = "dreambooth trains a text_to_image model"
            require(self, rule, task=self.task == "text_to_image")
            if subject.class_prompt is not None:
                rule = "class images are generated by a model: give its folder or hub id"
                require(self, rule, start=self.start not in ("fresh", "previous"))
                if len(self.data.buckets) > 1:
                    raise UserError(
                        f"stage {self.name}: data.buckets {self.data.buckets}: class images are "
                        "of one size, so give one bucket"
                    )

    @property
    def reads_text(self) -> bool:
        """Whether it trains a text-to-image model, or something over one."""
        return self.task in (*TEXT_TO_IMAGE, "controlnet")

    @property
    def unlearned_evaluations(self) -> int:
        """Evaluations of the model in a step beside the forward and backward passes of what is
        trained: of a distillation's teacher and target, or roll-out and fake score."""
        return {"lcm": 3, "tdm": self.tdm.steps + 4}.get(self.task, 0)

    @property
    def is_adapter(self) -> bool:
        """Whether what it trains lies over a model that stays as it is."""
        return self.lora is not None or self.task == "controlnet"


@dataclasses.dataclass(frozen=True)
class PreviewConfig:
    """The sample grid of a text-to-image or class-conditional stage."""

    # steps; 0: at the end of each stage only
    every: int = 0
    prompts: tuple[str, ...] = ()
    # None: as SamplingConfig's defaults; guidance is also the default of the exported model
    steps: int | None = None
    guidance: float | None = None
    seed: int = 0

    def __post_init__(self):
        require_at_least(self, 0, "every", "seed")
        require_at_least(self, 1, "steps")


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and when a run gives up. A step whose loss or gradient is not finite
    is always skipped."""

    # also skipped: a step whose loss or gradient norm is this many times its running mean over the
    # last 100 good steps of the stage; None: only what is not finite
    spike_factor: float | None = 20.0
    # so many in a row stop the run
    bad_steps_in_row: int = 10

    def __post_init__(self):
        factor = self.spike_factor is None or self.spike_factor > 1
        require(self, "must be above 1, or None for no limit", spike_factor=factor)
        require_at_least(self, 1, "bad_steps_in_row")


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A profiler trace → WORKDIR/profile."""

    # (first, last) by the run's own count, total_step in metrics.jsonl; None: no trace
    steps: tuple[int, int] | None = None

    def __post_init__(self):
        rule = "want the first and the last step, counted from 1, the first not above the last"
        require(self, rule, steps=self.steps is None or 1 <= self.steps[0] <= self.steps[1])


@dataclasses.dataclass(frozen=True)
class HardwareConfig:
    """What the ledger assumes where nothing is measured."""

    watts_per_device: float = 400.0
    usd_per_device_hour: float = 2.0
    # the paper's figure
    gco2_per_kwh: float = 57.0

    def __post_init__(self):
        require_at_least(self, 0, *vars(self))


@dataclasses.dataclass(frozen=True)
class Config:
    """A run: the model, the frozen parts it uses, and its stages in order."""

    name: str
    stages: tuple[StageConfig, ...]
    model: TransformerConfig = field(default_factory=TransformerConfig)
    # of the class-conditional stage
    num_classes: int = 1000
    # folder of the whole model or of the VAE alone
    vae: str | None = "assets/shapes"
    # likewise; the tokenizer is in a folder beside it
    text_encoder: str | None = "assets/shapes"
    # the sizes of a VAE or a text encoder that a stage trains
    vae_model: VAEConfig | None = None
    text_model: T5Config | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # a name of models/remat.py, or "auto": the fastest that fits the device (training/memory.py)
    remat: str = "none"
    seed: int = 0
    log_every: int = 50
    # Weights & Biases project that gets the logged metrics and previews too (extra ``wandb``)
    wandb: str | None = None
    # steps of a stage; its last step is always saved
    checkpoint_every: int = 1000
    # so many of the newest are kept …
    keep_checkpoints: int = 3
    # … and, for good, one at each multiple of so many steps of the run, which is always saved
    keep_every: int | None = None
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    hardware: HardwareConfig = field(default_factory=HardwareConfig)

    def __post_init__(self):
        require(self, "a run needs at least one stage", stages=len(self.stages) > 0)
        names = [stage.name for stage in self.stages]
        unique = len(set(names)) == len(names)
        require(self, f"stage names must differ, got {names}", stages=unique)
        require_one_of(self, compute_dtype=("bfloat16", "float32"))
        require_at_least(self, 0, "seed")
        counts = ("log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "num_classes")
        require_at_least(self, 1, *counts)
        for before, stage in zip(self.stages, self.stages[1:]):
            if before.is_adapter and stage.start == "previous":
                raise UserError(
                    f"stage {stage.name}: start 'previous' is an adapter (stage {before.name}): "
                    "name the folder of a model"
                )
        for stage in self.stages:
            unit = 8 * (stage.model or self.model).patch_size
            for height, width in stage.data.buckets:
                if stage.task != "text_to_text" and (height % unit or width % unit):
                    raise UserError(
                        f"stage {stage.name}: bucket {height}×{width} is not divisible by {unit} "
                        "(8 × patch size)"
                    )

    def of(self, stage: StageConfig) -> Config:
        """The run as a stage sees it: with the stage's own model and VAE."""
        model, vae = stage.model or self.model, stage.vae or self.vae
        return dataclasses.replace(self, model=model, vae=vae)
