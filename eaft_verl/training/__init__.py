"""What runs on verl: `sft/` our trainer, `grpo/` verl's own, `verl_cpu/` the platform that lets both run on CPU.

The only room of verl; may import cluster and below. Read `sft/trainer.py` first; `schedule.py` says when it ends.
"""
