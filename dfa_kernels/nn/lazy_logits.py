"""Logits that are made when something looks at them, and their cross-entropy, which need not.

The hooks of `attach(..., head=...)` give the output layer its input as `Hidden`. The layer's
`F.linear` then returns `Logits`, which know how to make themselves and hold no memory. What a
causal model does to logits on their way to `F.cross_entropy` is followed: conversions, shapes,
chosen tokens, softcapping. The loss is then that of `DFA.linear_cross_entropy`. Any other function
gets whole logits, made as ever.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.hooks import RemovableHandle

from dfa_kernels import checks
from dfa_kernels.nn import guards
from dfa_kernels.nn.chunks import REDUCTIONS, Head, Loss
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.functions import drops_graph
from dfa_kernels.nn.layer import recomputing
from dfa_kernels.nn.ties import Tie


class Hidden(Tensor):
    """The input of the output layer: a tensor as it was, of which `F.linear` makes `Logits`."""

    plain: Tensor

    @classmethod
    def of(cls, plain: Tensor) -> Hidden:
        """`plain`, which is no subclass itself."""
        hidden: Hidden = plain.as_subclass(cls)
        hidden.plain = plain
        return hidden

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """As with the plain tensor, but for `F.linear`."""
        first = args[0] if args else None
        args, kwargs = tree_map_only(Hidden, lambda hidden: hidden.plain, (args, kwargs or {}))
        if func is F.linear and isinstance(first, Hidden):
            logits = _linear(*args, **kwargs)
            if logits is not None:
                return logits
        result = func(*args, **kwargs)
        # Such as .to() where there is nothing to convert.
        return first if isinstance(first, Hidden) and result is first.plain else result


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Logits | None:
    """Logits to be made, or None where `F.linear` is to make them or to raise."""
    head = Head(hidden, weight, bias)
    if any(not is_plain(one) or one.device != hidden.device for one in head.tensors):
        return None
    if hidden.is_meta or hidden.dim() < 2 or weight.dim() != 2 or not len(weight):
        return None
    if hidden.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        return None
    dtypes = {one.dtype for one in head.tensors}
    if not dtypes <= {*checks.DTYPES} or (len(dtypes) > 1 and head.autocast is None):
        return None
    return Origin(head).new()


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no subclass, which could make another product of it."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


class Origin:
    """The call of the output layer that logits come from.

    Attributes:
        head, dtype: what they are made of, and their dtype; `words` is the number of words.
        tie: the activations that their gradient sends signals to.
        live: all logits that come from here.
        has_loss: whether a loss was computed without them, which gives them no gradient.
    """

    def __init__(self, head: Head):
        self.head, self.dtype, self.words = head, head.dtype, len(head.weight)
        self.dfa: DFA | None = None
        self.tie: Tie | None = None
        self.name = ""
        self.live: list[weakref.ref[Logits]] = []
        self.has_loss = False
        self._spent = False  # whether a backward pass has dropped what it needs
        self._state = self._state_now()

    def new(self) -> Logits:
        """The layer's output."""
        shape = self.head.hidden.shape[:-1]
        places = torch.arange(shape.numel(), device=self.head.hidden.device).view(shape)
        grad = self.tie is not None or any(one.requires_grad for one in self.head.tensors)
        return Logits(self, None, None, places, len(shape), False, self.dtype, (1.0, None), grad)

    def make(self) -> Tensor:
        """The layer's output, whole; if gradients are enabled, tied to the activations."""
        self._check()
        with self.head.without_autocast():
            hidden, weight, bias = self.head
            bias = None if bias is None else bias.to(self.dtype)
            logits = F.linear(hidden.to(self.dtype), weight.to(self.dtype), bias)
        tie = self._tied()
        return self._watched(logits if tie is None else tie.apply(logits))

    def loss(self, dfa: DFA, target: Tensor, loss: Loss, dtype: torch.dtype) -> Tensor:
        """The loss of all tokens, in a dtype, of logits that are never whole."""
        self._check()
        tie = self._tied()
        self.has_loss |= torch.is_grad_enabled()
        target = target.view(self.head.hidden.shape[:-1])
        return self._watched(dfa.loss_of(tie, self.head, target, loss, (self.dtype, dtype)))

    def _tied(self) -> Tie | None:
        """The activations that a result made now sends signals to."""
        tie, dfa = self.tie, self.dfa
        if tie is None or dfa is None or not torch.is_grad_enabled():
            return None
        apart = dfa.error_transform is not None
        apart |= dfa.signal_transform is not None and not dfa.lean
        if self.has_loss and apart and not recomputing("attach"):
            guards.warn_of_errors_apart(dfa._group.said, self.name)
        return tie

    def _state_now(self) -> list[tuple[torch.Size, int | None]]:
        """What changes where a tensor does."""
        return [
            (one.shape, None if one.is_inference() else one._version) for one in self.head.tensors
        ]

    def _check(self) -> None:
        gone = any(one.numel() and not one.untyped_storage().nbytes() for one in self.head.tensors)
        if gone or self._state_now() != self._state:
            raise RuntimeError(
                f"attach: head {self.name!r}: the logits are made when they are looked at, and "
                f"{'its weights are gone' if gone else 'its weights or its input have changed'} "
                "since its forward pass; look at them before the optimizer's step and inside the "
                "model, or give output= instead of head="
            )

    def _watched(self, result: Tensor) -> Tensor:
        """Has a backward pass through a result drop the activations, as it drops all else."""
        if result.grad_fn is None:
            return result
        if self._spent:
            result.register_hook(self._refuse)
        else:
            origin = weakref.ref(self)
            result.grad_fn.register_hook(lambda *_: _drop(origin()))
        return result

    def drop(self) -> None:
        """Let go of the activations, which nothing can train any more."""
        self.tie, self._spent = None, True

    def _refuse(self, gradient: Tensor) -> None:
        raise RuntimeError(
            f"attach: head {self.name!r}: backward ran a second time through the same logits, "
            "after what it needs was dropped; the first one needs retain_graph=True"
        )


