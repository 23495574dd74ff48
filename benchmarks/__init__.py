"""The benchmarks: speed against what the kernels replace, and the paper's experiments.

`harness` measures and `report` shows what was measured. The `bench_*.py` and `paper` use both.
`report` imports from `harness`, and neither imports from what uses them.
"""
