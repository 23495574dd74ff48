"""The trainer: `DFALayer` marks an activation, `DFA` trains what is marked, `attach` does both.

`alignment` measures how close the signals come to backpropagation's gradients.
"""

from dfa_kernels.nn.angles import Alignment, alignment
from dfa_kernels.nn.attachment import Attachment, attach
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.layer import DFALayer, FeedbackPointsHandling
from dfa_kernels.nn.pipeline import FeedbackStage
from dfa_kernels.nn.settings import MODES
from dfa_kernels.nn.sources import INDEPENDENT_ROWS, OutputWeights, Source, tinydfa_scales

__all__ = [
    "DFA",
    "INDEPENDENT_ROWS",
    "MODES",
    "Alignment",
    "Attachment",
    "DFALayer",
    "FeedbackPointsHandling",
    "FeedbackStage",
    "OutputWeights",
    "Source",
    "alignment",
    "attach",
    "tinydfa_scales",
]
