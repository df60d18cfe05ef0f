"""verl chooses its platform once per process, when its first engine module is imported: it must be the CPU here."""

import os

os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
