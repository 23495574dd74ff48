"""What `torch.compile` compiled is compiled anew once a model's hooks change."""

from __future__ import annotations

import sys
from typing import Any

import torch


def forget_compiled() -> None:
    """Drop all compiled code of the process, if there is any: it does not look at hooks.

    Its next calls compile again. Nothing was compiled: nothing is done.
    """
    frames: Any = sys.modules.get("torch._dynamo.convert_frame")  # its import takes a second
    if frames is None or torch.compiler.is_compiling():
        return
    if getattr(frames.input_codes, "seen", True):  # what it has compiled, or tried to
        torch.compiler.reset()
