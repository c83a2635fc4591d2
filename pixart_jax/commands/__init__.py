"""The commands of ``python -m pixart_jax`` that belong to no other room."""
