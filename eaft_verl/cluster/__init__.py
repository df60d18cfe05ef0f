"""One Ray session for both trainers, what an arm asks of a cluster, and every check before a model is loaded.

May import planning and below, and ray where it connects. Read `doctor.py` first; `findings.py` judges, `session.py`
connects.
"""
