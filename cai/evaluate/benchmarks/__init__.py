"""Public benchmarks on a run's adapter: HarmBench, XSTest and MT-Bench, base against tuned.

`suite.measure_all` serves a milestone and `--benchmark`: all answers are generated first, then a judge is loaded where
a verdict is missing. Importing this package imports neither torch nor scipy.
"""
