"""`DFACallback` for the `Trainer` of Lightning."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dfa_kernels import checks
from dfa_kernels.integrations.common import alignment_logs, dfas_of, restore, states_of

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as missing:
        raise ImportError(
            "dfa_kernels.integrations.lightning needs lightning: "
            "pip install 'dfa-kernels[lightning]'"
        ) from missing


class DFACallback(Callback):
    """Keeps the state of the module's `DFA`s in the checkpoints, and logs their alignment.

        Trainer(callbacks=[DFACallback(lambda module, batch: module.loss(batch), every=100)])

    The state is the callback's own in the checkpoint. A run that is resumed takes it, and warns
    where the script gives another seed; see `DFA.set_extra_state`. Training is the same, bit for
    bit, with and without the callback.

    Args:
        loss: a function of the LightningModule and a batch, which returns the scalar loss. It
            should not be `training_step`, which would log once more. None: the alignment is not
            measured.
        every: the steps of the optimizer between two measurements, each of which is logged by
            `module.log` as "dfa/alignment/<layer>". Loggers get the epoch's last measurement at the
            trainer's multiples of `log_every_n_steps`. None: at these, so that each is a new one.

    Raises:
        TypeError, ValueError: naming the argument and what was got; when training begins, if the
            module has no `DFA`; when it is resumed, if the checkpoint's state does not fit it.
    """

    def __init__(self, loss: Callable[[Any, Any], Tensor] | None = None, every: int | None = None):
        if loss is not None and not callable(loss):
            raise TypeError(f"DFACallback: loss must be a function, got {type(loss).__name__}")
        if every is not None:
            every = checks.integer("DFACallback", "every", every, low=1, high=sys.maxsize)
        self._loss, self._every = loss, every
        self._module: Any = None
        self._measured_at = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take note of the module whose `DFA`s have the state."""
        self._module = pl_module

    def state_dict(self) -> dict[str, Any]:
        """What Lightning writes to the checkpoint."""
        return {"states": [] if self._module is None else states_of(self._module)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the states of a checkpoint in force."""
        restore(self._module, state_dict["states"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse a module without a `DFA`."""
        dfas_of(pl_module)
        self._measured_at = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure and log, if it is time to."""
        loss, step = self._loss, trainer.global_step
        every = self._every or trainer.log_every_n_steps
        # Several batches make a step where gradients are accumulated.
        if loss is None or not every or step % every or step == self._measured_at:
            return
        self._measured_at = step

        def of_batch() -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return loss(pl_module, batch)

        pl_module.log_dict(alignment_logs(pl_module, of_batch))
