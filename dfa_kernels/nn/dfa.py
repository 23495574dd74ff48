"""`DFA` trains the activations that `DFALayer`s mark.

    self.dfa1, self.dfa2 = DFALayer(), DFALayer()
    self.dfa = DFA([self.dfa1, self.dfa2])
    ...
    x = self.dfa1(torch.tanh(self.fc1(x)))
    x = self.dfa2(torch.tanh(self.fc2(x)))
    x = self.dfa(self.fc3(x))

A `DFALayer` passes its activation on detached, so no product carries a gradient back through the
next layer. The activation itself waits until the forward pass reaches the `DFA`, which ties all of
them to the output in one autograd Function.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dfa_kernels import checks
from dfa_kernels.backends import registry
from dfa_kernels.layers import Layers
from dfa_kernels.nn import signals as delivery
from dfa_kernels.nn import state
from dfa_kernels.nn.functions import Feedback
from dfa_kernels.nn.layer import (
    DFALayer,
    FeedbackPointsHandling,
    Group,
    Record,
    Waiting,
    check_dims,
    recomputing,
)
from dfa_kernels.nn.rows import beside_rows, row_ratio, split_shape, to_rows
from dfa_kernels.nn.signals import Place, check_masks
from dfa_kernels.nn.sources import (
    INDEPENDENT_ROWS,
    Scales,
    Seeded,
    Slicing,
    Source,
    Stored,
    check_matrix,
    check_normalization,
)

MODES = ("dfa", "backprop", "shallow")


class DFA(nn.Module):
    """Trains the given layers by Direct Feedback Alignment; goes after the network's last layer.

    In the backward pass every marked activation gets B_i e as its gradient (Launay, Poli, Krzakala
    2019, eq. 3). The error e is the gradient of the loss by this module's output; the feedback
    matrix B_i comes from a seed. Autograd carries that gradient back as far as the `DFALayer`
    before. The last layer is trained as by backpropagation.

    Args:
        dfa_layers: the network's `DFALayer`s.
        normalization: the layers' scales, for layer i of size l_i and an error of size n. True or
            "layer": 1/sqrt(l_i n) (eq. 8). False or "shared": 1/sqrt(l_max n) for all (eq. 7
            alone). A number: that scale for all; 1.0 is U itself, the paper's "no norm". A function
            of (sizes of the layers, size of the error): one scale per layer; a layer that was never
            trained counts as size 1. tinydfa's own law is `distribution="uniform",
            normalization=tinydfa_scales`.
        rp_device: where to project; signals go to their activations' devices. None: where the error
            and all activations are.
        no_training: True starts in mode "shallow".
        feedback_points_handling: see `FeedbackPointsHandling`.
        batch_dims: the output's batch dimensions; its others, flattened, are the error. The layers'
            default too. They count in the order given, in which a layer's must follow: (1, 0) for
            [time, batch, features] beside an output of [batch, time, n] or [batch, n]. A layer may
            have k consecutive rows for each of the error, as [batch, k, features] beside
            [batch, n]: each row of the error then serves k, scaled by 1/sqrt(k).
        seed, distribution, backend: as for `dfa_kernels.project`. Beside `matrix` they make
            nothing. "normal" is the paper's law. "hadamard" is by far the cheapest for errors of
            some tens of numbers and more, and its signals are the same bits everywhere.
            "rademacher" is the cheapest with independent entries. They learn alike.
        shared: True: one matrix, sliced for every layer (eq. 8). False: rows of its own for every
            layer, those of U from i * `dfa_kernels.nn.INDEPENDENT_ROWS` (2**40) on for layer i.
            Stored matrices decide it by their number.
        matrix: what makes the signals instead of a seed. Stored matrices of unit variance: one
            [at least l_max, n], sliced for every layer, or a sequence with one [at least l_i, n]
            for each. They are normalized like a seed's, move once to where the projection runs, and
            multiply in their own dtype. They share memory with the tensors given until they move:
            a change in place takes effect with the next signal, and `matrices` are the ones in
            force. The state_dict does not hold them: save them yourself. Or a
            `dfa_kernels.nn.Source` of your own, an object with `project(error, layers, dtype)` and
            `describe()`; what it describes is in the state_dict. One that is an `nn.Module` becomes
            a submodule.
        error_transform: function of the error [batch, n] before projection, of its shape:
            torch.sign, a ternary rounding, or for cross-entropy `lambda e: -(e < 0).to(e.dtype)`,
            the target. The last layer gets the error itself.
        mask: fixed tensors to multiply signals by: a mapping from layers' names or indices, or a
            sequence with a tensor or None for each. Each broadcasts to the activation's dimensions
            that are not batch dimensions, and moves once to the activation's device.
        lean: False makes all signals at once. True keeps one [batch, l_max] signal, which it scales
            for each layer when autograd gets there; needs one shared matrix. Without effect under
            torch.compile, which plans memory itself.

    Attributes:
        source: the `Source` of the signals; another one takes effect with the next signal. One that
            is an `nn.Module` gives way to another module only: `del dfa.source` first.
        seed, distribution, backend, matrices, row_offsets, normalization: as they are in force;
            read-only.
        mode, no_training, feedback_points_handling, batch_dims: may be set between passes.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument and what was got, when built or in
            the forward pass.

    An exception or Ctrl-C between a layer and the `DFA` leaves activations behind. The next forward
    pass replaces those of the layers that it calls. It would train those of layers that it skips,
    and under REDUCE all. `watch(model)` rules that out.

    A model runs one forward pass at a time, because layers wait for the next call of this module:
    no threads and no nn.DataParallel; DistributedDataParallel is fine. It calls this module once,
    at its end. A second call in the same pass, as for a second head, trains the last layer before
    it only. A forward pass inside a backward pass counts as activation checkpointing's and trains
    no layer.
    """

    def __init__(
        self,
        dfa_layers: Iterable[DFALayer],
        normalization: bool | str | float | Scales = True,
        rp_device: torch.device | str | None = None,
        no_training: bool = False,
        feedback_points_handling: FeedbackPointsHandling = FeedbackPointsHandling.LAST,
        batch_dims: Sequence[int] = (0,),
        *,
        seed: int = 0,
        distribution: str = "normal",
        shared: bool = True,
        matrix: Tensor | Sequence[Tensor] | Source | None = None,
        error_transform: Callable[[Tensor], Tensor] | None = None,
        mask: Mapping[str | int, Tensor] | Sequence[Tensor | None] | None = None,
        lean: bool = False,
        backend: str | None = None,
    ):
        super().__init__()
        checks.seed("DFA", seed)
        checks.distribution("DFA", distribution)
        if backend not in (None, *registry.BACKENDS):
            known = ", ".join(map(repr, registry.BACKENDS))
            raise ValueError(f"DFA: backend must be one of {known} or None, got {backend!r}")
        if error_transform is not None and not callable(error_transform):
            raise TypeError(f"DFA: error_transform must be a function, got {error_transform!r}")
        layers = checks.listed(dfa_layers)
        if layers is None:
            got = type(dfa_layers).__name__
            raise TypeError(f"DFA: dfa_layers must be a sequence of DFALayers, got {got}")
        self.dfa_layers = tuple(layers)
        normalization = check_normalization(normalization)
        self.rp_device = None if rp_device is None else torch.device(rp_device)
        self.error_transform = error_transform
        for index, layer in enumerate(self.dfa_layers):
            if not isinstance(layer, DFALayer):
                raise TypeError(
                    f"DFA: dfa_layers[{index}] must be a DFALayer, got {type(layer).__name__}"
                )
            if layer._group is not None or layer in self.dfa_layers[:index]:
                raise ValueError(f"DFA: dfa_layers[{index}] already belongs to a DFA")
        names = [layer.name or str(index) for index, layer in enumerate(self.dfa_layers)]
        if len(set(names)) < len(names):
            raise ValueError(f"DFA: dfa_layers must have distinct names, got {names}")
        count = len(self.dfa_layers)
        seeded = Seeded(operator.index(seed), distribution, backend)  # numpy's ints are no JSON
        source, shared = check_matrix(matrix, shared, seeded, count, self.rp_device)
        self.source = source
        if lean and not shared:
            raise ValueError("DFA: lean needs one matrix for all layers, got independent ones")
        row_offsets = tuple(0 if shared else index * INDEPENDENT_ROWS for index in range(count))
        self._slicing = Slicing(row_offsets, normalization)
        if isinstance(normalization, nn.Module):
            self._modules["normalization"] = normalization  # the property is in setattr's way
        self.masks = check_masks(mask, [layer.name for layer in self.dfa_layers])
        mode = "shallow" if no_training else "dfa"
        self._group = Group(mode, FeedbackPointsHandling.LAST, (0,), lean)
        self.feedback_points_handling = feedback_points_handling
        self.batch_dims = batch_dims
        for index, layer in enumerate(self.dfa_layers):
            layer._group, layer._index = self._group, index

    @property
    def seed(self) -> int | None:
        """The source's, if it has one; a loaded state changes it."""
        return getattr(self.source, "seed", None)

    @property
    def distribution(self) -> str | None:
        """The source's, if it has one; a loaded state changes it."""
        return getattr(self.source, "distribution", None)

    @property
    def backend(self) -> str | None:
        """As given, where a seed makes the signals."""
        return getattr(self.source, "backend", None)

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """The stored matrices, if those make the signals."""
        return self.source.matrices if isinstance(self.source, Stored) else ()

    @property
    def row_offsets(self) -> tuple[int, ...]:
        """Where each layer's rows of U begin; a loaded state changes it."""
        return self._slicing.row_offsets

    @property
    def normalization(self) -> str | float | Scales:
        """The law's name, the scale or the function; a loaded state changes it."""
        return self._slicing.normalization

    @property
    def mode(self) -> str:
        """How the next forward passes train: "dfa", "backprop" or "shallow".

        In "backprop" this module and its layers are the identity; in "shallow" nothing before the
        last `DFALayer` is trained.
        """
        return self._group.mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(
                f"DFA: mode must be one of {', '.join(map(repr, MODES))}, got {mode!r}"
            )
        self._group.mode = mode

    @property
    def no_training(self) -> bool:
        """tinydfa's name for mode "shallow"; False sets mode "dfa"."""
        return self.mode == "shallow"

    @no_training.setter
    def no_training(self, value: bool) -> None:
        self.mode = "shallow" if value else "dfa"

    @property
    def feedback_points_handling(self) -> FeedbackPointsHandling:
        """As given; a change takes effect with the next forward pass."""
        return self._group.handling

    @feedback_points_handling.setter
    def feedback_points_handling(self, handling: FeedbackPointsHandling) -> None:
        if not isinstance(handling, FeedbackPointsHandling):
            raise TypeError(
                f"DFA: feedback_points_handling must be a FeedbackPointsHandling, got {handling!r}"
            )
        self._group.handling = handling

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """As given; a change takes effect with the next forward pass."""
        return self._group.batch_dims

    @batch_dims.setter
    def batch_dims(self, dims: Sequence[int]) -> None:
        self._group.batch_dims = check_dims("DFA", dims)

    def watch(self, model: nn.Module) -> tuple[RemovableHandle, ...]:
        """Drop what an aborted forward pass of `model` left, before and after every pass.

        Warns where a pass ends and its last activations never reached this module. `model` holds
        this module and its layers, and does not call itself: write `self.dfa.watch(self)` at the
        end of its `__init__`. Returns the hooks' handles.
        """
        return (
            model.register_forward_pre_hook(self._group.forget),
            model.register_forward_hook(self._group.warn_of_waiting),
            model.register_forward_hook(self._group.forget, always_call=True),
        )

    def forward(self, output: Tensor) -> Tensor:
        """`output`, tied to the activations that wait for it."""
        if not isinstance(output, Tensor):
            raise TypeError(f"DFA: output must be a tensor, got {type(output).__name__}")
        waiting = self._group.take()
        record = self._group.record
        if not torch.is_grad_enabled() or (record is None and self.mode != "dfa"):
            return output
        if recomputing("DFA") or not waiting:
            return output
        layers, places = self._places(waiting, output)
        activations = [item.activation for item in waiting]
        if record is not None:
            record.output, record.activations = output, activations
            record.indices = [item.layer for item in waiting]
            record.layers, record.places = layers, places
            return output
        if any(item.factor is not None for item in waiting):
            longest = self._longest(waiting, layers, places)
            signals = functools.partial(self.lean_signals, layers, places, longest)
        else:
            signals = functools.partial(self.signals, layers, places)
        return Feedback.apply(signals, output, *activations)

    def signals(self, layers: Layers, places: Sequence[Place], error: Tensor) -> list[Tensor]:
        """B_i e for every place, by one projection, each of its activation's shape and dtype."""
        return delivery.deliver(self.source, self._rows(error), layers, places, self.masks)

    def lean_signals(
        self, layers: Layers, places: Sequence[Place], longest: Layers, error: Tensor
    ) -> list[Tensor]:
        """The same before each layer's own scale and mask, as views of one signal."""
        return delivery.deliver_views(self.source, self._rows(error), layers, places, longest)

    @contextlib.contextmanager
    def recording(self) -> Iterator[Record]:
        """Runs forward passes as backpropagation does; the record keeps the last."""
        waiting = self._group.take()
        self._group.record = Record()
        try:
            yield self._group.record
        finally:
            self._group.record, self._group.waiting = None, waiting

    def get_extra_state(self) -> Tensor:
        """What makes the same signals again, in a few bytes; see `state`."""
        return state.pack(self._facts())

    def set_extra_state(self, packed: Tensor) -> None:
        """Take the seed, distribution, normalization and row offsets of a state; see `state`."""
        fixed = self._group.lean or not isinstance(self.source, Seeded)
        facts = state.unpack(packed, self._facts(), rows_are_fixed=fixed)
        if isinstance(self.source, (Seeded, Stored)):
            self.source = self.source._replace(
                seed=facts.source["seed"], distribution=facts.source["distribution"]
            )
        self._slicing = Slicing(tuple(facts.row_offsets), facts.normalization)
        for layer, (_, size) in zip(self.dfa_layers, facts.layers, strict=True):
            layer.size = size

    def _facts(self) -> state.Facts:
        source = self.source.describe()
        if not isinstance(self.source, (Seeded, Stored)):
            source = {"source": source}
        layers = [[layer.name, layer.size] for layer in self.dfa_layers]
        return state.Facts(source, self.row_offsets, self.normalization, layers)

    def extra_repr(self) -> str:
        """The number of layers and the source of the signals."""
        if isinstance(self.source, Seeded):
            source = f"seed={self.seed}, distribution={self.distribution!r}"
        elif isinstance(self.source, Stored):
            source = "stored matrix"
        else:
            source = type(self.source).__name__
        return f"{len(self.dfa_layers)} layers, {source}"

    def _rows(self, error: Tensor) -> Tensor:
        """The error as it is projected: [batch, n], transformed, where the projection runs."""
        rows = to_rows(error, self._group.batch_dims, "DFA")
        if self.error_transform is not None:
            transformed = self.error_transform(rows)
            if not isinstance(transformed, Tensor) or transformed.shape != rows.shape:
                got = tuple(getattr(transformed, "shape", ())) or type(transformed).__name__
                raise ValueError(
                    f"DFA: error_transform must keep the error's shape {tuple(rows.shape)}, "
                    f"got {got}"
                )
            rows = transformed
        return rows.to(self.rp_device)

    def _places(self, waiting: Sequence[Waiting], output: Tensor) -> tuple[Layers, list[Place]]:
        """The distinct layers of a forward pass, and where the signal of each activation goes."""
        batch, rest = split_shape(output.shape, self.batch_dims, "DFA")
        error_size = math.prod(rest)
        if error_size == 0:
            raise ValueError(
                f"DFA: output must have at least one element a row, got {tuple(output.shape)}"
            )
        split = [self._split(item) for item in waiting]
        own = {item.layer: size for item, (_, size) in zip(waiting, split, strict=True)}
        if self._group.record is None:
            for index, size in own.items():
                self.dfa_layers[index].size = size
        sizes = [own.get(i, layer.size or 1) for i, layer in enumerate(self.dfa_layers)]
        scales = self._slicing.scales(sizes, error_size)
        wanted: list[tuple[int, int, float]] = []
        targets = []
        for (index, activation, _), (own_batch, size) in zip(waiting, split, strict=True):
            shape, dtype, device = activation.shape, activation.dtype, activation.device
            if self.rp_device is None and device != output.device:
                raise ValueError(
                    f"DFA: dfa_layers[{index}] is on {device}, the output on "
                    f"{output.device}; give rp_device to say where to project"
                )
            repeats = row_ratio(own_batch, batch, f"DFA: dfa_layers[{index}]")
            scale = scales[index]
            if size != sizes[index]:  # the layer was called again, with another size
                others = [*sizes[:index], size, *sizes[index + 1 :]]
                scale = self._slicing.scales(others, error_size)[index]
            wanted.append((self._slicing.row_offsets[index], size, scale / math.sqrt(repeats)))
            dims = self.dfa_layers[index].row_dims
            mask = index if index in self.masks else None
            if mask is not None:
                beside_rows(self.masks[mask], shape, dims, f"DFA: mask[{index}]")
                if self.masks[mask].device != device:
                    self.masks[mask] = self.masks[mask].to(device)
            targets.append((shape, dims, dtype, device, mask))
        layers, positions = Layers.distinct(*zip(*wanted, strict=True))
        places = [
            Place(position, *target) for position, target in zip(positions, targets, strict=True)
        ]
        self._check_stored(layers, error_size, self.rp_device or output.device)
        return layers, places

    def _check_stored(self, layers: Layers, error_size: int, device: torch.device) -> None:
        """Check stored matrices against a pass, and move them to where it projects."""
        source = self.source
        if isinstance(source, Stored):
            source.check(layers, error_size)
            if any(matrix.device != device for matrix in source.matrices):
                self.source = source.to(device)

    def _split(self, item: Waiting) -> tuple[list[int], int]:
        """The batch sizes and l_i of an activation, which must have units beside its batch.

        Without any it most likely is one sample in a model for batches. Its units would count as
        its batch, and could even line up with the output's.
        """
        dims, shape = self.dfa_layers[item.layer].row_dims, item.activation.shape
        where = f"DFA: dfa_layers[{item.layer}]"
        batch, rest = split_shape(shape, dims, where)
        size = math.prod(rest)
        if size == 0 or not rest:
            raise ValueError(
                f"{where} must have units beside its batch_dims {dims}, got shape {tuple(shape)}; "
                "unsqueeze(-1) is for a layer of one unit, batch_dims=() for one sample alone"
            )
        return batch, size

    def _longest(
        self, waiting: Sequence[Waiting], layers: Layers, places: Sequence[Place]
    ) -> Layers:
        """The one layer whose signal serves all places, each by its own factor, set here."""
        scale = max(abs(scale) for scale in layers.scales) or 1.0
        for item, place in zip(waiting, places, strict=True):
            assert item.factor is not None
            ratio = layers.scales[place.layer] / scale
            item.factor.value = (
                ratio if place.mask is None else delivery.mask_for(place, self.masks) * ratio
            )
        return Layers(layers.row_offsets[:1], (max(layers.sizes),), (scale,))
