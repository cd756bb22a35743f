"""The transformer, one file per attention mechanism, and its cost accounting. Single-device code."""