def _drop(origin: Origin | None) -> None:
    if origin is not None and drops_graph():
        origin.drop()


class Logits(Tensor):
    """A tensor of no memory that is made when a function needs its numbers.

    It is what `step` makes of `before`, or else of its origin: row `places[...]` of all tokens,
    along the dimension `axis`; with `repeats` a token may have several. `cap` has the factor of
    logits so far, and that of its tanh if there was one. Once it is whole, all functions get
    `whole`.
    """

    origin: Origin
    before: Logits | None
    step: Callable[[Tensor], Tensor]
    places: Tensor
    axis: int
    repeats: bool
    cap: tuple[float, float | None]
    whole: Tensor | None
    hooks: OrderedDict[int, Any]  # of its gradient

    @staticmethod
    def __new__(
        cls,
        origin: Origin,
        before: Logits | None,
        step: Callable[[Tensor], Tensor] | None,
        places: Tensor,
        axis: int,
        repeats: bool,
        dtype: torch.dtype,
        cap: tuple[float, float | None],
        grad: bool,
    ) -> Logits:
        """See the class."""
        shape = [*places.shape]
        shape.insert(axis, origin.words)
        self = _wrapper(cls, shape, dtype, places.device, grad and torch.is_grad_enabled())
        self.origin, self.before, self.step = origin, before, step
        self.places, self.axis, self.repeats, self.cap = places, axis, repeats, cap
        self.whole, self.hooks = None, OrderedDict()
        if self.requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse_unseen)
        origin.live.append(weakref.ref(self))
        return self

    def tied_to(self, dfa: DFA, name: str) -> Tensor | None:
        """The same as the output of `dfa`, or None where the layer has done more than `F.linear`.

        The pass under way ends here.
        """
        head, group = self.origin.head, dfa._group
        if self.before is not None or self.whole is not None:
            return None
        origin = self.origin
        origin.tie = dfa.begin_head(head)
        origin.dfa, origin.name = dfa, name
        if origin.tie is not None and origin.tie.plan.mesh is not None:
            guards.warn_of_a_whole_head(group.said, name)
            return origin.make()
        return origin.new()

    def made(self) -> Tensor:
        """The whole of it, from now on; with gradients if it requires one."""
        if self.whole is None:
            with torch.set_grad_enabled(self.requires_grad):
                if self.before is None:
                    self.whole = self.origin.make()
                else:  # without a gradient it may be of one that has one
                    before = self.before.made if self.requires_grad else self.before.numbers
                    self.whole = self.step(before())
            for hook in self.hooks.values():
                self.whole.register_hook(hook)
        return self.whole

    def numbers(self) -> Tensor:
        """Its numbers, which are not kept where it requires a gradient."""
        if self.whole is not None or not self.requires_grad:
            return self.made().detach()
        with torch.no_grad():
            if self.before is None:
                return self.origin.make()
            return self.step(self.before.numbers())

    def then(self, step: Callable[[Tensor], Tensor], **changed: Any) -> Logits:
        """What a step makes of it."""
        names = ("places", "axis", "repeats", "dtype", "cap")
        facts = {name: getattr(self, name) for name in names} | changed
        return Logits(self.origin, self, step, **facts, grad=self.requires_grad)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Follows the function, or runs it with whole logits."""
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, Logits) and first.whole is None:
            if func in _FACTS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            followed = _FOLLOWED.get(func)
            if followed is not None and not any(
                isinstance(other, Logits) for other in tree_leaves((args[1:], kwargs))
            ):
                result = followed(func, first, *args[1:], **kwargs)
                if result is not None:
                    return result
        return _with_whole(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """For what torch does without asking above, such as collectives: below autograd."""
        args, kwargs = tree_map_only(Logits, Logits.numbers, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Its numbers only if they are there."""
        if self.whole is not None:
            return repr(self.whole)
        return f"Logits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"


