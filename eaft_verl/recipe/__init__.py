"""From a recipe file to the resolved, checked configuration of an arm, and what other rooms take from it.

May import evaluation's settings, data and below; no torch. Read `resolve.py` first, then `checks.py`.
"""
