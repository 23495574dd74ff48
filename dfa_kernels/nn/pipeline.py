"""`FeedbackStage`: one stage of a model on several processes, which waits for no stage above.

    stage = FeedbackStage(module, 8, F.cross_entropy, points=["1", "3"], seed=0)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for x, y in data:  # used by the first and by the last stage
        optimizer.zero_grad()
        loss = stage.step(x, target=y)  # on the last stage; None on the others
        optimizer.step()

It does not build on the stages and schedules of `torch.distributed.pipelining`. There the backward
pass of a stage is by definition the gradient of what it sent on, received from the next stage: the
buffers, their exchange and the loop over microbatches that wait for it are private and have no
place for an error that comes from the last stage to all. So this is a loop of its own over
`torch.distributed`'s sends and broadcasts. Batches are split and merged by torch's functions, with
its `TensorChunkSpec`.
"""

from __future__ import annotations

import contextlib
import datetime
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dfa_kernels import checks
from dfa_kernels.nn import guards, signals, state
from dfa_kernels.nn.agreement import WHERE, Agreement, Asked, agree, check_same
from dfa_kernels.nn.attachment import check_state, find_dfas, has_points, unwrapped
from dfa_kernels.nn.dfa import DFA
from dfa_kernels.nn.hooks import InputHook, OutputHook, keep_state
from dfa_kernels.nn.layer import DFALayer
from dfa_kernels.nn.links import Arrival, Links, Meta
from dfa_kernels.nn.points import Names, Points
from dfa_kernels.nn.recompile import forget_compiled
from dfa_kernels.nn.sources import Received


class _Pass(NamedTuple):
    """A microbatch between its forward and its backward pass."""

    tied: Tensor
    gradient: Tensor
    made: Received


