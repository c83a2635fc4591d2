"""The device mesh, shardings from logical axis names, and the processes of a run."""

# A process's place, as a launcher sets it; read only where all three are set.
DISTRIBUTED_ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