@torch.compiler.disable(reason="dfa_kernels: logits of an output layer that ran uncompiled")
def _wrapper(
    kind: type[Logits], shape: Sequence[int], dtype: torch.dtype, device: torch.device, grad: bool
) -> Logits:
    """A tensor of no memory."""
    made: Logits = Tensor._make_wrapper_subclass(
        kind, shape, dtype=dtype, device=device, requires_grad=grad
    )
    return made


def _refuse_unseen(gradient: Tensor | None) -> None:
    if gradient is None:
        return
    raise RuntimeError(
        "attach: head: a gradient came to logits from a function that does not say so before, as "
        "a torch.autograd.Function of its own: give output= instead of head="
    )


def _with_whole(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """A function of whole logits."""
    name = getattr(func, "__name__", "")
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Logits)]
    learns = torch.is_grad_enabled() and func not in _WITHOUT_GRADIENT
    for one in given if learns else ():
        dfa = one.origin.dfa
        if one.whole is None and one.requires_grad and dfa is not None:
            what = torch.overrides.resolve_name(func) or name
            guards.warn_of_looked_at_logits(dfa._group.said, one.origin.name, what)
    in_place = name in _IN_PLACE or (name.endswith("_") and name[-2] != "_")
    if in_place or "out" in kwargs or kwargs.get("inplace"):
        for other in [other() for one in given for other in one.origin.live]:
            if other is not None:  # a view, which is to see the change, or a copy
                other.made()
    get = Logits.made if learns else _current
    args, kwargs = tree_map_only(Logits, get, (args, kwargs))
    return func(*args, **kwargs)


def _current(logits: Logits) -> Tensor:
    return logits.numbers() if logits.whole is None else logits.whole


# --- what is followed: each returns None for what it cannot ---


def _reshaped(func: Any, logits: Logits, *args: Any, **kwargs: Any) -> Logits | None:
    """Another shape of the same order."""
    if any(isinstance(one, torch.dtype) for one in (*args, *kwargs.values())):
        return None
    n, shape = logits.shape[-1], func(torch.zeros(()).expand(logits.shape), *args, **kwargs).shape
    if logits.axis != logits.dim() - 1 or not shape or shape[-1] != n:
        return None
    return logits.then(
        lambda whole: whole.reshape(shape),
        places=logits.places.reshape(shape[:-1]),
        axis=len(shape) - 1,
    )


