"""Benchmarks of fusedyolo: what one loss launches, moves, waits for, compiles to and, on a GPU, how long it takes.

``python -m bench`` is the entry point. Nothing here holds a formula of a loss: the baseline is the package's own eager
reference, imported.
"""
