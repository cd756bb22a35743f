"""Conversion of a trained model to another attention mechanism: calibration, losses, card, and the start of a run."""
