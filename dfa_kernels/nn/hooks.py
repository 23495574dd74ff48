"""`attach` trains a model by Direct Feedback Alignment without editing it, by forward hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dfa_kernels import checks
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.layer import DFALayer


class Hook:
    """A forward hook that passes a module's output through a `DFALayer` or a `DFA`.

    An object, not a closure: a copied or pickled model gets hooks of its own.
    """

    def __init__(self, name: str, target: DFALayer | DFA):
        self.name = name
        self.target = target

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """`output` with its tensor replaced."""
        if isinstance(self.target, DFA) and holds_loss(output):
            raise ValueError(
                f"attach: {self.name!r} returns its loss, which no signal would reach; give "
                "output=..., the submodule that makes the logits"
            )
        return through(self.target, output, self.name)


def through(function: Callable[[Tensor], Tensor], output: Any, name: str) -> Any:
    """`output` with the tensor in it passed through `function`.

    The tensor is the output itself, the first element of a tuple or list (transformer blocks), or
    the entry "logits" of a mapping (Hugging Face).
    """
    if isinstance(output, Tensor):
        return function(output)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        elements = [function(output[0]), *output[1:]]
        named = hasattr(output, "_fields")
        return type(output)(*elements) if named else type(output)(elements)
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        replaced = type(output)(**output)
        replaced["logits"] = function(output["logits"])  # type: ignore[index]
        return replaced
    raise TypeError(
        f"attach: {name!r} must return a tensor, a tuple or list that begins with one, or a "
        f"mapping with 'logits', got {type(output).__name__}"
    )


def holds_loss(output: Any) -> bool:
    """Whether a model's output is, or begins with, a loss to run backward."""
    if isinstance(output, Mapping):
        first = output.get("loss")
    else:
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, Tensor) and first.dim() > 0:
            return False
    return isinstance(first, Tensor) and first.requires_grad


class Attachment:
    """A model trained by Direct Feedback Alignment until `detach()`.

    Attributes:
        dfa: the `DFA`. It is no part of the model, whose state_dict stays as it is; it has its own.
    """

    def __init__(
        self, model: nn.Module, points: Mapping[str, DFALayer], output: str | None, dfa: DFA
    ):
        self.dfa = dfa
        modules = dict(model.named_modules())
        self._handles = [
            modules[name].register_forward_hook(Hook(name, layer)) for name, layer in points.items()
        ]
        ends = model if output is None else modules[output]
        hook = Hook(output or type(model).__name__, dfa)
        self._handles += [ends.register_forward_hook(hook), *dfa.watch(model)]

    @property
    def mode(self) -> str:
        """How the next forward passes train; see `DFA.mode`."""
        return self.dfa.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        self.dfa.mode = mode

    def detach(self) -> None:
        """Undo `attach`; the model keeps what it has learned."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def attach(
    model: nn.Module,
    points: Sequence[str | nn.Module] | Mapping[str, Sequence[int] | None],
    output: str | nn.Module | None = None,
    **arguments: Any,
) -> Attachment:
    """Train a model by Direct Feedback Alignment without editing it.

        handle = attach(model, ["layer1", "layer2", "layer3"], seed=1)
        ...  # train as ever
        handle.detach()

    Args:
        model: any module, before its first compiled call. One that already ran compiled needs
            `torch.compiler.reset()` first, or it goes on as before.
        points: the submodules whose outputs are trained by a signal, by name or as modules, in any
            order. Each should end in its non-linearity or residual sum, and returns a tensor, or a
            tuple or list that begins with it. Gradients end there: what lies between two points is
            trained by backpropagation from the signal of the second. A mapping gives each name the
            batch dimensions of its output. For one that is called several times in a forward pass
            see `FeedbackPointsHandling`.
        output: the submodule that makes the output whose gradient is the error, such as the last
            linear layer of a model that returns its loss. It runs after all points. None: the model
            itself, which returns a tensor, a tuple or list that begins with it, or a mapping with
            "logits".
        arguments: those of `DFA` from `normalization` on. `mask` goes by the points' names.

    Raises:
        TypeError, ValueError: naming the argument and what was got; also where the model already
            has a DFA, and where it returns its loss and `output` is not given.

    Warns where a forward pass ends with points that no `output` came after.

    A copy of the model alone has its hooks but no handle to detach them: copy or pickle (model,
    handle) together.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach: model must be a module, got {type(model).__name__}")
    if find_dfas(model):
        raise ValueError("attach: model must have no DFA yet; detach the other one first")
    given = list(points) if isinstance(points, Mapping) else checks.listed(points)
    is_module = isinstance(points, nn.Module) and not isinstance(points, nn.ModuleList)
    if given is None or is_module:  # a Sequential could be listed
        got = repr(points) if isinstance(points, str) else type(points).__name__
        raise TypeError(
            f"attach: points must be a sequence of submodules or of their names, got {got}"
        )
    names = [_name(model, "points", point) for point in given]
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"attach: points must be one or more distinct submodules, got {names} (of several "
            "names of one module, the first)"
        )
    end = None if output is None else _name(model, "output", output)
    if end in names:
        raise ValueError(f"attach: output must not be one of the points, got {end!r}")
    dims = points.values() if isinstance(points, Mapping) else [None] * len(names)
    layers = {name: DFALayer(name, of) for name, of in zip(names, dims, strict=True)}
    return Attachment(model, layers, end, DFA(layers.values(), **arguments))


def find_dfas(model: nn.Module) -> list[DFA]:
    """The `DFA`s that train a model, as submodules or attached."""
    found: dict[DFA, None] = {}
    for module in model.modules():
        if isinstance(module, DFA):
            found[module] = None
        for hook in module._forward_hooks.values():
            if isinstance(hook, Hook) and isinstance(hook.target, DFA):
                found[hook.target] = None
    return list(found)


def _name(model: nn.Module, argument: str, point: str | nn.Module) -> str:
    """The name of a submodule in its model; the first if it has several."""
    module = point
    if isinstance(point, str) and point:
        module = dict(model.named_modules(remove_duplicate=False)).get(point, point)
    for name, other in model.named_modules():
        if name and module is other:
            return name
    got = repr(point) if isinstance(point, str) else type(point).__name__
    names = ", ".join(name for name, _ in model.named_modules() if name)
    raise ValueError(f"attach: {argument} must be submodules of the model ({names}), got {got}")
