"""Options of a stage's task, parts of config.StageConfig: objectives, distillation, adapters,
subjects. And the checks of all options.
"""

from __future__ import annotations

import dataclasses
import re

from pixart_jax.errors import UserError, nearest


def require(config: object, rule: str, **conditions: bool) -> None:
    """Raise UserError with the name and value of the first field whose condition is false."""
    for name, holds in conditions.items():
        if not holds:
            value = getattr(config, name)
            raise UserError(f"{type(config).__name__}.{name} = {value!r}: {rule}")


def require_at_least(config: object, least: int, *names: str) -> None:
    """:func:`require` of numbers; None passes."""
    values = {name: getattr(config, name) for name in names}
    rule = "must not be negative" if least == 0 else f"must be at least {least}"
    require(config, rule, **{name: v is None or v >= least for name, v in values.items()})


def require_positive(config: object, *names: str) -> None:
    """:func:`require` of numbers; None passes."""
    values = {name: getattr(config, name) for name in names}
    require(config, "must be positive", **{name: v is None or v > 0 for name, v in values.items()})


def require_one_of(config: object, **choices: tuple[str, ...]) -> None:
    """:func:`require` that each field is one of its choices; the error names the nearest."""
    for name, known in choices.items():
        value = getattr(config, name)
        require(config, f"unknown{nearest(value, known)}", **{name: value in known})


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What the denoiser learns."""

    # epsilon | v
    prediction: str = "epsilon"
    # mse + vb on the variance half of the output
    learned_range: bool = True
    min_snr_gamma: float | None = None
    # share of captions (stages 2 and 3) or labels (stage 1) replaced by the null condition
    condition_dropout: float = 0.1
    # embedding: the model's null caption, with the dropped caption's length (official); empty: the
    # text encoder's states of "" with their own length (what diffusers guides with)
    null_condition: str = "embedding"
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self):
        require_one_of(self, prediction=("epsilon", "v"), null_condition=("embedding", "empty"))
        require(self, "must lie in [0, 1]", condition_dropout=0 <= self.condition_dropout <= 1)
        require_at_least(self, 2, "timesteps")
        require_positive(self, "min_snr_gamma")
        betas = 0 < self.beta_start <= self.beta_end < 1
        require(self, f"must lie in (0, beta_end = {self.beta_end}], below 1", beta_start=betas)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Weights of the autoencoder's loss: mean absolute and mean squared error of pixels in [-1, 1],
    and the KL a latent value."""

    l1_weight: float = 1.0
    l2_weight: float = 1.0
    kl_weight: float = 1e-6

    def __post_init__(self):
        require_at_least(self, 0, *vars(self))


@dataclasses.dataclass(frozen=True)
class TextToTextConfig:
    """The text encoder's training: it predicts the target caption from one of the data's kinds."""

    # kind of caption that is predicted
    target: str = "dense"
    # share of the words masked where the target is predicted from itself
    hidden: float = 0.15
    decoder_layers: int = 1
    # words of the tokenizer that the run makes beside those of the captions: names for what an
    # adapter will learn
    spare_words: tuple[str, ...] = ()

    def __post_init__(self):
        require(self, "must lie in [0, 1)", hidden=0 <= self.hidden < 1)
        require_at_least(self, 1, "decoder_layers")
        plain = all(re.fullmatch("[a-z]+", word) for word in self.spare_words)
        require(self, "words of letters a to z: prompts are lower-cased", spare_words=plain)


@dataclasses.dataclass(frozen=True)
class LcmConfig:
    """Latent consistency distillation (arXiv 2310.04378, 2401.05252) of the model that the stage
    starts from. The target is the average of the student's parameters (optimizer.ema)."""

    # of the teacher's prediction p_c + w (p_c − p_u): guidance 1 + w becomes part of the student
    w: float = 4.5
    # times, in equal steps over the whole schedule, that the teacher's DDIM moves between
    solver_steps: int = 50
    # pseudo_huber | l2
    distance: str = "pseudo_huber"
    huber_c: float = 1e-3
    # of the exported model
    steps: int = 4

    def __post_init__(self):
        require_one_of(self, distance=("pseudo_huber", "l2"))
        require_positive(self, "huber_c")
        require_at_least(self, 0, "w")
        require_at_least(self, 1, "solver_steps")
        rule = f"must lie in 1 … solver_steps = {self.solver_steps}"
        require(self, rule, steps=1 <= self.steps <= self.solver_steps)

    @property
    def solver(self) -> str:
        """Of the exported model."""
        return "lcm"


