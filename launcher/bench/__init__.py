"""Speed measurements: steps, mechanisms, loader, checkpoints, micro-batches. Imports study and below."""
