"""Benchmarks, drift and held-out likelihood of a checkpoint; the only room of lm_eval and vllm.

May import data and below. Read `checkpoints.py` first; `settings.py` needs no torch and is what the recipe sees.
"""
