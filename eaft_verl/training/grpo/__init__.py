"""The GRPO arm: verl's `main_ppo`, configured, followed and fed with rollouts.

Read `run.py` first; `config.py` writes main_ppo's settings, `rollout_server.py` generates where there is no vLLM.
"""
