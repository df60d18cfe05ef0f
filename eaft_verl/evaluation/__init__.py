"""Benchmarks, drift and held-out likelihood of a checkpoint. The only folder that imports lm_eval and vllm."""
