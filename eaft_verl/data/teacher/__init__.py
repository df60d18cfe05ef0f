"""Prompts become verified training rows: asked of any OpenAI-compatible endpoint, graded, screened, drawn by seed.

May import what `data` may; `openai` late. Read `synthesis.py` first, then `spec.py` and `endpoint.py`.
"""
