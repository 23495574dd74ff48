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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dfa_kernels import checks, stream
from dfa_kernels.layers import Layers
from dfa_kernels.nn import loading, matching, state
from dfa_kernels.nn.chunks import Head, Loss
from dfa_kernels.nn.fully_sharded import AnchorsOfModel
from dfa_kernels.nn.layer import DFALayer, FeedbackPointsHandling, Group, Record, Through
from dfa_kernels.nn.passes import Passes
from dfa_kernels.nn.sources import (
    Scales,
    Seeded,
    Slicing,
    Source,
    Stored,
    check_matrix,
    check_seeded,
    matrix_of,
)


class DFA(Passes):
    """Trains the given layers by Direct Feedback Alignment; goes after the network's last layer.

    In the backward pass every marked activation gets B_i e as its gradient (Launay, Poli, Krzakala
    2019, eq. 3). The error e is the gradient of the loss by this module's output; the feedback
    matrix B_i comes from a seed. Autograd carries that gradient back as far as the `DFALayer`
    before. The last layer is trained as by backpropagation. In residual networks, as transformers,
    DFA learns far more with the output layer as the feedback: see `dfa_kernels.nn.OutputWeights`,
    and `match_output_` for a fixed matrix.

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
        feedback_points_handling: a `FeedbackPointsHandling` or its name. None: LAST, and a warning
            where that discards an activation.
        batch_dims: the output's batch dimensions; its others, flattened, are the error. The layers'
            default too. They count in the order given, in which a layer's must follow: (1, 0) for
            [time, batch, features] beside an output of [batch, time, n] or [batch, n]. A layer may
            have k consecutive rows for each of the error, as [batch, k, features] beside
            [batch, n]: each row of the error then serves k, scaled by 1/sqrt(k). None: (0,), and a
            warning for an output of three dimensions, which most likely are tokens.
        seed, distribution, backend: as for `dfa_kernels.project`; None: 0, "normal", and a choice
            for each call. Beside `matrix` they make nothing. "normal" is the paper's law.
            "hadamard" is by far the cheapest for errors of some tens of numbers and more, and its
            signals are the same bits everywhere. "rademacher" is the cheapest with independent
            entries. They learn alike.
        shared: True or None: one matrix, sliced for every layer (eq. 8). False: rows of its own for
            every layer, those of U from i * `dfa_kernels.nn.INDEPENDENT_ROWS` (2**40) on for layer
            i. Stored matrices decide it by their number.
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
            the target. It gets a copy, so it may keep or change it; the last layer gets the error
            itself.
        signal_transform: function (signal, layer) of the signal that an activation is to get, of
            its shape, and its `DFALayer`; returns what it gets instead, of that shape. For noise
            and for feedback that is learned. It may change the signal in place.
        mask: fixed tensors to multiply signals by: a mapping from layers' names or indices, or a
            sequence with a tensor or None for each. Each broadcasts to the activation's dimensions
            that are not batch dimensions, and moves once to the activation's device.
        scale_repeats: False leaves out the 1/sqrt(k) of k rows for each of the error, as spiking
            networks want it, which sum over time.
        lean: False makes all signals at once. True keeps one [batch, l_max] signal, which it scales
            for each layer when autograd gets there; needs one shared matrix. Without effect on
            what torch.compile compiles, which plans memory itself.
        requires_grad: True passes on activations that require a gradient, although none is sent
            back. Reentrant checkpoints need it, which train nothing where no input requires one,
            and so does whatever else waits for gradients of inputs. It costs the product for that
            gradient, one of three in each layer, unless the next layer detaches its input.
        through: a function of a layer's activation. The signal is then the gradient of what it
            returns, and autograd carries it back to the activation. With the norm before the output
            layer, as in `lambda x: F.layer_norm(x, x.shape[-1:])`, blocks of a residual network
            learn what the output layer would see of them. It runs in the training passes only. The
            parameters of one that is a module get gradients from every layer; it becomes no
            submodule.

    Attributes:
        Every argument is an attribute, which takes what the argument takes, checked at once; only
        `dfa_layers` stays. Set them between training steps.
        seed, distribution, backend, matrix, error_transform, rp_device: take effect with the next
            signal. The first three belong to a seed: beside `matrix` setting them is an
            AttributeError.
        normalization, shared, mask, lean, mode, no_training, feedback_points_handling,
        batch_dims, requires_grad, through: with the next forward pass. Stored matrices decide
            `shared` by their number.
        source: the `Source` of the signals, which `matrix` reads and sets too; `masks`: those of
            `mask`, by index.
        matrices, row_offsets: as they are in force; read-only.

    A loaded state puts its own seed, distribution, normalization and rows in force, so that a
    resumed run goes on as before. It warns where that changes a seed, distribution, normalization
    or `shared` that was given, here or by setting the attribute. To keep your own, set it after
    loading: `dfa.seed = 5`. None gives the default, like leaving it out, and so does
    `normalization=True`. A state that does not fit is reported by load_state_dict once everything
    else is loaded: as an error or, with strict=False, as an unexpected key and a warning.

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
        feedback_points_handling: FeedbackPointsHandling | str | None = None,
        batch_dims: Sequence[int] | None = None,
        *,
        seed: int | None = None,
        distribution: str | None = None,
        shared: bool | None = None,
        matrix: Tensor | Sequence[Tensor] | Source | None = None,
        error_transform: Callable[[Tensor], Tensor] | None = None,
        signal_transform: Callable[[Tensor, DFALayer], Tensor] | None = None,
        mask: Mapping[str | int, Tensor] | Sequence[Tensor | None] | None = None,
        scale_repeats: bool = True,
        lean: bool = False,
        requires_grad: bool = False,
        through: Through | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        self._refusals: list[str] | None = None
        seeded = check_seeded(seed, distribution, backend)
        self.error_transform = error_transform
        self.signal_transform = signal_transform
        self.scale_repeats = scale_repeats
        layers = checks.listed(dfa_layers)
        if layers is None:
            got = type(dfa_layers).__name__
            raise TypeError(f"DFA: dfa_layers must be a sequence of DFALayers, got {got}")
        self._layers = tuple(layers)
        self._source = seeded
        self.rp_device = rp_device
        seen: set[DFALayer] = set()
        for index, layer in enumerate(self.dfa_layers):
            if not isinstance(layer, DFALayer):
                raise TypeError(
                    f"DFA: dfa_layers[{index}] must be a DFALayer, got {type(layer).__name__}"
                )
            if layer._group is not None or layer in seen:
                raise ValueError(
                    f"DFA: dfa_layers[{index}] already belongs to a DFA, whose release() would "
                    "give it back"
                )
            seen.add(layer)
        names = [layer.name or str(index) for index, layer in enumerate(self.dfa_layers)]
        if len(set(names)) < len(names):
            raise ValueError(f"DFA: dfa_layers must have distinct names, got {names}")
        count = len(self.dfa_layers)
        mode = "shallow" if checks.boolean("DFA", "no_training", no_training) else "dfa"
        self._group = Group(mode, None, None, False, False)
        self._slicing = Slicing((0,) * count, "layer")
        self._chosen = {}
        source, share = check_matrix(
            matrix,
            shared is None or checks.boolean("DFA", "shared", shared),
            seeded,
            count,
            self.rp_device,
        )
        self._hold("source", source)
        self._share(share)
        self.lean = lean
        self.requires_grad = requires_grad
        self.through = through
        self.normalization = normalization
        self.masks = mask
        for name, given in (("seed", seed), ("distribution", distribution), ("shared", shared)):
            self._choose(name, given is not None or isinstance(matrix, Seeded))
        self.feedback_points_handling = feedback_points_handling
        self.batch_dims = batch_dims
        for index, layer in enumerate(self.dfa_layers):
            layer._group, layer._index = self._group, index
        self._all_called = False

    def watch(self, model: nn.Module) -> tuple[RemovableHandle | AnchorsOfModel, ...]:
        """Drop what an aborted forward pass of `model` left, before and after every pass.

        Warns where a pass ends and its last activations never reached this module. Has modules by
        `fully_shard`, now or later, gather their parameters and reduce their gradients in turn, and
        raises ValueError in the first training pass where ranks that share the parameters have
        other signals. `model` holds this module and its layers, and does not call itself: write
        `self.dfa.watch(self)` at the end of its `__init__`. Returns the hooks' handles.
        """
        self._group.under_way = False
        anchors = AnchorsOfModel(self._group)
        return (
            model.register_forward_pre_hook(self._group.begin),
            model.register_forward_pre_hook(anchors),
            model.register_forward_hook(self._group.warn_of_waiting),
            model.register_forward_hook(self._compare_ranks),
            model.register_forward_hook(self._group.end, always_call=True),
            anchors,
        )

    def forward(self, output: Tensor) -> Tensor:
        """`output`, tied to the activations that wait for it."""
        if torch.jit.is_scripting():
            if self.training and torch.is_grad_enabled() and output.requires_grad:
                raise RuntimeError(
                    "DFA: a model by torch.jit.script does not train; call eval() for inference"
                )
            return output
        return self._tie(output)

    @torch.jit.unused
    def _tie(self, output: Tensor) -> Tensor:
        return self.tie(output)

    def linear_cross_entropy(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        bias: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """The loss of a language model whose logits are never whole: output layer, `DFA` and loss.

        It takes the place of `F.cross_entropy(self(F.linear(hidden, weight, bias)), target)`: the
        same loss, gradients and signals, to rounding. Logits and errors exist for a chunk of tokens
        at a time only, so that memory for them depends neither on the tokens nor on the vocabulary:
        128 MiB on a CPU, 256 MiB elsewhere, or DFA_KERNELS_LOGITS_BYTES. Signals and gradients are
        ready when this returns; the backward pass multiplies them by the gradient of the loss.

        With the signals of a seed, of stored matrices or of `OutputWeights` no product is made
        twice. With an `error_transform`, a `Source` of your own or reduction "none" the backward
        pass makes the logits again, one product of four. The first two get the error of a chunk of
        tokens at a time and must treat each row by itself: an `error_transform` is called twice
        more at first, on a few rows, to see that it does, for which a GPU waits. What makes the
        signals is what is in force now. While `alignment` measures, logits are whole; so they are
        under torch.func, and where they are DTensors.

        Args:
            hidden: [..., d], the input of the output layer, of all tokens that the layers had. All
                its dimensions but the last must be batch dimensions of this `DFA`, so that every
                token is a row.
            weight: [n, d], the output layer's, as tied embeddings have it, too.
            target: [...], int64, a word of the vocabulary for each token or ignore_index. On a CPU
                ignored tokens cost nothing, except with an `error_transform` or a `Source` of your
                own: these get errors of zeros for them.
            bias: [n].
            ignore_index, reduction, label_smoothing: as for `torch.nn.functional.cross_entropy`.
            softcap: c of logits c tanh(x / c). The error is the gradient by x.

        Returns:
            The loss: a scalar, or [...] with reduction "none". It has no second derivatives.

        Raises:
            TypeError, ValueError, IndexError: naming the argument and what was got. On a GPU a
                target that is no word fails later, as a device-side assertion.
        """
        loss = Loss.checked(ignore_index, reduction, label_smoothing, softcap)
        head = Head(hidden, weight, bias)
        if not torch.jit.is_tracing():  # which warns of every condition
            head.check(target)
        return self._loss(head, target, loss)

    def feedback_matrix(
        self,
        layer: int | str | DFALayer,
        error_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A layer's B_i, scaled as in its signals: [l_i, n], for inspection or for other code.

        A row of the signals is `error @ B_i.T`. It is made anew with each call, in full.

        Args:
            layer: the layer, its index or its name.
            error_size: n. None: that of the last forward pass that trained.
            dtype, device: as for `dfa_kernels.feedback_matrix`.

        Raises:
            TypeError, ValueError: the DFA has no such layer, or sizes are not known before a first
                forward pass.
        """
        index = self._position(layer)
        error_size = self._group.error_size if error_size is None else error_size
        size = self.dfa_layers[index].size
        if size is None or error_size is None:
            raise ValueError(
                f"DFA.feedback_matrix: the sizes of layer {layer!r} and of the error are not known "
                "before a forward pass that trains"
            )
        error_size = checks.integer(
            "DFA.feedback_matrix", "error_size", error_size, low=1, high=stream.COLUMNS
        )
        scale = self._slicing.scales([one.size or 1 for one in self.dfa_layers], error_size)[index]
        layers = Layers((self._slicing.row_offsets[index],), (size,), (scale,))
        return matrix_of(self.source, layers, error_size, dtype, device)

    def match_output_(
        self,
        linear: nn.Linear,
        scale: float | None = None,
        *,
        layers: Iterable[int | str | DFALayer] | None = None,
        row_offset: int | None = None,
        column_offset: int | None = None,
    ) -> Tensor:
        """Start the output layer as the feedback: `linear.weight = scale * U[:l, :n].T`, in place.

        For residual networks, as transformers are, whose layers have the size l of the output
        layer's input. There the right signal is nearly W^T e, with W these weights, so it has the
        signals' direction from the first step on. The output layer then learns as ever, and the
        feedback stays, so that their directions part again: this helps at the start, and
        `dfa_kernels.nn.OutputWeights` learns more in the end. With SGD give the `DFA`
        normalization=scale too, which makes signals as long as backpropagation's; Adam's steps do
        not depend on it.

        Call it after whatever initializes or moves the model, not between a forward pass and its
        backward pass, and on every rank of a sharded model: of a DTensor each sets its own shard.
        Of tied embeddings it sets these too, the row of a padding_idx included. The bias stays.

        Args:
            linear: the layer whose outputs are this module's input; weights [n, l], a parameter.
            scale: of the weights, above 0. None: 1/sqrt(l), which gives logits of variance 1 where
                the input is normalized.
            layers: those that are to match, themselves, by name or by index; all have the size l
                and one matrix. None: all of this `DFA`.
            row_offset, column_offset: the first input and the first output that `linear` has of the
                whole layer, if its weights are a plain tensor that holds a part. None: it is whole.
                With row_offset the scale is to be given, since l is not known.

        Returns:
            linear.weight.

        Raises:
            TypeError, ValueError: naming what cannot match: a layer of another size, with a mask or
                a matrix of its own; weights that are computed from others. Sizes and masks are
                checked in the forward passes to come, too.
        """
        given = checks.listed(self.dfa_layers if layers is None else layers)
        if given is None:
            got = repr(layers) if isinstance(layers, str) else type(layers).__name__
            raise TypeError(f"{matching.WHERE}: layers must be a sequence of layers, got {got}")
        chosen = dict.fromkeys(self._position(layer) for layer in given)
        weight = matching.weight_of(linear)
        part = matching.part_of(weight, row_offset, column_offset)
        match = matching.Match(tuple(chosen), part)
        first_row = matching.one_matrix(match.layers, self.row_offsets)
        for index in match.layers:
            match.check_layer(index, self.dfa_layers[index].size, self.masks)
        scale = matching.scale_of(scale, part, weight.dtype)
        matching.fill(weight, self.source, first_row, part, scale)
        self._match = match
        return weight

    def release(self) -> tuple[DFALayer, ...]:
        """Gives the layers back, so that another `DFA` may take them. This one then trains none.

        Not between a forward pass and its backward pass.
        """
        layers, self._layers, self._masks, self._match = self._layers, (), {}, None
        for layer in layers:
            layer._group, layer._index = None, 0
        self._group.forget()
        self._slicing = Slicing((), self._slicing.normalization)
        return layers

    @contextlib.contextmanager
    def recording(self) -> Iterator[Record]:
        """Runs forward passes as backpropagation does; the record keeps the last."""
        group = self._group
        waiting, idle, anchors, outer = group.waiting, group.idle, group.anchors, group.record
        group.forget()
        group.record = Record()
        try:
            yield group.record
        finally:
            group.record, group.waiting, group.idle, group.anchors = outer, waiting, idle, anchors

    def get_extra_state(self) -> Tensor:
        """What makes the same signals again, in a few bytes; see `state`."""
        return state.pack(self._facts())

    def set_extra_state(self, packed: Tensor) -> None:
        """Take the seed, distribution, normalization and row offsets of a state; see `state`.

        Warns where they are others than were given; see `DFA`. One that is refused changes nothing.
        """
        fixed = self._group.lean or not isinstance(self.source, Seeded)
        try:
            facts = state.unpack(packed, self._facts(), rows_are_fixed=fixed)
        except (TypeError, ValueError) as refusal:
            if self._refusals is None:
                raise
            self._refusals.append(str(refusal))
            return
        if isinstance(self.source, (Seeded, Stored)):
            self._hold(
                "source",
                self.source._replace(
                    seed=facts.source["seed"], distribution=facts.source["distribution"]
                ),
            )
        self._slicing = Slicing(tuple(facts.row_offsets), facts.normalization)
        self._submodule("normalization", facts.normalization)
        self._group.error_size = facts.error_size
        for layer, (_, size) in zip(self.dfa_layers, facts.layers, strict=True):
            layer._size = size
        loading.warn_of_other_choices(self, self._chosen)

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ) -> None:
        """As torch does, but a state that is refused is reported with the keys, at the end."""
        self.compare_ranks_again()
        self._refusals = []
        try:
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing, unexpected, errors
            )
            refusals = self._refusals
        finally:
            self._refusals = None
        for refusal in refusals:
            loading.report(refusal, prefix + "_extra_state", unexpected, errors)

    def _facts(self) -> state.Facts:
        source = self.source.describe()
        if not isinstance(self.source, (Seeded, Stored)):
            source = {"source": source}
        layers = [[layer.name, layer.size] for layer in self.dfa_layers]
        error_size = self._group.error_size
        return state.Facts(source, self.row_offsets, self.normalization, layers, error_size)

    def extra_repr(self) -> str:
        """The number of layers and the source of the signals."""
        if isinstance(self.source, Seeded):
            source = f"seed={self.seed}, distribution={self.distribution!r}"
        elif isinstance(self.source, Stored):
            source = "stored matrix"
        else:
            source = type(self.source).__name__
        return f"{len(self.dfa_layers)} layers, {source}"

    def _position(self, layer: int | str | DFALayer) -> int:
        """The index of a layer that is given by itself, its name or its index."""
        if isinstance(layer, (str, DFALayer)):
            for index, one in enumerate(self.dfa_layers):
                if layer is one or (isinstance(layer, str) and layer == one.name):
                    return index
            got = repr(layer) if isinstance(layer, str) else type(layer).__name__
            names = [one.name for one in self.dfa_layers]
            raise ValueError(f"DFA: layer must be one of the DFA's, of names {names}, got {got}")
        last = len(self.dfa_layers) - 1
        return checks.integer("DFA", "layer", layer, low=0, high=last)