def _permuted(func: Any, logits: Logits, *args: Any, **kwargs: Any) -> Logits:
    """Dimensions in another order."""
    named = torch.zeros(()).expand([*range(1, logits.dim() + 1)])
    order = [size - 1 for size in func(named, *args, **kwargs).shape]
    axis = order.index(logits.axis)
    places = logits.places.unsqueeze(logits.axis).permute(order).squeeze(axis)
    return logits.then(lambda whole: whole.permute(order), places=places, axis=axis)


def _indexed(func: Any, logits: Logits, index: Any) -> Logits | None:
    """Tokens of all words: an index that leaves the last dimension alone."""
    items = [*index] if isinstance(index, tuple) else [index]
    kinds = (int, slice, Tensor, type(None), type(...))
    if logits.axis != logits.dim() - 1 or not all(type(item) in kinds for item in items):
        return None
    tensors = [item for item in items if isinstance(item, Tensor)]
    masks = [item for item in tensors if item.dtype in (torch.bool, torch.uint8)]
    used = len(items) - sum(item is None or item is ... for item in items)
    missing = logits.dim() - used - sum(mask.dim() - 1 for mask in masks)
    dots = [place for place, item in enumerate(items) if item is ...] or [len(items)]
    if missing < 0 or len(dots) > 1:
        return None
    items[dots[0] : dots[0] + 1] = [slice(None)] * missing
    words = items.pop()
    if not isinstance(words, slice) or words != slice(None):
        return None
    places = logits.places[tuple(items)]
    repeats = logits.repeats or len(tensors) > len(masks)
    return logits.then(
        lambda whole: whole[index], places=places, axis=places.dim(), repeats=repeats
    )


def _converted(func: Any, logits: Logits, *args: Any, **kwargs: Any) -> Any:
    """The same, or wider numbers, on the same device."""
    if kwargs.get("copy") or "memory_format" in kwargs or True in args[1:]:
        return None
    like = func(torch.empty(0, dtype=logits.dtype, device=logits.device), *args, **kwargs)
    if not isinstance(like, Tensor):  # .type() gives a name
        return like
    if like.device != logits.device:
        return None
    if like.dtype is logits.dtype:
        return logits
    if like.dtype is not torch.float32 or logits.dtype is torch.float64:
        return None
    return logits.then(lambda whole: whole.float(), dtype=like.dtype)


def _copied(func: Any, logits: Logits, **kwargs: Any) -> Logits | None:
    """The same in other memory."""
    return None if kwargs else logits.then(func)


def _capped(func: Any, logits: Logits, *args: Any, **kwargs: Any) -> Logits | None:
    """A factor, or the tanh of softcapping."""
    factor, softcap = logits.cap
    if func in (torch.tanh, Tensor.tanh):
        if args or kwargs or softcap is not None:
            return None
        softcap = 1.0
    else:
        if kwargs or len(args) != 1 or type(args[0]) not in (int, float) or not args[0]:
            return None
        times = 1 / args[0] if func in _DIVISIONS else float(args[0])
        if softcap is None:
            factor *= times
        else:
            softcap *= times
    if not all(math.isfinite(one) and one for one in (factor, softcap or 1.0)):
        return None
    return logits.then(lambda whole: func(whole, *args), cap=(factor, softcap))


