"""Weights of one attention mechanism in the form of another: calibration, losses, card. Imports run and below."""
