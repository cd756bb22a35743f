"""Variants that continue a trained model with another mechanism, and variants from scratch at the same compute."""
