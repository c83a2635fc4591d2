"""T5's decoder (arXiv 1910.10683), used to train a text encoder and dropped afterwards.

The fewer layers it has, the more of a text's meaning the encoder must write into the states of its
words: one layer completes "the star is …" only if the state of "star" describes the star.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from pixart_jax.models.configs import T5Config
from pixart_jax.models.t5 import (
    Projection,
    RMSNorm,
    attend,
    attention_bias,
    feed_forward,
    relative_bias,
)
from pixart_jax.parallel.axes import TEXT_ACTIVATION

_LATER = -1e9  # added to the logits of later tokens


class _Attention(nn.Module):
    """x + attention of norm(x) over states; without states, over itself."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, states=None, *, bias=None, lengths=None):
        y = RMSNorm(self.config.layer_norm_epsilon, self.dtype, name="norm")(x)
        project = functools.partial(_project, self.dtype)
        seen = y if states is None else states
        return x + attend(project, self.config, y, seen, bias=bias, lengths=lengths)


class _FeedForward(nn.Module):
    """x + feed_forward(norm(x))."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = RMSNorm(self.config.layer_norm_epsilon, self.dtype, name="norm")(x)
        return x + feed_forward(functools.partial(_project, self.dtype), self.config, y)


def _project(dtype, features: int, std: float, axes, name: str) -> Projection:
    return Projection(features, std, axes, dtype, name=name)


class T5Decoder(nn.Module):
    """Target tokens and an encoder's states → logits of each target token, given those before it.

    config: the encoder's, for the sizes; num_layers: this decoder's depth. The embedding table is
    the encoder's, and the head is tied to it.
    """

    config: T5Config
    num_layers: int = 1
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        embedding: jax.Array,  # [vocab_size, d_model] fp32: params["embedding"] of the encoder
        target_ids: jax.Array,  # [b, m] int
        states: jax.Array,  # [b, l, d_model]
        lengths: jax.Array,  # [b] int: number of states of each text
    ) -> jax.Array:  # [b, m, vocab_size] fp32
        c = self.config
        # every text starts with the padding token
        written = jnp.pad(target_ids[:, :-1], ((0, 0), (1, 0)))
        x = nn.with_logical_constraint(embedding[written].astype(jnp.float32), TEXT_ACTIVATION)
        length = x.shape[1]
        bias = attention_bias(c, relative_bias(self, c), length, causal=True)
        bias = bias + np.triu(np.full((length, length), _LATER, np.float32), 1)
        for layer in range(self.num_layers):
            x = _Attention(c, self.dtype, name=f"self_attention_{layer}")(x, bias=bias)
            x = _Attention(c, self.dtype, name=f"cross_attention_{layer}")(
                x, states.astype(self.dtype), lengths=lengths
            )
            x = _FeedForward(c, self.dtype, name=f"mlp_{layer}")(x)
        x = RMSNorm(c.layer_norm_epsilon, name="final_norm")(x) * c.d_model**-0.5
        return jnp.dot(
            x.astype(self.dtype), embedding.T.astype(self.dtype), preferred_element_type=jnp.float32
        )
