"""Checks and times contenders in interleaved rounds, and measures the roofs of the machine."""
