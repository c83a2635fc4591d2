"""The LoRAs of a pipeline: loaded, combined with weights, and merged into its transformer.

The base's parameters are kept, so every change starts from them and removing an adapter is exact.
Parameters are arguments of the compiled programs: no change recompiles.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pixart_jax.errors import UserError, nearest
from pixart_jax.models.lora import combine
from pixart_jax.weights import lora


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """base: the transformer without the loaded adapters; None: nothing is loaded. active: {name:
    weight}. fused: the same, of :meth:`LoraMethods.fuse_lora`; None: not fused. kept: (digest,
    weight) of what stays in the base for good."""

    base: Any = None
    loaded: Mapping[str, lora.Adapter] = dataclasses.field(default_factory=dict)
    active: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fused: Mapping[str, float] | None = None
    kept: tuple[tuple[str, float], ...] = ()

    @property
    def weights(self) -> Mapping[str, float]:
        """{name: weight} of what the transformer holds now."""
        return self.active if self.fused is None else self.fused

    @property
    def identity(self) -> tuple[tuple[str, float], ...]:
        """(digest, weight) of all that the transformer holds now, for caches and metadata."""
        now = ((self.loaded[name].digest, weight) for name, weight in self.weights.items())
        return (*self.kept, *now)


class LoraMethods:
    """Pipeline's LoRA methods, with diffusers' names and meaning. Most change it in place."""

    transformer: Any
    adapters: Adapters

    def load_lora_weights(
        self,
        path: str | os.PathLike | lora.Adapter,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        alpha: float | None = None,
        revision: str | None = None,
    ) -> None:
        """Load an adapter and make it the only active one, at weight 1.

        path: a file, folder or hub id of any layout that weights/lora.py reads, or what its
        ``read`` returned. weight_name: the file of a folder or hub id that holds several.
        adapter_name: "default_0", "default_1" … by default. alpha: of a file that does not say its
        own. Raises UserError for a file that cannot be read or is of another model, and for a name
        that is taken. Tensors of a text encoder are left out with a Notice.
        """
        before = self.adapters
        name = f"default_{len(before.loaded)}" if adapter_name is None else adapter_name
        if name in before.loaded:
            raise UserError(f"an adapter {name!r} is loaded already: choose another adapter_name")
        base = before.base or self.transformer
        if not isinstance(path, lora.Adapter):
            path = path if weight_name is None else os.path.join(path, weight_name)
            path = lora.read(path, base.params, alpha=alpha, revision=revision)
        loaded = {**before.loaded, name: path}
        self._set(dataclasses.replace(before, base=base, loaded=loaded), {name: 1.0})

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Sequence[float | None] | None = None,
    ) -> None:
        """Make these loaded adapters the active ones; adapter_weights: one for all or one each, 1
        by default. Several add up; DoRA can only be used alone. Raises UserError for an unknown
        name. After fuse_lora the adapters are unfused first, as in peft."""
        self._set(self.adapters, self._weights(adapter_names, adapter_weights))

    def fuse_lora(
        self, lora_scale: float = 1.0, adapter_names: Sequence[str] | None = None
    ) -> None:
        """Make the active adapters, or the named ones, part of the transformer, times lora_scale;
        ``unload_lora_weights`` then leaves them there. Images change by lora_scale alone, since
        active adapters are merged in any case."""
        active = self.adapters.active
        names = list(active) if adapter_names is None else adapter_names
        fused = {
            name: lora_scale * active.get(name, weight)
            for name, weight in self._weights(names, None).items()
        }
        self._update(dataclasses.replace(self.adapters, fused=fused))

    def unfuse_lora(self) -> None:
        """Undo fuse_lora, exactly; the adapters stay loaded and active."""
        self._update(dataclasses.replace(self.adapters, fused=None))

    def unload_lora_weights(self) -> None:
        """Forget all adapters: the transformer is the base again, to the bit. What was fused
        stays."""
        before = self.adapters
        if before.fused is None:
            self._put(before.base or self.transformer, Adapters(kept=before.kept))
        else:
            self._put(self.transformer, Adapters(kept=before.identity))

    def with_adapters(self, weights: Mapping[str, float]) -> Self:
        """Another pipeline with these of the loaded adapters, {name: weight}; it shares the base's
        parameters, recompiles nothing, and this pipeline stays as it is."""
        other = dataclasses.replace(self)  # type: ignore[type-var]  # Pipeline is a dataclass
        other.set_adapters(list(weights), list(weights.values()))
        return other

    def _weights(self, names, weights) -> dict[str, float]:
        names = [names] if isinstance(names, str) else list(names)
        if weights is None or isinstance(weights, int | float):
            weights = [weights] * len(names)
        if len(names) != len(weights):
            raise UserError(f"{len(weights)} weights for {len(names)} adapters: give one each")
        for name in names:
            if name not in self.adapters.loaded:
                known = nearest(str(name), self.adapters.loaded)
                raise UserError(
                    f"no adapter {name!r} is loaded{known}: load_lora_weights does that"
                )
        found = {name: 1.0 if w is None else float(w) for name, w in zip(names, weights)}
        if bad := [name for name, weight in found.items() if not math.isfinite(weight)]:
            raise UserError(f"the weight of {bad[0]!r} must be a finite number: {found[bad[0]]}")
        return found

    def _set(self, adapters: Adapters, active: Mapping[str, float]) -> None:
        self._update(dataclasses.replace(adapters, active=active, fused=None))

    def _update(self, adapters: Adapters) -> None:
        """Merge what the adapters say, unless the transformer holds just that."""
        if adapters.base is None:
            return
        transformer = self.transformer
        if adapters.identity != self.adapters.identity:
            trees = [adapters.loaded[name].tree for name in adapters.weights]
            tree = combine(trees, list(adapters.weights.values()))  # raises before any change
            transformer = adapters.base
            # the former merged parameters are freed first: base and one copy are the most held
            self._put(transformer, dataclasses.replace(adapters, active={}, fused=None))
            transformer = transformer.with_adapters([tree], [1.0]) if tree else transformer
        self._put(transformer, adapters)

    def _put(self, transformer: Any, adapters: Adapters) -> None:
        # The one place that changes a Pipeline, which is frozen so that nothing else does.
        object.__setattr__(self, "transformer", transformer)
        object.__setattr__(self, "adapters", adapters)
