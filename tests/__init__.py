"""The tests, in folders like the package's; helpers that several folders use are in this one."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
