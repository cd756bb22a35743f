"""Weights in and out: export, import, generation from a checkpoint. Imports run and below."""
