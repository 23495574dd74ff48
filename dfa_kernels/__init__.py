"""Feedback signals of Direct Feedback Alignment, from a seed."""

from dfa_kernels.alignment import Alignment, alignment
from dfa_kernels.attach import Attachment, attach
from dfa_kernels.functional import backends, feedback_matrix, project
from dfa_kernels.nn import DFA, DFALayer, FeedbackPointsHandling, tinydfa_scales
from dfa_kernels.version import __version__

__all__ = [
    "DFA",
    "Alignment",
    "Attachment",
    "DFALayer",
    "FeedbackPointsHandling",
    "__version__",
    "alignment",
    "attach",
    "backends",
    "feedback_matrix",
    "project",
    "tinydfa_scales",
]
