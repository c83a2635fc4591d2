"""Models in Flax linen, as pure functions of parameters and arrays; independent of diffusion."""
