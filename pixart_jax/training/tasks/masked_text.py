"""Task 'masked_text': the T5 encoder learns to name the masked words of captions (BERT, arXiv 1810.04805).

Its head is tied to the embedding.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import Config, MaskedTextConfig, PreviewConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.t5 import T5Encoder
from pixart_jax.weights.component import TextEncoder


@dataclasses.dataclass(frozen=True)
class MaskedText:
    """Batches: {"input_ids": int32 [b, l], "lengths": int32 [b]}, the last token of each caption its end mark.

    mask_token: the id shown in place of a masked word. words: ids from ``first_word`` up to the vocabulary's ``size`` may
    stand for another word.
    """

    module: T5Encoder
    objective: MaskedTextConfig
    tokenizer: object
    mask_token: int
    first_word: int
    size: int

    def init(self, key: jax.Array):
        """Fresh boxed parameters; also for jax.eval_shape."""
        return self.module.init(key, jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32))["params"]

    def adjust(self, params):
        """Nothing to set before a stage."""
        return params

    def mask(self, ids: jax.Array, length: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One caption's ids [l] → (what the encoder sees [l], which tokens it has to name [l] bool); at least one of them."""
        choose, kind, other = jax.random.split(key, 3)
        place = jnp.arange(ids.shape[0])
        draw = jnp.where(place < jnp.maximum(length - 1, 1), jax.random.uniform(choose, ids.shape), 2.0)
        chosen = (draw < self.objective.rate) | (place == jnp.argmin(draw))
        share = jax.random.uniform(kind, ids.shape)
        random_word = jax.random.randint(other, ids.shape, self.first_word, self.size)
        shown = jnp.where(share < self.objective.mask_share, self.mask_token, ids)
        shown = jnp.where(share >= 1 - self.objective.random_share, random_word, shown)
        return jnp.where(chosen, shown, ids), chosen

    def losses(self, params, batch, keys) -> dict[str, jax.Array]:
        """loss: cross-entropy of the chosen tokens, a mean over each caption; accuracy: the share of them named right. [b] each."""
        ids, lengths = batch["input_ids"], batch["lengths"]
        shown, chosen = jax.vmap(self.mask)(ids, lengths, keys)
        logits = self._logits(params, shown, lengths)
        log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=-1)[..., 0]
        count = chosen.sum(-1)
        return {
            "loss": -jnp.where(chosen, log_likelihood, 0.0).sum(-1) / count,
            "accuracy": (chosen & (logits.argmax(-1) == ids)).sum(-1) / count,
        }

    def preview(self, params, batch, settings: PreviewConfig) -> tuple[list[np.ndarray], list[str]]:
        """Words have no picture."""
        return [], []

    def export(self, params, folder: Path, batches) -> None:
        """folder/text_encoder and folder/tokenizer."""
        TextEncoder(self.module.config, params).save(folder / "text_encoder")
        self.tokenizer.save_pretrained(str(folder / "tokenizer"))

    def _logits(self, params, ids, lengths):
        states = self.module.apply({"params": params}, ids, lengths)
        return self.module.apply({"params": params}, states, method="logits")


def make(config: Config, stage: StageConfig, dtype: jnp.dtype, frozen) -> MaskedText:
    if config.text_model is None:
        raise UserError(f"stage {stage.name}: task masked_text needs the config's text_model, the sizes to train")
    tokenizer = frozen.tokenizer
    if len(tokenizer) > config.text_model.vocab_size:
        raise UserError(f"text_model.vocab_size = {config.text_model.vocab_size}: the tokenizer has {len(tokenizer)} tokens")
    special = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) if i is not None]
    mask_token = tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    module = T5Encoder(config.text_model, dtype=dtype, remat=config.remat)
    return MaskedText(module, stage.masked_text, tokenizer, mask_token, max(special) + 1, len(tokenizer))
