"""The trainer: `DFALayer` marks an activation, `DFA` trains what is marked, `attach` does both.

`alignment` measures how close the signals come to backpropagation's gradients.
"""

from dfa_kernels.nn.angles import Alignment, alignment
from dfa_kernels.nn.dfa import DFA, INDEPENDENT_ROWS, MODES, tinydfa_scales
from dfa_kernels.nn.hooks import Attachment, attach
from dfa_kernels.nn.layer import DFALayer, FeedbackPointsHandling

__all__ = [
    "DFA",
    "INDEPENDENT_ROWS",
    "MODES",
    "Alignment",
    "Attachment",
    "DFALayer",
    "FeedbackPointsHandling",
    "alignment",
    "attach",
    "tinydfa_scales",
]
