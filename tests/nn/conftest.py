"""Each test compiles its models anew: torch gives up on code that it compiled too often."""

import pytest
import torch


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
