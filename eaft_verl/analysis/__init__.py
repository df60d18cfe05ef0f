"""Token statistics on disk -> landscape, gate lab, verdict.

May import recipe and below, and torch. Read `store.py` first.
"""
