"""Triton kernels. Importing these modules needs Triton."""
