"""Where arrays lie: the device mesh, and the table from logical axis names to mesh axes."""
