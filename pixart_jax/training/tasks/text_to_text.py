"""Task 'text_to_text': the T5 encoder learns to read captions (Raffel et al. 2020, arXiv
1910.10683).

From the states of one caption of a picture a shallow decoder writes another, the target: from a
terse caption the dense one of the same scene, so that each word's state must hold what the whole
text says of it (its colour, its place); from the target itself with some words hidden, so that what
the target says is read as well. The decoder is thrown away.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.config import Config, PreviewConfig, StageConfig
from pixart_jax.errors import UserError
from pixart_jax.models.t5 import T5Encoder
from pixart_jax.models.t5_decoder import T5Decoder
from pixart_jax.text import save_tokenizer
from pixart_jax.weights.component import TextEncoder


@dataclasses.dataclass(frozen=True)
class TextToText:
    """Batches: input_ids, target_ids int32 [b, l], [b, m]; lengths, target_lengths int32 [b]; the
    last token of each an end mark.

    hidden: share of the words that are shown as ``hidden_token`` where a caption is its own target.
    """

    module: T5Encoder
    decoder: T5Decoder
    hidden: float
    hidden_token: int
    tokenizer: object

    def init(self, key: jax.Array):
        """Fresh boxed parameters, {"encoder", "decoder"}; also for jax.eval_shape."""
        ids, one = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
        config = self.module.config
        table, states = (
            jnp.zeros((config.vocab_size, config.d_model)),
            jnp.zeros((1, 8, config.d_model)),
        )
        first, second = jax.random.split(key)
        return {
            "encoder": self.module.init(first, ids, one)["params"],
            "decoder": self.decoder.init(second, table, ids, states, one)["params"],
        }

    def adjust(self, params):
        """Nothing to set before a stage."""
        return params

    def hide(self, ids: jax.Array, length: jax.Array, key: jax.Array) -> jax.Array:
        """One caption's ids [l] with some of its words, never the end mark, hidden."""
        chosen = (jax.random.uniform(key, ids.shape) < self.hidden) & (
            jnp.arange(ids.shape[0]) < length - 1
        )
        return jnp.where(chosen, self.hidden_token, ids)

    def losses(self, params, batch, keys) -> dict[str, jax.Array]:
        """loss: cross-entropy of the target's tokens, a mean over each; accuracy: the share of them
        told right. [b] each."""
        ids, lengths, target, target_lengths = (
            batch[k] for k in ("input_ids", "lengths", "target_ids", "target_lengths")
        )
        shown = jnp.where(batch["itself"][:, None], jax.vmap(self.hide)(ids, lengths, keys), ids)
        states = self.module.apply({"params": params["encoder"]}, shown, lengths)
        logits = self.decoder.apply(
            {"params": params["decoder"]}, params["encoder"]["embedding"], target, states, lengths
        )
        counted = jnp.arange(target.shape[1]) < target_lengths[:, None]
        log_likelihood = jnp.take_along_axis(
            jax.nn.log_softmax(logits), target[..., None], axis=-1
        )[..., 0]
        return {
            "loss": -jnp.where(counted, log_likelihood, 0.0).sum(-1) / target_lengths,
            "accuracy": (counted & (logits.argmax(-1) == target)).sum(-1) / target_lengths,
        }

    def preview(self, params, batch, settings: PreviewConfig) -> tuple[list[np.ndarray], list[str]]:
        """Words have no picture."""
        return [], []

    def export(self, params, folder: Path, batches) -> None:
        """folder/text_encoder and folder/tokenizer."""
        TextEncoder(self.module.config, params["encoder"]).save(folder / "text_encoder")
        if jax.process_index() == 0:
            save_tokenizer(self.tokenizer, folder / "tokenizer")


def make(config: Config, stage: StageConfig, dtype: jnp.dtype, frozen) -> TextToText:
    if config.text_model is None:
        raise UserError(
            f"stage {stage.name}: task text_to_text needs the config's text_model, the sizes to "
            "train"
        )
    tokenizer = frozen.tokenizer
    if len(tokenizer) > config.text_model.vocab_size:
        raise UserError(
            f"text_model.vocab_size = {config.text_model.vocab_size}: the tokenizer has "
            f"{len(tokenizer)} tokens"
        )
    hidden_token = (
        tokenizer.mask_token_id if tokenizer.mask_token_id is not None else tokenizer.unk_token_id
    )
    module = T5Encoder(config.text_model, dtype=dtype, remat=config.remat)
    decoder = T5Decoder(config.text_model, stage.text_to_text.decoder_layers, dtype)
    return TextToText(module, decoder, stage.text_to_text.hidden, hidden_token, tokenizer)
