"""What a `DFA` does in a forward pass, and in the backward pass after it.

`tie` and `begin` take what waits for the output and plan who gets which signal, `loss_of` makes
the loss of an output layer by chunks, `signals` the signals of an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dfa_kernels import checks, derivatives, sharding
from dfa_kernels.layers import Layers
from dfa_kernels.layers import tracing as traced
from dfa_kernels.nn import guards, ranks, sharded
from dfa_kernels.nn import signals as delivery
from dfa_kernels.nn.chunks import Head, Loss, Projection, check_row_by_row, needs_whole_logits
from dfa_kernels.nn.functions import Factor, Signals
from dfa_kernels.nn.layer import Waiting, recomputing
from dfa_kernels.nn.linear_cross_entropy import Work, graph_takes
from dfa_kernels.nn.plan import Plan, Target, make_plan
from dfa_kernels.nn.rows import to_rows
from dfa_kernels.nn.scripting import tracing
from dfa_kernels.nn.settings import Settings
from dfa_kernels.nn.shards import Layout, layout_of, meshes_behind
from dfa_kernels.nn.sources import LINEAR, OutputWeights, Received, Seeded, Source, Stored
from dfa_kernels.nn.ties import Tie

ErrorTransform = Callable[[Tensor], Tensor]


class Passes(Settings):
    """The part of a `DFA` that runs in training steps."""

    _all_called: bool  # whether every layer has been called in one pass

    @property
    def sends_signals(self) -> bool:
        """Whether a forward pass that begins now trains layers by signals."""
        return self._group.sends_signals

    def tie(self, output: Tensor, made: Source | None = None) -> Tensor:
        """See `forward`. `made` makes the signals of this pass, or the source in force."""
        if not isinstance(output, Tensor):
            raise TypeError(f"DFA: output must be a tensor, got {type(output).__name__}")
        tie = self.begin(output, [output], made)
        return output if tie is None else tie.apply(output)

    def begin(
        self, output: Tensor, made_of: Sequence[Tensor], made: Source | None = None
    ) -> Tie | None:
        """Take what waits for the output, or None if no signal is to be sent.

        Of `output` itself only the shape, dtype and device are used; autograd makes it of
        `made_of`. See `tie` for `made`.
        """
        waiting, idle, anchors = self._group.take()
        record = self._group.record
        if not torch.is_grad_enabled() or (record is None and self.mode != "dfa"):
            return None
        if tracing("DFA", self.training, output) or recomputing("DFA"):
            return None
        if record is None and (waiting or any(map(derivatives.requires_gradient, made_of))):
            self._warn(waiting, idle, output)
        if not waiting:
            return None
        indices = [item.layer for item in waiting]
        activations = [item.activation for item in waiting]
        plan, source = self._plan(indices, activations, output), self.source
        compiling = torch.compiler.is_compiling()
        if made is None and isinstance(source, OutputWeights) and not compiling:
            made = source.of_this_pass(keep=record is not None and ranks.fully_sharded())
        if record is not None:
            record.output, record.plan, record.source = output, plan, made
            record.activations, record.before = activations, [item.before for item in waiting]
            return None
        if self._match is not None:
            self._match.check(plan)
        for index, size in plan.own_sizes.items():
            layer = self._layers[index]
            if compiling or layer._size != size:
                layer._size = size
        self._group.error_size = plan.error_size
        if not compiling and self._group.under_way is None:
            self._check_ranks_behind([*made_of, *activations])
        device = self.rp_device or output.device
        if not isinstance(self.normalization, str) and isinstance(source, (Seeded, Stored)):
            scales, dtype, factors = plan.layers.scales, output.dtype, source.distribution
            if isinstance(source, Stored):
                dtype, factors = source.matrices[0].dtype, "normal"
            checks.scale_range("DFA", "normalization", scales, dtype, factors)
        self.source_for(plan.layers, plan.error_size, device)
        signals: Signals
        # Inside a transform of torch.func nothing can be kept for its shape while tracing.
        keep = compiling and not torch._C._are_functorch_transforms_active()
        lean = not keep and any(item.factor is not None for item in waiting) and plan.mesh is None
        if keep:
            signals = functools.partial(self._traced_signals, indices)
        elif lean:
            signals = self._lean(plan, waiting, made)
        else:
            signals = functools.partial(self._planned_signals, plan, made)
        layers = self.asked_for(plan, lean)
        dtype = delivery.dtype_of(plan.places, output.dtype)
        source = made or source
        return Tie(plan, layers, dtype, source, signals, keep, activations, anchors)

    def _loss(self, head: Head, target: Tensor, loss: Loss) -> Tensor:
        """See `linear_cross_entropy`."""
        if self._group.record is not None or needs_whole_logits(*head):
            return loss.of(self.tie(head.logits()), target)
        return self.loss_of(self.begin_head(head), head, target, loss)

    def begin_head(self, head: Head) -> Tie | None:
        """`begin`, for an output layer whose logits are not made, each token of which is a row."""
        if self.mode == "dfa" and self._group.waiting:
            head.check_rows(self.batch_dims)
        return self.begin(head.stand_in(), head.tensors)

    def loss_of(
        self,
        tie: Tie | None,
        head: Head,
        target: Tensor,
        loss: Loss,
        dtypes: tuple[torch.dtype, torch.dtype] | None = None,
    ) -> Tensor:
        """The same, of what was taken when the pass reached the output layer.

        `dtypes` are the logits' and the loss's, or those that autocast gives now.
        """
        if tie is not None and tie.plan.mesh is not None:
            return loss.of(tie.apply(head.logits()), target)
        projection = None if tie is None else self._projection(tie, head)
        if torch.compiler.is_compiling() and not graph_takes(projection):
            assert tie is not None
            guards.warn_of_whole_logits(self._group.said)
            return loss.of(tie.apply(head.logits()), target)
        # What does not depend on the tie: a checkpoint that repeats this pass has none.
        own = self.error_transform is not None
        own |= not isinstance(self.source, LINEAR)
        again = loss.reduction == "none" or (own and self.mode == "dfa")
        dims = range(head.hidden.dim() - 1) if tie is None else tie.plan.batch_dims
        work = Work.of(head, loss, tuple(dims), projection, tie, again, dtypes)
        return work.apply(head, target)

    def _projection(self, tie: Tie, head: Head) -> Projection:
        """What makes the signals of a chunk of tokens."""
        source, transform, by_weight = tie.source, None, None
        if self.error_transform is not None:
            transform = functools.partial(self._transformed_chunk, self.error_transform)
        elif isinstance(source, OutputWeights):
            by_weight = source.scales_by(head.weight, tie.layers)
            if by_weight is not None and head.bias is None and source.linear.bias is not None:
                guards.warn_of_a_left_out_bias(self._group.said)
        device = torch.device(self.rp_device or head.hidden.device)
        return Projection(source, tie.layers, tie.dtype, device, transform, by_weight)

    def signals(self, plan: Plan, error: Tensor, source: Source | None = None) -> list[Tensor]:
        """B_i e for every place, by one projection, each of its activation's shape and dtype.

        `source` makes them, or the one that is in force.
        """
        source, share = source or self.source, self.signal_transform is None
        if plan.mesh is not None:
            signals = sharded.deliver(
                source, error, plan, self.error_transform and self._transformed_error
            )
        else:
            rows = self._rows(error, plan.batch_dims, source)
            places = plan.distinct if share else plan.places
            signals = delivery.deliver(source, rows, plan.layers, places, plan.masks, share=share)
            if share:
                signals = [signals[position] for position in plan.positions]
        if share:
            return signals
        pairs = zip(plan.indices, signals, strict=True)
        return [self._transformed(index, signal) for index, signal in pairs]

    def source_for(self, layers: Layers, error_size: int, device: torch.device) -> Source:
        """The source; stored matrices are checked to fit, and move to `device`."""
        source = self.source
        if isinstance(source, Stored):
            source.check(layers, error_size)
            if any(matrix.device != device for matrix in source.matrices):
                self._source = source.to(device)
        return self.source

    def _planned_signals(
        self,
        plan: Plan,
        source: Source | None,
        error: Tensor,
        _: Sequence[Tensor],
        other: Source | None = None,
    ) -> list[Tensor]:
        return self.signals(plan, error, other or source)

    def _traced_signals(
        self,
        indices: Sequence[int],
        error: Tensor,
        activations: Sequence[Tensor],
        other: Source | None = None,
    ) -> list[Tensor]:
        return self.signals(self._plan(indices, activations, error), error, other)

    def _lean(self, plan: Plan, waiting: Sequence[Waiting], source: Source | None) -> Signals:
        """The same, where each activation scales and masks its view of one signal by its factor.

        An activation that a compiled part of the model passed on has no factor.
        """
        layers, places, indices = plan.layers, plan.places, plan.indices
        longest = self.asked_for(plan, lean=True)
        (scale,) = longest.scales
        own = {}
        for index, (item, place) in enumerate(zip(waiting, places, strict=True)):
            factor = item.factor or Factor()
            ratio = layers.scales[place.layer] / scale
            factor.value = (
                ratio if place.mask is None else delivery.mask_for(place, plan.masks) * ratio
            )
            if self.signal_transform is not None:
                factor.transform = functools.partial(self._transformed, indices[index])
            if item.factor is None:
                own[index] = factor.apply

        def views(error: Tensor, _: Sequence[Tensor], other: Source | None = None) -> list[Tensor]:
            maker = other or source
            rows = self._rows(error, plan.batch_dims, maker)
            return delivery.deliver_views(maker or self.source, rows, layers, places, longest, own)

        return views

    def _transformed(self, index: int, signal: Tensor) -> Tensor:
        """A layer's signal through `signal_transform`."""
        assert self.signal_transform is not None
        transformed = self.signal_transform(signal, self.dfa_layers[index])
        if not isinstance(transformed, Tensor) or transformed.shape != signal.shape:
            raise _other_shape("signal_transform", signal, transformed)
        return transformed

    def _rows(self, error: Tensor, batch_dims: Sequence[int], source: Source | None) -> Tensor:
        """The error as it is projected: [batch, n], transformed, where the projection runs."""
        given = source.rows if isinstance(source, Received) else None
        rows = self.transformed(error, batch_dims) if given is None else given
        return rows.to(self.rp_device)

    def transformed(self, error: Tensor, batch_dims: Sequence[int]) -> Tensor:
        """The error [batch, n] through `error_transform`."""
        return self._transformed_error(to_rows(error, batch_dims, "DFA"))

    def _transformed_error(self, rows: Tensor, transform: ErrorTransform | None = None) -> Tensor:
        """The error through `transform`, or the `error_transform` in force."""
        transform = self.error_transform if transform is None else transform
        if transform is None:
            return rows
        # A copy: one that works in place would change the last layer's gradient.
        transformed = transform(rows.clone())
        if not isinstance(transformed, Tensor) or transformed.shape != rows.shape:
            raise _other_shape("error_transform", rows, transformed)
        return transformed

    def _transformed_chunk(self, transform: ErrorTransform, rows: Tensor) -> Tensor:
        """The error of a chunk of tokens through an `error_transform`, which is checked once."""
        transformed = functools.partial(self._transformed_error, transform=transform)
        known = self.__dict__.get("_row_by_row") is transform
        if not known and check_row_by_row(transformed, rows):
            self.__dict__["_row_by_row"] = transform  # no submodule
        return transformed(rows)

    def targets(self) -> list[Target]:
        """The activations that wait for the output."""
        items = self._group.items()
        return self._targets([item.layer for item in items], [item.activation for item in items])

    def _targets(self, indices: Sequence[int], activations: Sequence[Tensor]) -> list[Target]:
        shared, layers, targets = sharding.in_use(), self._layers, []
        for index, activation in zip(indices, activations, strict=True):
            shape, layout = activation.shape, None
            if shared:
                layout = self._layout(f"dfa_layers[{index}]", activation)
                shape = activation.shape if layout is None else layout.shape
            dims, device = layers[index].row_dims, activation.device
            targets.append(Target(index, shape, dims, activation.dtype, device, layout))
        return targets

    def _layout(self, argument: str, tensor: Tensor) -> Layout | None:
        """How processes share a tensor. The first pass that trains warns of what might be parts."""
        # A graph that read what it wrote would be made twice.
        first = not torch.compiler.is_compiling() and self._group.error_size is None
        return layout_of("DFA", argument, tensor, warn=first)

    def _plan(self, indices: Sequence[int], activations: Sequence[Tensor], output: Tensor) -> Plan:
        """Which layer's signal goes to which activation. Moves masks to their activations.

        The last plan, if it was made of the same: a function of normalization may give other
        scales, and masks may be exchanged, so plans with these are made anew.
        """
        layout = self._layout("output", output)
        shape = output.shape if layout is None else layout.shape
        targets = self._targets(indices, activations)
        made_of = None
        if not (traced() or self._masks or callable(self.normalization)):
            made_of = (
                *(targets, shape, layout, output.device, self.batch_dims, self.rp_device),
                *(self._slicing, self.scale_repeats, [layer._size for layer in self._layers]),
            )
            planned = self._group.planned
            if planned is not None and planned[0] == made_of:
                return planned[1]
        for index, activation in zip(indices, activations, strict=True):
            device = activation.device
            if self.rp_device is None and device != output.device:
                raise ValueError(
                    f"DFA: dfa_layers[{index}] is on {device}, the output on {output.device}; "
                    "give rp_device to say where to project"
                )
            if index in self.masks and self.masks[index].device != device:
                self.masks[index] = self.masks[index].to(device)
        plan = self.plan(targets, shape, layout)
        if made_of is not None and plan.mesh is None:
            self._group.planned = made_of, plan
        return plan

    def plan(
        self, targets: Sequence[Target], output_shape: torch.Size, layout: Layout | None = None
    ) -> Plan:
        """Which layer's signal goes to which activation, beside an output of that shape."""
        plan = make_plan(
            targets,
            output_shape,
            self.batch_dims,
            layout,
            self._slicing,
            len(self.dfa_layers),
            lambda index: self.dfa_layers[index].size,
            self.masks,
            self.scale_repeats,
        )
        if plan.mesh is not None and self.rp_device is not None:
            raise ValueError(
                "DFA: rp_device must be None where processes share the output or activations, "
                f"got {self.rp_device}"
            )
        return plan

    @staticmethod
    def asked_for(plan: Plan, lean: bool) -> Layers:
        """The layers whose signals the source makes: all, or one that the others are views of."""
        layers = plan.layers
        if not lean:
            return layers
        scale = max(abs(scale) for scale in layers.scales) or 1.0
        return Layers(layers.row_offsets[:1], (max(layers.sizes),), (scale,))

    def _warn(self, waiting: Sequence[Waiting], idle: Mapping[int, str], output: Tensor) -> None:
        """Say what a training pass will not train, or not as asked. Once, compare the ranks."""
        group = self._group
        uncalled = []
        compiling = torch.compiler.is_compiling()
        if compiling or not self._all_called:
            called = {item.layer for item in waiting} | set(idle)
            uncalled = [
                index
                for index, layer in enumerate(self.dfa_layers)
                if index not in called and layer.size is None and not layer.passthrough
            ]
            if not compiling:  # a graph that read what it wrote would be made twice
                self._all_called = not uncalled
        missing = idle or uncalled or not waiting
        if missing and not all(layer.passthrough for layer in self.dfa_layers):
            guards.warn_of_layers_without_signals(group.said, idle, uncalled, len(waiting))
        if not compiling and "ranks" not in group.said and ranks.inside_data_parallel():
            ranks.check_data_parallel(self.get_extra_state(), self.extra_repr())
            group.said.add("ranks")
        if group.batch_dims is None and output.dim() == 3 and waiting:
            guards.warn_of_tokens(group.said)

    def compare_ranks_again(self) -> None:
        """Have the next training pass compare the ranks: a load may have reached one alone."""
        self._group.said -= {"ranks", "sharded ranks"}

    def _compare_ranks(self, model: nn.Module, *_: Any) -> None:
        """Once, after a training pass. A forward hook, which all ranks run, whatever they have."""
        if torch.compiler.is_compiling():
            wanted = ranks.fully_sharded()
        else:
            wanted = "sharded ranks" not in self._group.said and sharding.in_use()
        if wanted:
            self._check_ranks(model)

    @torch.compiler.disable(reason="dfa_kernels: the check of ranks runs uncompiled")
    def _check_ranks(self, model: nn.Module) -> None:
        group = self._group
        if not group.sends_signals or not torch.is_grad_enabled() or "sharded ranks" in group.said:
            return
        if meshes := ranks.meshes_of(model):
            ranks.check_meshes(meshes, self.get_extra_state(), self._in_words())
            group.said.add("sharded ranks")

    def _check_ranks_behind(self, tensors: Sequence[Tensor]) -> None:
        """The same without `watch`, of the ranks that tensor parallelism shows to share them."""
        said = self._group.said
        if "sharded ranks" in said or not sharding.in_use():
            return
        if meshes := meshes_behind(tensors):
            ranks.check_meshes(meshes, self.get_extra_state(), self._in_words())
        said.add("sharded ranks")  # it is a long look, and that at the first pass is enough

    def _in_words(self) -> str:
        sizes = [layer.size for layer in self.dfa_layers]
        return f"{self.extra_repr()}, of sizes {sizes} and an error of {self._group.error_size}"


def _other_shape(argument: str, given: Tensor, got: object) -> ValueError:
    what = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
    return ValueError(f"DFA: {argument} must keep the shape {tuple(given.shape)}, got {what}")
