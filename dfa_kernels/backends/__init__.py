"""The backends, each imported at its first use by `dfa_kernels.ops`."""
