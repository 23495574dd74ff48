"""Each test compiles its models anew: torch gives up on code that it compiled too often."""

import gc
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def nothing_sharded():
    """The classes that fully_shard makes say that it is in use, for as long as it keeps them."""
    yield
    fully_shard = sys.modules.get("torch.distributed.fsdp._fully_shard._fully_shard")
    if fully_shard is not None and fully_shard.cls_to_fsdp_cls:
        fully_shard.cls_to_fsdp_cls.clear()
        gc.collect()
