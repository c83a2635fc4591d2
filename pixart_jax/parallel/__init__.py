"""Where arrays lie: the device mesh, and the table from logical axis names to mesh axes."""

# Where this process belongs, in its environment: the local launcher says so, and any other may.
# Read together or not at all.
DISTRIBUTED_ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
