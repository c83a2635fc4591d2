"""Models over a mesh of 8 simulated devices give what one device gives, and gather parameters only.

In a session with fewer devices these tests run in one process of their own.
"""

from __future__ import annotations

import functools
import math
import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pixart_jax.config import MeshConfig
from pixart_jax.models.attention import dense_attention, shard_kernel, splash_attention
from pixart_jax.models.configs import T5Config, TransformerConfig, VAEConfig
from pixart_jax.models.lora import merge
from pixart_jax.models.t5 import T5Encoder
from pixart_jax.models.vae import AutoencoderKL
from pixart_jax.parallel import rules
from pixart_jax.parallel.mesh import make_mesh
from pixart_jax.weights.component import Transformer
from tests.models.reference import quantized, random_params
from tests.parallel.replicated import large_replicated

T5 = T5Config(vocab_size=1024, d_model=512, d_kv=64, d_ff=1280, num_layers=2, num_heads=8)


def gathered(program: str) -> set[tuple[str, int]]:
    """(element type, elements) of each all-gather in a compiled program."""
    found = re.findall(r"= \(?(\w+)\[([\d,]*)\][^=]* all-gather(?:-start)?\(", program)
    return {(kind, math.prod(int(n) for n in shape.split(",") if n)) for kind, shape in found}


if jax.device_count() < 8:

    def test_all_hold_in_a_process_with_eight_devices():
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        environment = {**os.environ, "XLA_FLAGS": flags}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-5000:] + done.stderr

else:

    @pytest.mark.parametrize(
        "batch, lengths", [(4, None), (4, [0, 1, 70, 128]), (3, [128, 0, 5])], ids=str
    )
    def test_kernels_give_what_one_device_gives_with_gradients(batch, lengths):
        """Splash, interpreted; also a batch that the mesh does not divide."""
        keys = jax.random.split(jax.random.key(0), 4)
        q, k, v, d_out = (jax.random.normal(key, (batch, 128, 2, 8)) for key in keys)
        lengths = None if lengths is None else jnp.array(lengths)
        kernel = functools.partial(splash_attention, interpret=True)

        def both(attend):
            out, back = jax.vjp(attend, q, k, v)
            return out, *back(d_out)

        with rules.on_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
            ours = jax.jit(lambda: both(lambda *qkv: shard_kernel(kernel, *qkv, lengths, 0.3)))()
        theirs = both(lambda *qkv: dense_attention(*qkv, lengths, None, 0.3))
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=3e-5)

    def test_the_autoencoder_gathers_kernels_and_never_images():
        module = AutoencoderKL(VAEConfig(block_out_channels=(128, 256), norm_num_groups=8))
        boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
        mesh = make_mesh(MeshConfig(data=1, fsdp=8))
        params = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            rules.unboxed(boxed),
            rules.parameter_shardings(boxed, mesh),
        )
        batch = rules.batch_sharding(mesh)
        latents = jax.ShapeDtypeStruct((8, 24, 24, 4), jnp.float32, sharding=batch)
        with rules.on_mesh(mesh):
            decode = jax.jit(lambda params, x: module.apply({"params": params}, x, method="decode"))
            sizes = {
                size for _, size in gathered(decode.lower(params, latents).compile().as_text())
            }
        assert sizes and sizes <= {math.prod(leaf.shape) for leaf in jax.tree.leaves(params)}

    @pytest.mark.parametrize("quantization, wire", [(None, "f32"), ("int8", "s8")])
    def test_t5_gives_the_states_of_one_device_and_each_holds_an_eighth(quantization, wire):
        rng = np.random.default_rng(0)
        ids = rng.integers(0, T5.vocab_size, (8, 40))
        lengths = np.array([40, 33, 1, 7, 12, 40, 25, 18])
        module = T5Encoder(T5, quantization=quantization)
        boxed = jax.eval_shape(module.init, jax.random.key(0), ids, lengths)["params"]
        params = nn.unbox(T5Encoder(T5).init(jax.random.key(0), ids, lengths))["params"]
        params = jax.tree.map(np.asarray, quantized(params) if quantization else params)

        def encode(params, ids, lengths):
            return module.apply({"params": params}, ids, lengths)

        one = np.asarray(jax.jit(encode)(params, ids, lengths))
        mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
        spread = jax.tree.map(jax.device_put, params, rules.parameter_shardings(boxed, mesh))
        given = spread, *jax.device_put((ids, lengths), rules.batch_sharding(mesh))
        with rules.on_mesh(mesh):
            compiled = jax.jit(encode).lower(*given).compile()
            eight = np.asarray(compiled(*given))
        counted = (np.arange(ids.shape[1]) < lengths[:, None])[..., None]
        assert np.abs((eight - one) * counted).max() <= 1e-5 * np.abs(one * counted).max()

        large = {kind for kind, n in gathered(compiled.as_text()) if n >= T5.d_model**2 / 4}
        assert large == {wire}, "int8 kernels are gathered as int8"
        assert large_replicated(spread) == []
        held = dict.fromkeys(mesh.devices.flat, 0)
        for leaf in jax.tree.leaves(spread):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        # The embedding is split over fsdp only, a quarter a device; biases and norms are small.
        total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        assert max(held.values()) < total / 8 * 1.3

    def test_an_adapter_is_merged_into_the_parts_that_each_device_holds():
        config = TransformerConfig(depth=3, width=32, heads=2, caption_width=16, sample_size=8)
        boxed = Transformer.param_shapes(config)
        params = random_params(Transformer, config)
        rng, tree = np.random.default_rng(0), {"blocks": {"attn": {}, "mlp": {}}}
        for part, name, sizes in (("attn", "q", (32, 32)), ("mlp", "fc1", (32, 128))):
            module = {
                "a": rng.normal(size=(3, sizes[0], 2)),
                "b": rng.normal(size=(3, 2, sizes[1])),
            }
            tree["blocks"][part][name] = {k: v.astype(np.float32) for k, v in module.items()}
        mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
        spread = jax.tree.map(jax.device_put, params, rules.parameter_shardings(boxed, mesh))
        eight, one = merge(spread, tree, 0.5), merge(params, tree, 0.5)
        for part, name in (("attn", "q"), ("mlp", "fc1")):
            kernel = eight["blocks"][part][name]["kernel"]
            assert kernel.sharding == spread["blocks"][part][name]["kernel"].sharding
            assert not kernel.sharding.is_fully_replicated
            np.testing.assert_allclose(kernel, one["blocks"][part][name]["kernel"], atol=1e-6)
