"""Times contenders in interleaved rounds, checks their results, and measures the roofs."""
