"""Shows what was measured: in the terminal, in figures, and in pages of tables."""
