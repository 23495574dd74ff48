"""`python -m dfa_kernels`."""

from dfa_kernels.cli import main

raise SystemExit(main())
