"""The tests, in folders like the package's own; what several of them use is in this one."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
