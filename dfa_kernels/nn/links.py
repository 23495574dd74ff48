"""How tensors get from one stage of a pipeline to another, over `torch.distributed`."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Meta(NamedTuple):
    """What a process must know of a tensor to receive it."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Meta:
        """A tensor's."""
        return cls(tensor.shape, tensor.dtype)

    def empty(self, device: torch.device) -> Tensor:
        """A tensor to receive into."""
        return torch.empty(self.shape, dtype=self.dtype, device=device)

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Arrival(NamedTuple):
    """Tensors that are on their way."""

    tensors: list[Tensor]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        """The tensors, once they are there."""
        for work in self.works:
            work.wait()
        return self.tensors


class Links:
    """The ways between the stages of a pipeline, of which this process is one.

    All is sent and received in the background. On NCCL the operations of one group wait for one
    another, in the order in which each process begins them. So every two neighbours have a group of
    their own, and so has every set of stages that gets the same thing: then no order of them can
    block, whichever stage is late.

    Args:
        group: the processes, one for each stage in order. None: all.
        device: where tensors are received.
        ahead: how many sends may be under way at a time, of each kind.
        timeout: of the groups that it makes. None: torch's default.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        ahead: int,
        timeout: datetime.timedelta | None,
    ):
        self.group = group
        self.device = device
        self.ahead = ahead
        self.timeout = timeout
        self.ranks = dist.get_process_group_ranks(group)
        self.stage, self.stages = dist.get_rank(group), len(self.ranks)
        self._neighbours: dict[int, Any] = {}  # the group with each
        self._sets: dict[tuple[int, ...], Any] = {}  # the group of these stages and the last one
        # What must stay in memory until it has gone.
        self._sent: deque[Arrival] = deque()
        self._broadcasts: deque[Arrival] = deque()
        for first in (0, 1):  # the pairs that begin with an even stage, then the others
            below = self.stage - (self.stage - first) % 2
            pair = [stage for stage in (below, below + 1) if 0 <= stage < self.stages]
            made = self._join(pair)
            self._neighbours |= {stage: made for stage in pair if stage != self.stage}

    def gather(self, said: Any) -> list[Any]:
        """What every stage says, in order. Pickled: for the first step, not for every one."""
        everything: list[Any] = [None] * self.stages
        dist.all_gather_object(everything, said, self.group)
        return everything

    def prepare(self, sets: Sequence[tuple[int, ...]]) -> None:
        """Make ready for broadcasts to these sets of stages; all stages call this."""
        last = self.stages - 1
        for stages in sets:
            if stages not in self._sets:
                ours = self.stage in (*stages, last)
                self._sets[stages] = self._join([*stages, last] if ours else [self.stage])

    def tell(self, metas: Sequence[Meta]) -> None:
        """Say what the next stage will receive."""
        to = self.stage + 1
        dist.send_object_list([tuple(metas)], self.ranks[to], self._neighbours[to])

    def hear(self) -> tuple[Meta, ...]:
        """What this stage will receive from the one before."""
        heard: list[Any] = [None]
        before = self.stage - 1
        dist.recv_object_list(heard, self.ranks[before], self._neighbours[before])
        metas: tuple[Meta, ...] = heard[0]
        return metas

    def send(self, tensors: Sequence[Tensor]) -> None:
        """Begin to send tensors to the next stage."""
        to, ours = self.stage + 1, [tensor.contiguous() for tensor in tensors]
        works = [dist.isend(tensor, self.ranks[to], self._neighbours[to]) for tensor in ours]
        self._keep(self._sent, Arrival(ours, works))

    def receive(self, metas: Sequence[Meta]) -> Arrival:
        """Begin to receive tensors from the stage before."""
        before, tensors = self.stage - 1, [meta.empty(self.device) for meta in metas]
        works = [
            dist.irecv(tensor, self.ranks[before], self._neighbours[before]) for tensor in tensors
        ]
        return Arrival(tensors, works)

    def broadcast(self, tensors: Sequence[Tensor], stages: tuple[int, ...]) -> None:
        """Begin to send tensors from this stage, the last, to all of `stages`."""
        ours = [tensor.contiguous() for tensor in tensors]
        self._keep(self._broadcasts, self._broadcast(ours, stages))

    def receive_broadcast(self, metas: Sequence[Meta], stages: tuple[int, ...]) -> Arrival:
        """Begin to receive what the last stage sends to all of `stages`."""
        return self._broadcast([meta.empty(self.device) for meta in metas], stages)

    def finish(self) -> None:
        """Wait until all that was sent has gone."""
        for queue in (self._sent, self._broadcasts):
            while queue:
                queue.popleft().wait()

    def _broadcast(self, tensors: list[Tensor], stages: tuple[int, ...]) -> Arrival:
        group, source = self._sets[stages], self.ranks[-1]
        works = [dist.broadcast(tensor, source, group, async_op=True) for tensor in tensors]
        return Arrival(tensors, works)

    def _keep(self, queue: deque[Arrival], sent: Arrival) -> None:
        """Keep what is being sent; wait for what was sent long before."""
        queue.append(sent)
        if len(queue) > self.ahead:
            queue.popleft().wait()

    def _join(self, stages: Sequence[int]) -> Any:
        """A new group of these stages. All others make one at the same time, if only of themselves.

        torch names such a group by the number of those before, which has to be its members' alike.
        """
        known: Any = getattr(dist.distributed_c10d, "_world", None)
        if not hasattr(known, "pg_names"):
            raise RuntimeError(
                "FeedbackStage: this version of torch does not tell how many process groups there "
                f"are, by which new ones are named; got torch {torch.__version__}"
            )
        counts = self.gather(len(known.pg_names))
        for _ in range(max(counts) - counts[self.stage]):
            self._new_group([self.stage])
        return self._new_group(stages)

    def _new_group(self, stages: Sequence[int]) -> Any:
        ranks = [self.ranks[stage] for stage in stages]
        return dist.new_group(ranks, timeout=self.timeout, use_local_synchronization=True)
