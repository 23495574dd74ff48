"""The points of `attach`: submodules by name or as modules, each with its `DFALayer`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dfa_kernels import checks
from dfa_kernels.nn.layer import DFALayer

# Submodules by name or as modules; a mapping gives each name its batch dimensions.
Points = Sequence[str | nn.Module] | Mapping[str, Sequence[int] | None]

_WRAPPERS = ("module.", "_orig_mod.")  # what wrappers put before names


class Names:
    """The names of a model's submodules; the first of those that have several."""

    def __init__(self, model: nn.Module, function: str = "attach"):
        self._function = function  # that messages begin with
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._first = {module: name for name, module in reversed(self._modules.items())}

    def of(self, argument: str, point: str | nn.Module) -> str:
        """The name of a submodule that is given by name or itself."""
        module = point
        if isinstance(point, str):
            bare = point
            while bare not in self._modules and bare.startswith(_WRAPPERS):
                bare = bare.partition(".")[2]
            module = self._modules.get(bare, point)
        name = self._first.get(module) if isinstance(module, nn.Module) else None
        if name:
            self._refuse_uncalled(argument, name)
            return name
        got = repr(point) if isinstance(point, str) else type(point).__name__
        raise ValueError(
            f"{self._function}: {argument} must be submodules of the model, got {got}"
            f"{self._hint(point)}"
        )

    def module(self, argument: str, point: str | nn.Module) -> nn.Module:
        """The submodule that is given by name or itself."""
        return self._modules[self.of(argument, point)]

    def _refuse_uncalled(self, argument: str, name: str) -> None:
        """Raise where nothing calls the module, so that a hook on it would do nothing."""
        module = self._modules[name]
        outer = name.rpartition(".")[0]
        if type(module).forward is nn.Module.forward and "forward" not in vars(module):
            why = f"a {type(module).__name__} has no forward; give its elements"
        elif type(self._modules[outer]).forward is nn.MultiheadAttention.forward:
            why = f"attention takes the weights of its parts and calls none; give {outer!r}"
        elif ".parametrizations." in f".{name}.":
            whole = name.partition(".parametrizations.")[0]
            why = f"it makes a weight, no activation; give {whole!r}"
        elif around := self._data_parallel(name):
            why = (
                f"{around!r} is an nn.DataParallel, whose copies run at the same time; use "
                "DistributedDataParallel"
            )
        else:
            return
        raise ValueError(
            f"{self._function}: {argument} must be submodules that the forward pass calls, got "
            f"{name!r}: {why}"
        )

    def _data_parallel(self, name: str) -> str:
        """The name of the `nn.DataParallel` that a module is in, or ""."""
        while name := name.rpartition(".")[0]:
            if isinstance(self._modules[name], nn.DataParallel):
                return name
        return ""

    def _hint(self, point: Any) -> str:
        names = [name for name in self._modules if name]
        near = []
        if isinstance(point, str):
            bare = point
            while bare.startswith(_WRAPPERS):
                bare = bare.partition(".")[2]
            near = difflib.get_close_matches(bare, names, cutoff=0.5)
        if near:
            return f"; the nearest are {', '.join(map(repr, near))}"
        shown = ", ".join(map(repr, names[:6])) + (", ..." if len(names) > 6 else "")
        return f"; it has {len(names)}: {shown}" if names else "; it has none"

    def listed(self, argument: str, points: Any) -> list[str]:
        """The names of several."""
        given = list(points) if isinstance(points, Mapping) else checks.listed(points)
        # A Sequential could be listed.
        if given is None or (
            isinstance(points, nn.Module) and not isinstance(points, nn.ModuleList)
        ):
            got = repr(points) if isinstance(points, str) else type(points).__name__
            raise TypeError(
                f"{self._function}: {argument} must be a sequence of submodules or of their "
                f"names, got {got}"
            )
        return [self.of(argument, point) for point in given]

    def layers(self, argument: str, points: Points, suffix: str) -> dict[str, DFALayer]:
        """A `DFALayer` for each of the points."""
        names = self.listed(argument, points)
        if len(set(names)) < len(names):
            raise ValueError(
                f"{self._function}: {argument} must be one or more distinct submodules, got "
                f"{names} (of several names of one module, the first)"
            )
        dims = points.values() if isinstance(points, Mapping) else [None] * len(names)
        pairs = zip(names, dims, strict=True)
        return {name: DFALayer(name + suffix, dims) for name, dims in pairs}
