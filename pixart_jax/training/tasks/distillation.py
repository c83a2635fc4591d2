"""Tasks 'lcm' and 'tdm': a student of few steps learns from a text-to-image model that stays as it
is (diffusion/distillation.py).

The model is the teacher, the separate argument of the step that a LoRA's base is. The student
begins as its copy in fp32; with ``StageConfig.lora`` it is the teacher under an adapter, which is
what is trained and exported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.diffusion import solvers
from pixart_jax.diffusion.distillation import consistency_loss, trajectory_losses
from pixart_jax.diffusion.guidance import Denoiser
from pixart_jax.errors import UserError
from pixart_jax.models.layers import LORA
from pixart_jax.pipeline import sampling_config
from pixart_jax.pipeline.sampling_config import SamplingConfig
from pixart_jax.pipeline.scheduler import SchedulerConfig
from pixart_jax.training.frozen import Frozen
from pixart_jax.training.tasks.lora import TextToImageLora
from pixart_jax.training.tasks.text_to_image import TextToImage, where_dropped
from pixart_jax.weights.component import Transformer
from pixart_jax.weights.files import read_json
from pixart_jax.weights.hub import model_folder

STUDENT, FAKE = "student", "fake"


def check_teacher(stage: StageConfig) -> None:
    """Raise UserError where the stage's start says that it is a student itself, or predicts another
    quantity than the stage's objective; a transformer's own folder says neither."""
    folder = model_folder(stage.start, ("transformer",))
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return
    values = read_json(file)
    solver = sampling_config.read(folder, str(values.get("_class_name", ""))).solver
    if solver in sampling_config.STEPS:
        raise UserError(
            f"stage {stage.name}: {stage.start} is a distilled model (solver {solver}), in which "
            "guidance is part of the prediction: start from the model that it was distilled from"
        )
    found, ours = SchedulerConfig.from_json(values, file).prediction, stage.objective.prediction
    if found != ours:
        raise UserError(
            f"stage {stage.name}: {stage.start} predicts {found}, and so must its student: "
            f"objective.prediction is {ours}"
        )


@dataclasses.dataclass(frozen=True)
class Distillation(TextToImageLora):
    """What both tasks share."""

    @classmethod
    def from_config(
        cls, config: Config, stage: StageConfig, dtype: jnp.dtype, frozen: Frozen
    ) -> Self:
        """As of the plain task, with the student's solver and steps."""
        plain = super().from_config(config, stage, dtype, frozen)
        options = getattr(stage, stage.task)
        sampling = SamplingConfig(options.steps, guidance=1.0, solver=options.solver)
        return dataclasses.replace(plain, sampling=sampling)

    @property
    def adapts(self) -> bool:
        """Whether the student is the teacher under a LoRA."""
        return self.stage.lora is not None

    @property
    def reads_null(self) -> bool:
        return True

    def init(self, key: jax.Array):
        return super().init(key) if self.adapts else TextToImage.init(self, key)

    def on_stage_start(self, params, base=None):
        """Begin as the teacher, in fp32."""
        if self.adapts:
            return super().on_stage_start(params, base)
        return self._copy(base)

    def _copy(self, base) -> dict:
        """The teacher's parameters in fp32, in memory of their own."""
        return jax.tree.map(jnp.copy, dict(self.masters(base)))

    # ---- denoisers ----

    def _denoiser(self, variables: Mapping, batch, states, lengths) -> Denoiser:
        size = batch["size"], batch["aspect_ratio"]

        def denoise(x: jax.Array, t: jax.Array) -> jax.Array:
            return self.module.apply(variables, x, t, states, lengths, *size)

        return denoise

    def _student(self, params, base, batch, text) -> Denoiser:
        if self.adapts:
            variables = {"params": base, LORA: self.applied(params[LORA])}
        else:
            variables = {"params": Transformer.cast_for_compute(params, self.module.dtype)}
        return self._denoiser(variables, batch, *text)

    def _teacher(self, base, batch, text, null):
        both = [self._denoiser({"params": base}, batch, *which) for which in (text, null)]
        return lambda x, t: tuple(denoise(x, t) for denoise in both)

    # ---- previews and export ----

    def preview(
        self, params, batch, settings: PreviewConfig, base=None
    ) -> tuple[list[np.ndarray], list[str]]:
        """As of the plain task, with the student's solver and steps."""
        steps, guidance = self.sampling.steps, self.sampling.guidance
        settings = dataclasses.replace(settings, steps=steps, guidance=guidance)
        model = self.merged(base, params) if self.adapts else params
        return TextToImage.preview(self, model, batch, settings)

    def export(self, params, folder: Path, batches) -> None:
        """The student's model folder, which names its solver and steps, or the adapter's."""
        kind = TextToImageLora if self.adapts else TextToImage
        kind.export(self, params, folder, batches)


