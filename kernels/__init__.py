"""Triton kernels: terms on loaded values, and the drivers that load and store."""
