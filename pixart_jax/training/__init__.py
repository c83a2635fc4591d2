"""Runs a config's stages: state, optimizer, step, loop, checkpoints, metrics and ledger."""
