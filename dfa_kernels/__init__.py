"""Feedback signals of Direct Feedback Alignment, from a seed."""

from dfa_kernels.alignment import Alignment, alignment
from dfa_kernels.functional import backends, feedback_matrix, project
from dfa_kernels.nn import DFA, DFALayer, FeedbackPointsHandling
from dfa_kernels.version import __version__

__all__ = [
    "DFA",
    "Alignment",
    "DFALayer",
    "FeedbackPointsHandling",
    "__version__",
    "alignment",
    "backends",
    "feedback_matrix",
    "project",
]
