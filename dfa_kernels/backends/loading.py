"""The kernels of operators whose extension is not loaded yet: the first call loads it.

So an operator works after nothing but `import dfa_kernels`: called directly, from an exported
program, or from a graph in a fresh process. The extension's own kernels have keys that go before
those of these ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dfa_kernels import checks
from dfa_kernels.backends.registry import choose


def kernel(operator: Callable, function: str, backend: str) -> Callable:
    """A kernel that loads the backend's extension and calls the operator again.

    Raises RuntimeError with the reason if the backend cannot serve the arguments' device, and
    TypeError for tensors that it has no kernel for. `function` is the operator's name in messages.
    """

    def load(*arguments):
        device = torch.device("cpu")
        for argument, value in _tensors_and_devices(operator, arguments):
            if argument == "packed":  # on the CPU; the kernel checks it
                continue
            device = value if isinstance(value, torch.device) else value.device
            if isinstance(value, Tensor):
                checks.error(function, value, argument)
        choose(function, device, backend)
        return operator(*arguments)

    return load


def _tensors_and_devices(
    operator: Any, arguments: tuple[Any, ...]
) -> Iterator[tuple[str, Tensor | torch.device]]:
    """The tensors among an operator's arguments, also in lists, and its device, by their names."""
    for schema, value in zip(operator._schema.arguments, arguments, strict=False):
        if isinstance(value, (Tensor, torch.device)):
            yield schema.name, value
        elif isinstance(value, (list, tuple)):
            for index, one in enumerate(value):
                if isinstance(one, Tensor):
                    yield f"{schema.name}[{index}]", one
