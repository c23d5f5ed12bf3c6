"""What VMwrapper costs on this machine: `python -m benchmarks NAME`. Results are in `docs/performance.md`."""

import os

# Each benchmark has a form that takes seconds, for the regression guard; `--short` sets this for a run.
SHORT = bool(os.environ.get("VMWRAPPER_BENCH_SHORT"))
