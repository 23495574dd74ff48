"""The experiments of Launay, Poli, Krzakala 2019 (arXiv:1906.04554), run with this library.

    python -m benchmarks.paper [table1|table2|table4|figure4|vgg16] [--quick] [--output DIR]

What these follow: the questions are the paper's tables and figures by its numbers; architectures,
rates, batches, epochs and numbers of seeds are those of its published code
(github.com/lightonai/principled-dfa-training, commit a8f0e4d), and each place that departs from
it says so. Of the paper's own results only figure 4's are in that code; they are in `published`.
The text with tables 1, 2 and 4 was not at hand: rows and claims are those that the trainer's guide
(dfa_kernels/nn/README.md) reports of them, table 1 has networks of this project's choice, and no
number is held against theirs.
"""
