"""`DFACallback` for the `Trainer` of Hugging Face's transformers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from dfa_kernels import checks
from dfa_kernels.integrations.common import (
    alignment_logs,
    dfas_of,
    refuse_attached_states,
    restore,
    states_of,
)

try:
    from transformers.trainer_callback import ExportableState, TrainerCallback
except ImportError as missing:
    raise ImportError(
        "dfa_kernels.integrations.transformers needs transformers: "
        "pip install 'dfa-kernels[transformers]'"
    ) from missing


class DFACallback(TrainerCallback, ExportableState):
    """Keeps the state of the model's `DFA`s in the checkpoints, and logs their alignment.

        trainer = Trainer(model, ...)
        trainer.add_callback(DFACallback(trainer, batch, every=100))

    The state is in the checkpoint's trainer_state.json. A run that is resumed takes it, and warns
    where the script gives another seed; see `DFA.set_extra_state`. Training is the same, bit for
    bit, with and without the callback. In several processes each measures the same batch; with
    FSDP2 `attach` with state=None, since this keeps the state.

    Args:
        trainer: the `Trainer`. Its model holds a `DFA` or has one attached when training begins.
        batch: what the alignment is measured on: the arguments of the model by name, as the
            trainer's data collator gives them. The loss is that of `trainer.compute_loss`. None:
            the alignment is not measured.
        every: the steps of the optimizer between two measurements, each of which is logged by
            `trainer.log` as "dfa/alignment/<layer>".

    Raises:
        TypeError, ValueError: naming the argument and what was got; when training begins, if the
            model has no `DFA`, if the checkpoint's state does not fit it, or if FSDP2 could not
            load that which `attach` adds to the model's.
    """

    _trainer: Any = None
    _batch: Mapping[str, Any] | None = None
    _every = 0

    def __new__(cls, *arguments: Any, **options: Any) -> DFACallback:
        """An instance of a type of its own, to which `__init__` ties what it gets.

        With restore_callback_states_from_checkpoint, a Trainer replaces its callbacks by others
        that it makes from their types and values in JSON, which a trainer and a batch are not.
        """
        own = cls if cls._trainer is not None else type(cls.__name__, (cls,), {})
        return super().__new__(own)

    def __init__(
        self, trainer: Any = None, batch: Mapping[str, Any] | None = None, every: int = 100
    ):
        if type(self)._trainer is not None and trainer is None:
            return  # made again by the Trainer
        if not callable(getattr(trainer, "compute_loss", None)):
            raise TypeError(
                f"DFACallback: trainer must be a transformers.Trainer, got {type(trainer).__name__}"
            )
        if batch is not None and not isinstance(batch, Mapping):
            raise TypeError(
                "DFACallback: batch must be a mapping from the names of the model's arguments, got "
                f"{type(batch).__name__}"
            )
        own: Any = type(self)
        own._every = checks.integer("DFACallback", "every", every, low=1, high=sys.maxsize)
        own._trainer, own._batch = trainer, batch

    def state(self) -> dict[str, Any]:
        """What the Trainer writes to trainer_state.json."""
        return {"args": {}, "attributes": {"states": states_of(self._trainer.model)}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the states of the checkpoint in force, if the run is resumed from one."""
        model = self._trainer.model
        dfas_of(model)
        fsdp = getattr(self._trainer.accelerator.state, "fsdp_plugin", None)
        if fsdp is not None and fsdp.state_dict_type.name == "FULL_STATE_DICT":
            refuse_attached_states(model)
        # A checkpoint of a run without this callback lacks the entry that the Trainer will replace.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):  # of several callbacks; the last is the newest
            saved = saved[-1]
        restore(model, saved["attributes"]["states"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and log, if it is time to."""
        if self._batch is None or state.global_step % self._every:
            return
        trainer, batch = self._trainer, self._batch
        model = trainer.model

        def loss() -> Any:
            with trainer.compute_loss_context_manager():
                # A copy: compute_loss may take entries out.
                return trainer.compute_loss(model, dict(trainer._prepare_inputs(dict(batch))))

        logs = alignment_logs(model, loss)
        logging_is_due = control.should_log
        trainer.log(logs)
        control.should_log = logging_is_due  # which `log` takes for done
