"""What launchers tell trainers, for the ranks of `tests.processes`, of which there are two."""

import os


def launched(rank):
    """The environment of torchrun, except that the ranks have a group already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def new_accelerate_state(fsdp):
    """Forgets the last. accelerate refuses FSDP2 on the CPU, so it is told that this is no CPU."""
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    if fsdp:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
