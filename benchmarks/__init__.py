"""What VMwrapper costs on this machine: `python -m benchmarks NAME`. Results are in `docs/performance.md`."""