@dataclasses.dataclass(frozen=True)
class ConsistencyDistillation(Distillation):
    """Task 'lcm'. Parameters are the student's."""

    def losses(self, params, batch, keys, base=None, target=None) -> dict[str, jax.Array]:
        """ "loss", one value a sample. target: the student's averaged parameters, by default its
        own."""
        o, process = self.stage.lcm, self.denoising
        noised = process.prepare(batch, keys)
        # prepare() splits a key in four
        index = jax.vmap(
            lambda key: jax.random.randint(jax.random.fold_in(key, 7), (), 0, o.solver_steps)
        )(keys)
        text, null = self.texts(base, batch)
        seen = where_dropped(noised.dropped, text, null)
        loss = consistency_loss(
            self._student(params, base, batch, seen),
            self._student(params if target is None else target, base, batch, text),
            self._teacher(base, batch, text, null),
            noised.x0,
            noised.noise,
            index,
            schedule=process.schedule,
            prediction=process.objective.prediction,
            w=o.w,
            steps=o.solver_steps,
            kind=o.distance,
            c=o.huber_c,
        )
        return {"loss": loss}


@dataclasses.dataclass(frozen=True)
class TrajectoryDistillation(Distillation):
    """Task 'tdm'. Parameters are {"student", "fake"}; the fake score has all of the model's. A
    batch's texts and its latents' size are read, and nothing else."""

    def init(self, key: jax.Array):
        return {STUDENT: super().init(key), FAKE: TextToImage.init(self, key)}

    def on_stage_start(self, params, base=None):
        """Student and fake score begin as the teacher."""
        student = super().on_stage_start(params[STUDENT], base)
        return {STUDENT: student, FAKE: self._copy(base)}

    def losses(self, params, batch, keys, base=None) -> dict[str, jax.Array]:
        """loss = student + fake, one value a sample; each has a gradient by its own parameters
        alone."""
        o, process = self.stage.tdm, self.denoising
        begin, rest = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        noise = jax.vmap(lambda key: jax.random.normal(key, batch["mean"].shape[1:]))(begin)
        solver = solvers.by_name(str(self.sampling.solver))
        text, null = self.texts(base, batch)
        fake = Transformer.cast_for_compute(params[FAKE], self.module.dtype)
        terms = trajectory_losses(
            self._student(params[STUDENT], base, batch, text),
            self._student(jax.lax.stop_gradient(params[STUDENT]), base, batch, text),
            self._denoiser({"params": fake}, batch, *text),
            self._teacher(base, batch, text, null),
            noise,
            rest,
            solver.plan(process.schedule, o.steps, times="integer", start=0, stochastic=False),
            schedule=process.schedule,
            prediction=process.objective.prediction,
            guidance=o.guidance,
            kind=o.distance,
            c=o.huber_c,
            first_time=o.first_time,
            last_time=o.last_time,
            from_x0=o.from_x0,
            snr_gamma=o.fake_snr_gamma,
        )
        return {"loss": terms["student"] + terms["fake"], **terms}

    def preview(
        self, params, batch, settings: PreviewConfig, base=None
    ) -> tuple[list[np.ndarray], list[str]]:
        """Of the student."""
        return super().preview(params[STUDENT], batch, settings, base)

    def export(self, params, folder: Path, batches) -> None:
        """The student's; the fake score is no part of it."""
        super().export(params[STUDENT], folder, batches)
