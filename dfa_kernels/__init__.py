"""Feedback signals of Direct Feedback Alignment, from a seed."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:  # for type checkers a module cannot be called
    from dfa_kernels.backends.registry import backends
else:
    from dfa_kernels import backends

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