@dataclasses.dataclass(frozen=True)
class TdmConfig:
    """Trajectory distribution matching (arXiv 2503.06674) of the model that the stage starts from,
    with a second trained copy of it, the fake score; with one step it is distribution matching
    (DMD, arXiv 2311.18828)."""

    # of the student; 1: at t = 400, as solver dmd
    steps: int = 4
    # of the teacher, which becomes part of the student
    guidance: float = 4.5
    # pseudo_huber | l2
    distance: str = "pseudo_huber"
    huber_c: float = 1e-3
    # what the student made is diffused to a time from the first to before the last one; None: to
    # 10 before the student's own
    first_time: int = 20
    last_time: int | None = None
    # x_0 itself is diffused, not the point of the student's path that it leads to
    from_x0: bool = False
    # of the fake score's loss; None: no limit
    fake_snr_gamma: float | None = 5.0
    # the fake score's learning rate over the student's
    fake_rate: float = 5.0

    def __post_init__(self):
        require_one_of(self, distance=("pseudo_huber", "l2"))
        require_positive(self, "huber_c", "fake_snr_gamma", "fake_rate")
        rule = "must be 1 or divide 900, and be at most 25"
        require(self, rule, steps=self.steps in range(1, 26) and 900 % self.steps == 0)
        require_at_least(self, 0, "first_time")
        late = self.last_time is None or self.last_time > self.first_time
        require(self, f"must be above first_time = {self.first_time}", last_time=late)

    @property
    def solver(self) -> str:
        """Of the student."""
        return "tdm" if self.steps > 1 else "dmd"


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """A low-rank adapter (arXiv 2106.09685) trained over a frozen text-to-image model."""

    rank: int = 4
    # the adapter's product is scaled by alpha / rank; None: alpha = rank
    alpha: float | None = None
    # the last parts of diffusers' names of the layers, as peft takes them; the default is every
    # layer but the modulation tables, the official scripts' choice
    targets: tuple[str, ...] = (
        *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        *("proj", "proj_out", "linear", "linear_1", "linear_2"),
    )
    # of the adapter's input, in training
    dropout: float = 0.0
    # scale alpha / √rank (arXiv 2312.03732)
    rslora: bool = False
    # learned lengths of the weights' columns (arXiv 2402.09353)
    dora: bool = False
    # of a; b starts at zero. gaussian: standard deviation 1 / rank; kaiming: peft's own default
    init: str = "gaussian"
    # of the frozen kernels: None: the compute dtype; int8: values with a scale a channel
    quantization: str | None = None
    # also export the model with the adapter merged
    merged: bool = False

    def __post_init__(self):
        require_at_least(self, 1, "rank")
        require_positive(self, "alpha")
        require(self, "name at least one layer, as to_q", targets=len(self.targets) > 0)
        require(self, "must lie in [0, 1)", dropout=0 <= self.dropout < 1)
        require_one_of(self, init=("gaussian", "kaiming"))
        if self.quantization is not None:
            require_one_of(self, quantization=("int8",))

    @property
    def scale(self) -> float:
        """What the product of b and a is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class DreamBoothConfig:
    """A subject from a few pictures (arXiv 2208.12242), which are the stage's data."""

    # of every picture, with the identifier in it, as "a photo of sks dog"; None: each picture's own
    # captions (data.captions), in which it must be
    prompt: str | None
    # the word that stands for the subject
    identifier: str
    # as "a photo of a dog": the model's own pictures of it are trained on too, one beside each of
    # the subject's (prior preservation); file:PATH of several prompts; None: no others
    class_prompt: str | None = None
    class_images: int = 100
    # None: WORKDIR/class_images; in another folder, pictures that are there already are used
    class_folder: str | None = None
    # of the class images' loss beside the subject's
    prior_weight: float = 1.0

    def __post_init__(self):
        named = self.identifier.strip() != ""
        named = named and (self.prompt is None or self.identifier in self.prompt)
        require(self, f"must be a word of the prompt {self.prompt!r}", identifier=named)
        differs = self.class_prompt is None or self.class_prompt != self.prompt
        require(self, "must differ from prompt", class_prompt=differs)
        require_at_least(self, 1, "class_images")
        require_at_least(self, 0, "prior_weight")
