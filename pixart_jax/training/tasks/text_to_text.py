"""Task 'text_to_text': the T5 encoder learns to read captions (Raffel et al. 2020, arXiv
1910.10683).

From the states of one caption of an image a shallow decoder predicts another, the target: from a
terse caption the dense one of the same scene, so that each word's state must hold all that the text
says about it (its colour, its place); from the target itself with some words masked, so that the
target's words are learned too. The decoder is discarded.
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

    hidden: share of the words replaced by ``hidden_token`` where a caption is its own target.
    """

    module: T5Encoder
    decoder: T5Decoder
    hidden: float
    hidden_token: int
    tokenizer: object

    @classmethod
    def from_config(
        cls, config: Config, stage: StageConfig, dtype: jnp.dtype, frozen
    ) -> TextToText:
        """The encoder of config.text_model, with the stage's decoder."""
        model, options = config.text_model, stage.text_to_text
        if model is None:
            raise UserError(
                f"stage {stage.name}: task text_to_text needs the config's text_model, the sizes "
                "to train"
            )
        tokenizer = frozen.tokenizer
        if len(tokenizer) > model.vocab_size:
            raise UserError(
                f"text_model.vocab_size = {model.vocab_size}: the tokenizer has {len(tokenizer)} "
                "tokens"
            )
        mask, unknown = tokenizer.mask_token_id, tokenizer.unk_token_id
        return cls(
            T5Encoder(model, dtype=dtype, remat=config.remat),
            T5Decoder(model, options.decoder_layers, dtype),
            options.hidden,
            unknown if mask is None else mask,
            tokenizer,
        )

    def init(self, key: jax.Array):
        """Fresh boxed parameters, {"encoder", "decoder"}; also for jax.eval_shape."""
        ids, one = jnp.zeros((1, 8), jnp.int32), jnp.ones((1,), jnp.int32)
        config = self.module.config
        table = jnp.zeros((config.vocab_size, config.d_model))
        states = jnp.zeros((1, 8, config.d_model))
        first, second = jax.random.split(key)
        return {
            "encoder": self.module.init(first, ids, one)["params"],
            "decoder": self.decoder.init(second, table, ids, states, one)["params"],
        }

    def on_stage_start(self, params, base=None):
        """Return the parameters as they are: nothing to set before a stage."""
        return params

    def mask_words(self, ids: jax.Array, length: jax.Array, key: jax.Array) -> jax.Array:
        """One caption's ids [l] with some of its words, never the end mark, hidden."""
        chosen = (jax.random.uniform(key, ids.shape) < self.hidden) & (
            jnp.arange(ids.shape[0]) < length - 1
        )
        return jnp.where(chosen, self.hidden_token, ids)

    def losses(self, params, batch, keys, base=None) -> dict[str, jax.Array]:
        """loss: cross-entropy of the target's tokens, a mean over each; accuracy: the share of
        them predicted right. [b] each."""
        ids, lengths, target, target_lengths = (
            batch[k] for k in ("input_ids", "lengths", "target_ids", "target_lengths")
        )
        shown = jnp.where(
            batch["is_target"][:, None], jax.vmap(self.mask_words)(ids, lengths, keys), ids
        )
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

    def preview(
        self, params, batch, settings: PreviewConfig, base=None
    ) -> tuple[list[np.ndarray], list[str]]:
        """Text tasks have no preview."""
        return [], []

    def export(self, params, folder: Path, batches) -> None:
        """folder/text_encoder and folder/tokenizer."""
        TextEncoder(self.module.config, params["encoder"]).save(folder / "text_encoder")
        if jax.process_index() == 0:
            save_tokenizer(self.tokenizer, folder / "tokenizer")
