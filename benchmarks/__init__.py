"""The benchmarks: speed against what the kernels replace, and the paper's experiments.

`harness` measures, `report` shows what was measured, and the `bench_*.py` and `paper` use both.
Imports go only that way.
"""
