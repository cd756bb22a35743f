"""The run folder and what can be read from it: records, run card, weights, checkpoints. Imports spec and base."""
