"""Shows what was measured: in the terminal, as figures, and as pages of tables."""
