"""Benchmarks, one file each; `eval.registry.TASKS` names them."""
