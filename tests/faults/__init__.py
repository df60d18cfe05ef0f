"""The fault matrix: every row breaks something, drives the real program, and asserts what must be seen.

`python -m tests.faults [pytest arguments]` runs all rows and prints the table; CI runs those that are not slow.
The slow half on two cores: `python -m tests.faults -m slow -n 2 --dist worksteal` (`loadfile` would use one of them).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where its neighbours are found, as pytest has it
