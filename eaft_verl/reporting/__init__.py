"""Run directories -> statistics, comparability, tables, figures, one page. Reads files only.

May import recipe, pages and below; no torch. Read `report.py` first, then `measures.py`.
"""