class FeedbackStage:
    """One stage of a model that is cut into stages, each in a process of its own.

    A stage gets activations from the stage before, and sends its own on, detached. The last one
    computes the loss and its gradient by the output, the error, and sends all others what their
    signals are made of. So each trains its layers as soon as the error is known, and no gradient
    goes from stage to stage. Gradients are those of one `DFA` over the whole model with gradient
    accumulation over the microbatches.

    A stage should end at a point: what comes after its last one does not train, except on the last
    stage, where the error trains it.

    Every process calls the constructor, `step` and `eval_step`, as often and with the same
    arguments. Optimizer steps, learning rates and clipping are each process's own.

    Args:
        module: this stage's part of the model. Its first argument is a batch on the first stage,
            what the stage before returned on others: a tensor, or a tuple of tensors. On the last
            it returns the output, a tensor. It may hold `DFALayer`s, but no `DFA`, and may be
            compiled, or a DistributedDataParallel over processes with the same stage.
        microbatches: the number of equal parts that a batch is split into.
        loss: a function (output, target) of a microbatch; returns a scalar. Of the last stage.
        points, inputs: as for `attach`, of this stage. Layers are numbered from the first stage to
            the last: on each, `DFALayer`s in its module, then `points`, then `inputs`. Where names
            are not distinct, the number of the stage is put before them, as in "1.fc".
        state: as for `attach`: the name under which the module's state_dict holds the state of the
            `DFA`. It is the same on all stages.
        send: what the last stage sends each other one. "error": the error, after `error_transform`,
            of which the stage makes its signals itself. "signals": the stage's signals, one for all
            its layers that are equal. None: for each stage what takes fewer bytes. What several
            stages get alike is broadcast.
        ahead: how many microbatches every stage may have on its way at least: between their forward
            and their backward passes, in memory. Stage s of S has S - s, as in 1F1B, where that is
            more. Then the last stage, at the end of a step, and all others wait for one another.
            With 1 + (S - 1) F/B or more, for forward and backward passes that take F and B, the
            first stages end a step early and begin the next: a pipeline without bubbles. It takes
            as many microbatches, and steps in which no stage waits for all others, as to clip
            gradients by a common norm. None: 1F1B's.
        scale_grads: True: the loss is the mean over microbatches. False: the sum.
        group: the processes, in the order of the stages. None: all.
        device: where activations are received. None: where the module's first parameter is.
        timeout: of the groups between stages, which it makes. None: torch's default.
        args_chunk_spec, kwargs_chunk_spec, output_merge_spec: as for the schedules of
            `torch.distributed.pipelining`: how arguments are split, and outputs merged. None:
            tensors along their first dimension. `target_chunk_spec` is for the target.
        options: those of `DFA`, the same on all stages. `mask` may leave out other stages' layers.
            With `matrix=OutputWeights(head)` the last stage has the head, and the others take
            `OutputWeights(nn.Linear(l, n, device="meta"))`. In mode "shallow" the last stage alone
            trains, and there is no mode "backprop".

    Attributes:
        dfa: the `DFA` over all layers of all stages. Those of other stages are never called here.
            Change its settings between steps, on all stages alike.
        stage, stages: this stage's number, and how many there are.
        gets: what every stage is sent: "error", "signals", or None, where it has no layer to train
            and for the last. Known from the first step on.

    Raises:
        TypeError, ValueError: naming the argument and what was got. Settings that differ between
            stages are found in the first step, on all of them.

    Shapes and dtypes are exchanged in the first step, and in the first `eval_step`. A change is an
    error on the stage that sees it; call `forget` on all stages before a batch of another size. A
    process that fails leaves the others with torch's error, at once or after the timeout; the
    pipeline then cannot go on.
    """

    def __init__(
        self,
        module: nn.Module,
        microbatches: int,
        loss: Callable[[Any, Any], Tensor] | None = None,
        points: Points = (),
        *,
        inputs: Points = (),
        state: str | None = "dfa",
        send: str | None = None,
        ahead: int | None = None,
        scale_grads: bool = True,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        timeout: datetime.timedelta | None = None,
        args_chunk_spec: tuple | None = None,
        kwargs_chunk_spec: dict[str, Any] | None = None,
        target_chunk_spec: Any = None,
        output_merge_spec: Any = None,
        **options: Any,
    ):
        if not isinstance(module, nn.Module):
            raise TypeError(f"{WHERE}: module must be a module, got {type(module).__name__}")
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{WHERE}: torch.distributed must be initialized, as by init_process_group"
            )
        inner = unwrapped(module)
        _refuse_wrappers(module)
        if find_dfas(inner) or has_points(inner):
            raise ValueError(
                f"{WHERE}: module must hold no DFA and no points yet: give the options of one to "
                "the stage, and detach() another attachment or stage first"
            )
        self.module = module
        self.microbatches = checks.integer(WHERE, "microbatches", microbatches, low=1, high=2**31)
        if send not in (None, "error", "signals"):
            raise ValueError(f"{WHERE}: send must be 'error', 'signals' or None, got {send!r}")
        self.send = send
        self.scale_grads = checks.boolean(WHERE, "scale_grads", scale_grads)
        check_state(inner, state, WHERE)
        names = Names(inner, WHERE)
        held = [one for one in inner.modules() if isinstance(one, DFALayer)]
        outputs = names.layers("points", points, "")
        arguments = names.layers("inputs", inputs, ".input")
        if device is None:
            first = next(module.parameters(), None)
            device = "cpu" if first is None else first.device
        ahead = 1 if ahead is None else ahead
        self.ahead = checks.integer(WHERE, "ahead", ahead, low=1, high=2**31)
        self.stage, self.stages = dist.get_rank(group), dist.get_world_size(group)
        self._ahead = min(self.microbatches, max(self.stages - self.stage, self.ahead))
        self._links = Links(group, torch.device(device), max(2, self._ahead), timeout)
        checks.function(WHERE, "loss", loss)
        if self._is_last and loss is None:
            raise ValueError(f"{WHERE}: loss must be given on the last stage, got None")
        self.loss = loss
        self._specs = args_chunk_spec, kwargs_chunk_spec, target_chunk_spec, output_merge_spec
        own = [*held, *outputs.values(), *arguments.values()]
        self.dfa = DFA(self._all_layers(own), **options)
        self.dfa._group.under_way = False  # as by `watch`: each pass begins with no leftovers
        modules = dict(inner.named_modules())
        self._handles: list[Any] = [
            modules[name].register_forward_hook(OutputHook(name, layer))
            for name, layer in outputs.items()
        ]
        self._handles += [
            modules[name].register_forward_pre_hook(InputHook(name, layer), with_kwargs=True)
            for name, layer in arguments.items()
        ]
        if state is not None:
            self._handles += keep_state(inner, state, self.dfa)
        self._inner, self._state = inner, state
        forget_compiled()
        self._said: set[str] = set()
        self.forget()

    @property
    def gets(self) -> tuple[str | None, ...] | None:
        """What every stage is sent, from the first step on."""
        if self._agreed is None:
            return None
        return tuple(
            None if one is None else "error" if one.layers is None else "signals"
            for one in self._agreed.payloads
        )

    def forget(self) -> None:
        """Let the next step and the next `eval_step` find out shapes anew; call it on all stages.

        Not while a step runs.
        """
        self._agreed: Agreement | None = None
        self._known: dict[str, tuple[Meta, ...]] = {}

    def detach(self) -> None:
        """Give the module back as it was, with what it learned."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._state is not None:
            self._inner.__dict__.pop(self._state, None)
        self.dfa.release()
        forget_compiled()

    def step(
        self, *args: Any, target: Any = None, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Run a batch forward and backward, and add to the gradients of the stage's parameters.

        Args:
            args: of the module on the first stage; not used on others.
            target: of the loss, on the last stage; not used on others.
            return_outputs: whether to return the network's output, too.
            kwargs: of this stage's module; tensors are split like args.

        Returns:
            On the last stage the loss, detached, or (loss, outputs). None on the others.
        """
        if self.dfa.mode == "backprop":
            raise ValueError(
                f"{WHERE}: mode must be 'dfa' or 'shallow', since no gradient goes from stage to "
                "stage, got 'backprop'; torch.distributed.pipelining has it"
            )
        if not torch.is_grad_enabled():
            raise RuntimeError(f"{WHERE}: step needs gradients; eval_step is for without")
        batches = self._split(args, kwargs, target)
        waiting: deque[_Pass] = deque()
        losses: list[Tensor] = []
        outputs: list[Tensor] = []
        self._begin()
        for index, (inputs, named, expected) in enumerate(batches):
            if index >= self._ahead:
                self._backward(waiting.popleft(), final=False)
            output = self._forward("step", index, inputs, named)
            if self._agreed is None or self._agreed.mode != self.dfa.mode:
                self._agreed = agree(
                    self.dfa, self._links, self._settings(), self.send, self._replicas, output
                )
            self._agreed.check_targets(self.stage, self.dfa.targets())
            if self._is_last:
                one, loss, output = self._finish(self._agreed, output, expected)
                losses.append(loss)
                if return_outputs:
                    outputs.append(output)
            else:
                one = self._tie(self._agreed, output)
            waiting.append(one)
            self._expect(self._agreed)
        while waiting:
            self._backward(waiting.popleft(), final=not waiting)
        self._links.finish()
        if not self._is_last:
            return None
        total = torch.stack(losses)
        total = total.mean() if self.scale_grads else total.sum()
        return (total, self._merge(outputs)) if return_outputs else total

    @torch.no_grad()
    def eval_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run a batch forward, without gradients.

        Returns:
            On the last stage the network's output; None on the others.
        """
        batches = self._split(args, kwargs, None)
        self._begin()
        outputs = [
            self._forward("eval_step", index, inputs, named)
            for index, (inputs, named, _) in enumerate(batches)
        ]
        self.dfa._group.forget()
        self._links.finish()
        return self._merge(outputs) if self._is_last else None

    @property
    def _is_last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def _replicas(self) -> dist.ProcessGroup | None:
        """The processes that have the same stage, where it is data-parallel."""
        if not isinstance(self.module, DistributedDataParallel):
            return None
        group: Any = self.module.process_group
        return group

    def _all_layers(self, own: Sequence[DFALayer]) -> list[DFALayer]:
        """The layers of all stages, this one's among them."""
        names = self._links.gather([layer.name for layer in own])
        given = [name for ours in names for name in ours if name is not None]
        if len({*given}) < len(given):
            names = [
                [None if name is None else f"{stage}.{name}" for name in ours]
                for stage, ours in enumerate(names)
            ]
            for layer, name in zip(own, names[self.stage], strict=True):
                layer.name = name
        # No warning says of others' layers that they were not called.
        others = [[DFALayer(name, passthrough=True) for name in ours] for ours in names]
        others[self.stage] = list(own)
        return [layer for layers in others for layer in layers]

    def _split(
        self, args: tuple, kwargs: dict[str, Any], target: Any
    ) -> list[tuple[tuple, dict[str, Any], Any]]:
        """Arguments and target of each microbatch."""
        from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks

        of_args, of_kwargs, of_target, _ = self._specs
        count = self.microbatches

        def parts(what: str, given: tuple, named: dict, spec: Any, spec_named: Any) -> Any:
            if not given and not named:
                return [given] * count, [named] * count
            chunks = split_args_kwargs_into_chunks(given, named, count, spec, spec_named)
            first, *others = [
                [Meta.of(tensor) for tensor in _tensors_in(chunk)]
                for chunk in zip(*chunks, strict=True)
            ]
            if len(others) != count - 1 or any(one != first for one in others):
                got = ", ".join(str(list(one.shape)) for one in _tensors_in((given, named)))
                raise ValueError(
                    f"{WHERE}: {what} must split into {count} equal microbatches, got {got}"
                )
            return chunks

        first = self.stage == 0
        inputs, named = parts("args", args if first else (), kwargs, of_args, of_kwargs)
        spec = None if of_target is None else (of_target,)
        targets, _ = parts("target", (target if self._is_last else None,), {}, spec, None)
        return [(*one, expected) for *one, (expected,) in zip(inputs, named, targets, strict=True)]

    def _merge(self, outputs: list[Tensor]) -> Any:
        from torch.distributed.pipelining.microbatch import merge_chunks

        return merge_chunks(outputs, self._specs[3])

    def _begin(self) -> None:
        """No microbatch is on its way yet."""
        self._coming: Arrival | None = None
        self._feedback: deque[Arrival] = deque()
        self._expected = 0
        self._wanted: dict[int, Asked] | None = None

    def _forward(self, kind: str, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """One microbatch through the module, received before and sent on after."""
        if self.stage > 0:
            args = tuple(self._receive(kind, index))
        else:
            self._remember(f"{kind}: args", _tensors_in(args))
        self.dfa._group.forget()
        with _without_reduction(self.module):
            output = self.module(*args, **kwargs)
        if self._is_last:
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"{WHERE}: module must return a tensor on the last stage, got "
                    f"{type(output).__name__}"
                )
            return output
        tensors = [tensor.detach() for tensor in _tensors(output)]
        if self._remember(f"{kind}: what module returns", tensors):
            self._links.tell([Meta.of(tensor) for tensor in tensors])
        self._links.send(tensors)
        return output

    def _receive(self, kind: str, index: int) -> list[Tensor]:
        """The activations of a microbatch. The next one's are on their way already."""
        what = f"{kind}: received"
        if what not in self._known:
            self._known[what] = self._links.hear()
        arrival = self._coming or self._links.receive(self._known[what])
        more = index + 1 < self.microbatches
        self._coming = self._links.receive(self._known[what]) if more else None
        return arrival.wait()

    def _remember(self, what: str, tensors: Iterable[Tensor]) -> bool:
        """Whether the shapes of `what` are new. Raises where they are others than before."""
        metas = tuple(Meta.of(tensor) for tensor in tensors)
        new = what not in self._known
        check_same(what, self._known.setdefault(what, metas), metas)
        return new

    def _settings(self) -> dict[str, Any]:
        """What must be the same on all stages, by name."""
        dfa, facts = self.dfa, self.dfa._facts()
        return {
            **facts.source,
            "row_offsets": list(facts.row_offsets),
            "normalization": state.described(facts.normalization),
            "mode": dfa.mode,
            "batch_dims": dfa.batch_dims,
            "scale_repeats": dfa.scale_repeats,
            "microbatches": self.microbatches,
            "send": self.send,
            "ahead": self.ahead,
            "scale_grads": self.scale_grads,
        }

    def _tie(self, agreed: Agreement, output: Any) -> _Pass:
        """Tie the activations that wait to a stand-in for the network's output."""
        if self.dfa.mode == "dfa":
            self._warn_of_an_end(output)
        targets = agreed.said[self.stage].targets
        place = targets[0].device if targets else self._links.device
        scalar = torch.zeros((), dtype=agreed.output.dtype, device=place)
        made, stand_in = Received(), scalar.expand(agreed.output.shape)
        return _Pass(self.dfa.tie(stand_in, made), stand_in, made)

    def _finish(
        self, agreed: Agreement, output: Tensor, target: Any
    ) -> tuple[_Pass, Tensor, Tensor]:
        """The loss of a microbatch and its error, of which all stages get what is theirs."""
        check_same("the output", (agreed.output,), (Meta.of(output),))
        made = Received()
        tied = self.dfa.tie(output, made)
        leaf = tied.detach().requires_grad_()
        assert self.loss is not None
        loss = self.loss(leaf, target)
        if not isinstance(loss, Tensor) or loss.dim() > 0 or not loss.requires_grad:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"{WHERE}: loss must return a scalar that depends on the output, got {got}"
            )
        (loss / self.microbatches if self.scale_grads else loss).backward()
        error = leaf.grad
        if error is None:
            raise ValueError(f"{WHERE}: loss must depend on the output, got one that does not")
        self._send_feedback(agreed, error, made)
        return _Pass(tied, error, made), loss.detach(), leaf.detach()

    def _send_feedback(self, agreed: Agreement, error: Tensor, made: Received) -> None:
        """Send every stage its payload, and fill this stage's own."""
        payloads = dict.fromkeys(payload for payload in agreed.payloads if payload is not None)
        if not payloads and not agreed.said[-1].targets:
            return
        dfa, links = self.dfa, self._links
        rows = dfa.transformed(error, dfa.batch_dims)
        made.source, made.rows = dfa.source, rows
        if self._wanted is None:
            self._wanted = agreed.asked(dfa, self.stage)
        for payload in payloads:
            tensors = [rows]
            if payload.layers is not None:
                layers, dtype = asked = self._wanted[payload.stages[0]]
                there = rows.to(dfa.rp_device)
                source = dfa.source_for(layers, there.shape[1], there.device)
                tensors = signals.project(source, there, layers, dtype)
                if asked == self._wanted.get(self.stage):
                    made.signals = [tensor.clone() for tensor in tensors]
            tensors = [tensor.detach().to(links.device) for tensor in tensors]
            check_same("what is sent", payload.metas, [Meta.of(tensor) for tensor in tensors])
            links.broadcast(tensors, payload.stages)

    def _expect(self, agreed: Agreement) -> None:
        """Begin to receive the payloads of the next microbatches."""
        payload = agreed.payloads[self.stage]
        if payload is None:
            return
        while len(self._feedback) < self._links.ahead and self._expected < self.microbatches:
            self._feedback.append(self._links.receive_broadcast(payload.metas, payload.stages))
            self._expected += 1

    def _backward(self, one: _Pass, *, final: bool) -> None:
        """Train this stage's layers on a microbatch, once its error is there."""
        agreed = self._agreed
        assert agreed is not None
        payload = agreed.payloads[self.stage]
        if payload is not None:
            tensors = self._feedback.popleft().wait()
            self._expect(agreed)
            one.made.source = self.dfa.source
            if payload.layers is None:
                (one.made.rows,) = tensors
            else:
                one.made.signals, one.made.rows = tensors, tensors[0][:, :0]
        if final and isinstance(self.module, DistributedDataParallel):
            self.module.reducer.prepare_for_backward([])  # as torch.distributed.pipelining does
        if one.tied.requires_grad:
            one.tied.backward(one.gradient)

    def _warn_of_an_end(self, output: Any) -> None:
        """Warn where something comes after a stage's last point, which then does not train."""
        for tensor in _tensors(output):
            node = tensor.grad_fn
            if tensor.requires_grad and type(node).__name__ != "StoppedBackward":
                guards.warn_of_an_end_without_point(self._said, self.stage)

    def __repr__(self) -> str:
        gets = None if self.gets is None else self.gets[self.stage]
        facts = [f"{self.stage} of {self.stages}", f"microbatches={self.microbatches}"]
        if gets is not None:
            payload = self._agreed and self._agreed.payloads[self.stage]
            numbers = sum(meta.shape[1] for meta in payload.metas) if payload else 0
            facts.append(f"gets {gets}, {numbers} numbers a row")
        return f"{WHERE}({', '.join(facts)})"


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested arguments."""
    if isinstance(value, Mapping):
        value = [*value.values()]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors_in(part)]
    return [value] if isinstance(value, Tensor) else []


def _tensors(output: Any) -> list[Tensor]:
    """What a stage sends on."""
    tensors = [output] if isinstance(output, Tensor) else checks.listed(output)
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise TypeError(
            f"{WHERE}: module must return a tensor or a tuple of tensors, got "
            f"{type(output).__name__}"
        )
    return tensors


def _refuse_wrappers(module: nn.Module) -> None:
    """Raise for what shares out a module's work and cannot with several microbatches on their way.

    A DistributedDataParallel can if it is the module itself.
    """
    sharding: Any = sys.modules.get("torch.distributed.fsdp")
    sharded = () if sharding is None else (sharding.FSDPModule, sharding.FullyShardedDataParallel)
    for name, part in module.named_modules():
        if isinstance(part, (nn.DataParallel, *sharded)):
            why = "use DistributedDataParallel around it"
        elif isinstance(part, DistributedDataParallel) and name:
            why = "a DistributedDataParallel must be around the whole, a compiled module too"
        elif isinstance(part, DistributedDataParallel) and part.find_unused_parameters:
            why = "find_unused_parameters=True would not find what the DFA trains"
        else:
            continue
        got = f"{type(part).__name__} {name!r}" if name else f"a {type(part).__name__}"
        raise ValueError(f"{WHERE}: module cannot be trained in microbatches, got {got}: {why}")


def _without_reduction(module: nn.Module) -> contextlib.AbstractContextManager:
    """A forward pass after which a DistributedDataParallel reduces no gradients by itself."""
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return contextlib.nullcontext()
