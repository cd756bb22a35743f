"""Comparisons of kernels with float64 references, for tests and `headway bench gpu`."""
