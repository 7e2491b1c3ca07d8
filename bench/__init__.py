"""Benchmarks: `python -m bench.run` measures, `python -m bench.report` shows. See docs/bench.md."""
