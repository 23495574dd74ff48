"""The guide's examples for several processes, each run by two."""

import contextlib
import io
import re

import pytest
import torch.distributed as dist

from tests import ROOT, processes

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

GUIDE = (ROOT / "dfa_kernels" / "nn" / "README.md").read_text()
EXAMPLES = [
    code
    for code in re.findall(r"^```py\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    if "init_process_group" in code
]


def run(rank, code, world, folder):
    """As torchrun would, but for the place where processes meet."""
    begin = dist.init_process_group
    where = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(dist, "init_process_group", lambda: begin("gloo", **where))
        exec(compile(code, "the guide", "exec"), {})
    return said.getvalue()


@pytest.mark.parametrize("example", range(len(EXAMPLES)))
def test_the_examples_run(example, tmp_path):
    *others, last = processes.run(run, 2, tmp_path, EXAMPLES[example], 2, tmp_path, group=False)
    assert re.fullmatch(r"loss \d\.\d+\n", last)
    assert all(other == "" or re.fullmatch(r"loss \d\.\d+\n", other) for other in others)


def test_there_are_examples():
    assert len(EXAMPLES) >= 3
