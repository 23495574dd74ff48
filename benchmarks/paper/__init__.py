"""The experiments of Launay, Poli, Krzakala 2019 (arXiv:1906.04554), run with this library.

    python -m benchmarks.paper [table1|table2|table4|figure4|distributions|transformers|vgg16]

Experiments are named after the paper's tables and figures. Architectures, learning rates, batch
sizes, epochs and numbers of seeds are those of its published code
(github.com/lightonai/principled-dfa-training, commit a8f0e4d); where we depart from it, the code
says so. That code contains the paper's results for figure 4 only; they are in `published`. The
paper's text with tables 1, 2 and 4 was not available. Their rows and claims are those under "What
helps" in dfa_kernels/nn/README.md, table 1 has networks of this project's choice, and no number of
these tables is compared with the paper's. `distributions` and `transformers` are of our own.
"""
