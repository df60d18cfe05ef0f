"""The SFT trainer on verl's FSDP engine: logits hook, loss, worker, batches, stored passes, checkpoints.

Read `arm.py` first, then `loss.py`, where token statistics meet the objective.
"""
