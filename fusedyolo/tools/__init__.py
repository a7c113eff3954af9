"""What ``python -m fusedyolo`` and the benchmarks share: cases, workloads, parity, compiled resources, tuning."""
