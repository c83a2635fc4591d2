"""Commands of ``python -m pixart_jax`` without a package of their own."""
