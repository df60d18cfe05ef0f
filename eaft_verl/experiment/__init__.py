"""One file a verb: what `eaft prepare`, `train`, `evaluate` and `compare` do, and which run needs which.

May import everything but launch and cli. Read `compare.py` first, then `train.py`.
"""
