"""Studies on a cluster: cells as elements of Slurm arrays."""
