"""The run folder and its contents: records, run card, weights, checkpoints. Imports spec and base."""
