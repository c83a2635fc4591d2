"""The method on one page: train a small PixArt transformer on captioned shapes, then sample.

python docs/first_steps.py [--steps 2000] [--out out/first_steps.png]

train.py adds stages, checkpoints, data loading and meshes; sample.py adds batches and caches.
"""

import argparse

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import pixart_jax
from pixart_jax import diffusion, images
from pixart_jax.data import shapes
from pixart_jax.models.configs import TransformerConfig
from pixart_jax.models.transformer import PixArtTransformer
from pixart_jax.text import load_tokenizer, tokenize

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=2000)
parser.add_argument("--batch", type=int, default=32)
parser.add_argument("--scenes", type=int, default=2048)
parser.add_argument("--out", default="out/first_steps.png")
options = parser.parse_args()

# Frozen parts: autoencoder (f = 8) and text encoder.
vae = pixart_jax.load_component("assets/shapes/vae")
text_encoder = pixart_jax.load_component("assets/shapes/text_encoder")
tokenizer = load_tokenizer("assets/shapes/tokenizer")


def encode_text(captions: list[str]) -> tuple[jax.Array, jax.Array]:
    """Captions → text states [b, l, c] and lengths [b]."""
    ids, lengths = tokenize(tokenizer, captions, 32)
    return text_encoder.apply(ids, lengths), jnp.asarray(lengths)


# Data: latents [n, 8, 8, 4] and text states of rendered scenes.
scenes = [shapes.scene_at("plain", "train", i) for i in range(options.scenes)]
pixels = images.to_model(np.stack([shapes.render(scene) for scene in scenes]))
latents = vae.encode(pixels)[0] * vae.config.scaling_factor
states, lengths = encode_text([shapes.captions(scene)["brief"] for scene in scenes])

config = TransformerConfig(
    depth=4, width=96, heads=4, sample_size=8, caption_width=states.shape[-1], text_tokens=32
)
model = PixArtTransformer(config)
variables = model.init(jax.random.key(0), latents[:1], jnp.zeros(1), states[:1], lengths[:1])
params = flax.core.meta.unbox(variables["params"])
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, opt_state, key):
    rows, times, noise = jax.random.split(key, 3)
    i = jax.random.randint(rows, (options.batch,), 0, len(latents))
    t = jax.random.randint(times, (options.batch,), 0, 1000)
    eps = jax.random.normal(noise, latents[i].shape)

    def loss_fn(params):
        x_t = diffusion.add_noise(latents[i], eps, t)
        output = model.apply({"params": params}, x_t, t, states[i], lengths[i])
        loss = diffusion.training_loss(output, latents[i], eps, t)
        return jnp.mean(loss["mse"] + loss["vb"])

    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss


for step in range(options.steps):
    params, opt_state, loss = train_step(params, opt_state, jax.random.key(step))
    if step % 100 == 0 or step == options.steps - 1:
        print(f"step {step}  loss {loss:.4f}")

prompts = ["a large red star", "a small blue circle", "a green square", "a yellow triangle"]
prompt_states, prompt_lengths = encode_text(prompts)
noise = jax.random.normal(jax.random.key(1), (len(prompts), 8, 8, 4))
x = diffusion.sample(
    lambda x, t: model.apply({"params": params}, x, t, prompt_states, prompt_lengths),
    noise,
    "dpm++",
    20,
)
generated = images.to_uint8(np.asarray(vae.decode(x / vae.config.scaling_factor)))
images.write_png(options.out, np.concatenate(generated, axis=1))
print(options.out)