def _cross_entropy(
    func: Any,
    logits: Logits,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """The loss of logits that are never whole."""
    origin, places, (factor, softcap) = logits.origin, logits.places, logits.cap
    if origin.dfa is None or not (size_average is reduce is weight is None):
        return None
    if reduction not in REDUCTIONS or type(target) is not Tensor:
        return None
    if target.dtype is not torch.int64 or target.shape != places.shape:
        return None
    if target.device != logits.device or logits.axis != min(1, logits.dim() - 1):
        return None
    seen: Logits | None = logits
    while seen is not None:  # what looks at their gradient would miss this one
        if seen.whole is not None or seen.hooks:
            return None
        seen = seen.before
    tokens = origin.head.hidden.shape[:-1].numel()
    places = places.reshape(-1)
    if logits.repeats and len(places.unique()) < len(places):  # on a GPU this waits
        return None
    all_targets = target.new_full((tokens,), ignore_index)
    all_targets[places] = target.reshape(-1)
    if softcap is not None:
        if softcap < 0:  # -c tanh(x) is c tanh(-x)
            factor, softcap = -factor, -softcap
        factor *= softcap  # c tanh(x) is c tanh(c x / c)
        factor = 1.0 if math.isclose(factor, 1, rel_tol=1e-12) else factor
    loss = Loss.checked(ignore_index, reduction, label_smoothing, softcap)._replace(factor=factor)
    wide = torch.is_autocast_enabled(logits.device.type) and logits.dtype.itemsize == 2
    dtype = torch.float32 if wide else logits.dtype
    with torch.set_grad_enabled(logits.requires_grad and torch.is_grad_enabled()):
        losses = origin.loss(origin.dfa, all_targets, loss, dtype)
    return losses.reshape(-1)[places].view(target.shape) if reduction == "none" else losses


def _hooked(func: Any, logits: Logits, hook: Any) -> RemovableHandle | None:
    """A hook of the gradient, should whole logits have one: fully_shard hooks all outputs."""
    if not logits.requires_grad:
        return None
    if not str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
        _retained(func, logits)
    handle = RemovableHandle(logits.hooks)
    logits.hooks[handle.id] = hook
    return handle


def _retained(func: Any, logits: Logits) -> None:
    """Raise where a gradient is asked for that the loss does not make."""
    if logits.origin.has_loss:
        raise RuntimeError(
            f"attach: head {logits.origin.name!r}: {func.__name__} of logits must come before "
            "their loss, which was computed without them, so that they get no gradient; give "
            "output= instead of head="
        )


def _functions(*names: str) -> list[Any]:
    """Those of the names that torch has, as methods, getters and functions."""
    found = [getattr(where, name) for where in (Tensor, torch) for name in names
             if hasattr(where, name)]  # fmt: skip
    return [one.__get__ if hasattr(type(one), "__set__") else one for one in found]


def _is_property(name: str) -> bool:
    return hasattr(type(getattr(Tensor, name)), "__set__")


_DIVISIONS = _functions("div", "divide", "true_divide", "__truediv__")
_IN_PLACE = {"__setitem__", "__set__", "__delitem__"}
_IN_PLACE |= {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "mod")}
_IN_PLACE |= {f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift", "div")}
_OF_NUMBERS = {"T", "H", "mT", "mH", "real", "imag", "data"}  # properties
# What the shape, dtype and device tell.
_FACTS = {
    *_functions(*{name for name in dir(Tensor) if _is_property(name)} - _OF_NUMBERS),
    *_functions("dim", "ndimension", "size", "numel", "nelement", "element_size", "stride"),
    *_functions("is_floating_point", "is_complex", "is_signed", "is_inference", "is_contiguous"),
    *_functions("storage_offset", "get_device", "__len__", "__hash__", "__format__", "__dir__"),
    *_functions("_is_view", "has_names"),
}
# What has no gradient, and so is no reason to keep whole logits.
_WITHOUT_GRADIENT = {
    *_functions("detach", "data", "argmax", "argmin", "argsort", "equal", "allclose", "isclose"),
    *_functions("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "isfinite", "tolist"),
}
_FOLLOWED: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.__getitem__: _indexed,
    **dict.fromkeys(_functions("contiguous", "clone"), _copied),
    Tensor.register_hook: _hooked,
    Tensor.retain_grad: _retained,
    **dict.fromkeys(
        _functions("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"),
        _reshaped,
    ),
    **dict.fromkeys(
        _functions("transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "mT"),
        _permuted,
    ),
    **dict.fromkeys(
        _functions("to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu"),
        _converted,
    ),
    **dict.fromkeys(_DIVISIONS, _capped),
    **dict.fromkeys(_functions("mul", "multiply", "__mul__", "__rmul__", "tanh"), _capped),
}
