"""Kernels, each with a PyTorch reference. This package imports only torch (Triton is imported lazily)."""
