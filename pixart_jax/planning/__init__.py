"""Memory, time and cost of a run, from its compiled program, without the target hardware."""
