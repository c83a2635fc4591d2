"""T5 encoders as transformers' T5EncoderModel stores them, and its config.json."""

from __future__ import annotations

from collections.abc import Container, Mapping

from pixart_jax.errors import UserError
from pixart_jax.models.configs import T5Config
from pixart_jax.weights.table import ParamMapping

_ATTENTION = "encoder.block.{i}.layer.0"
_MLP = "encoder.block.{i}.layer.1"

TRANSFORMERS = (
    ParamMapping("embedding", "shared.weight"),
    ParamMapping(
        "relative_bias", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    ParamMapping("blocks/attention_norm/scale", f"{_ATTENTION}.layer_norm.weight"),
    ParamMapping("blocks/q/kernel", f"{_ATTENTION}.SelfAttention.q.weight", "linear"),
    ParamMapping("blocks/k/kernel", f"{_ATTENTION}.SelfAttention.k.weight", "linear"),
    ParamMapping("blocks/v/kernel", f"{_ATTENTION}.SelfAttention.v.weight", "linear"),
    ParamMapping("blocks/out/kernel", f"{_ATTENTION}.SelfAttention.o.weight", "linear"),
    ParamMapping("blocks/mlp_norm/scale", f"{_MLP}.layer_norm.weight"),
    ParamMapping("blocks/wi_0/kernel", f"{_MLP}.DenseReluDense.wi_0.weight", "linear"),
    ParamMapping("blocks/wi_1/kernel", f"{_MLP}.DenseReluDense.wi_1.weight", "linear"),
    ParamMapping("blocks/wo/kernel", f"{_MLP}.DenseReluDense.wo.weight", "linear"),
    ParamMapping("final_norm/scale", "encoder.final_layer_norm.weight"),
)

ANCHORS = ("encoder.final_layer_norm.weight", "shared.weight")
# The embedding table has two names in transformers; a file holds one of them, or both with the same
# values.
ALIASES = {"encoder.embed_tokens.weight": "shared.weight"}
IGNORED = ("encoder.embed_tokens.weight",)
# Files of the whole T5 hold these beside the encoder.
IGNORED_PREFIXES = ("decoder.", "lm_head.")

_SIZES = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
)


def table(config: T5Config, values: Mapping, keys: Container[str] = ()) -> tuple:
    """(the entries, keys to ignore) of the weights beside a config.json of these values."""
    return TRANSFORMERS, IGNORED


def config_from_json(values: Mapping) -> T5Config:
    """transformers' config.json → T5Config. Raises UserError for any but v1.1."""
    activation = values.get("feed_forward_proj", "relu")
    if activation != "gated-gelu":
        raise UserError(
            f"feed_forward_proj is {activation!r}: only T5 v1.1 encoders ('gated-gelu') are known"
        )
    # the others have defaults in transformers
    if missing := [name for name in _SIZES[:6] if name not in values]:
        raise UserError(f"config.json of a T5 lacks {', '.join(missing)}")
    return T5Config(**{name: values[name] for name in _SIZES if name in values})


def config_to_json(config: T5Config) -> dict:
    """T5Config → config.json that transformers' T5EncoderModel opens."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        **{name: getattr(config, name) for name in _SIZES},
        "num_decoder_layers": config.num_layers,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "torch_dtype": "float32",
    }
