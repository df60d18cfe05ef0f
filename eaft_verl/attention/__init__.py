"""How rows attend that lie in one batch: packed, by groups of heads, and what they begin with once for all of them.

Imports torch, transformers and the root. Read `tree.py` first: rows as a tree of pieces; `packed.py` is the attention
that takes it piece by piece, in training; `grouped.py` the one of evaluations.
"""
