"""Models as pure functions of (parameters, arrays), in Flax linen; nothing here knows of
diffusion."""
