"""Weights in and out: export, import, generation from a checkpoint. Imports bench and below."""
