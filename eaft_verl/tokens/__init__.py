"""What is known of each token: statistics of logits in one chunked pass, and the divergence from a reference.

Imports torch and nothing of ours; `stats.py`, the types, not even torch. Read `stats.py` first, then `logits.py`;
`row_kernels.py` chooses between it and Triton (`triton_rows.py`); `vocab_parallel.py` is for trainers of other people.
"""
