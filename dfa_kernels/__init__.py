"""Feedback signals of Direct Feedback Alignment, from a seed."""

from dfa_kernels import backends
from dfa_kernels.functional import feedback_matrix, project
from dfa_kernels.nn import (
    DFA,
    Alignment,
    Attachment,
    DFALayer,
    FeedbackPointsHandling,
    alignment,
    attach,
    tinydfa_scales,
)
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
