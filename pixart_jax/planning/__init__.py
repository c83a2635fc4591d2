"""The very step and sampler compiled for hardware that is not here: memory, time, cost."""
