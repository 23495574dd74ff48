"""What is sent in a step, as the benchmark counts it, against what it must be."""

import json

import pytest
import torch.distributed as dist

from benchmarks import communication
from benchmarks.report import distributed_tables

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")

LAYERS, WIDTH, VOCABULARY, ROWS = 2, 32, 64, 2 * 8


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    file = tmp_path_factory.mktemp("counted") / "communication.json"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LAYERS": LAYERS, "WIDTH": WIDTH, "VOCABULARY": VOCABULARY}.items():
            patch.setattr(communication, name, value)
        patch.setattr(communication, "BATCH", 2)
        patch.setattr(communication, "TOKENS", 8)
        communication.main(["--json", str(file)])
    return json.loads(file.read_text())


def test_dfa_sends_one_signal_more_than_backpropagation_for_all_blocks(counted):
    kinds = {one["kind"]: one for one in counted["kinds"]}
    for kind, one in kinds.items():
        (their_forward, theirs), (our_forward, ours) = one["backprop"], one["DFA"]
        assert their_forward == our_forward
        signal = ROWS * WIDTH * 4 * 3 // 4
        more = sum(ours["bytes"].values()) - sum(theirs["bytes"].values())
        rounds = {"fully_shard": 0, "tensor and sequence parallel": 1}.get(kind, 2)
        assert more == rounds * signal
    assert kinds["tensor parallel"]["DFA"][1]["calls"] == {"all_reduce": 2 * LAYERS + 2}
    head = kinds["head by its vocabulary"]["backprop"][1]
    assert head == {"calls": {"all_reduce": 1}, "bytes": {"all_reduce": 2 * signal}}


def test_the_table(counted):
    table = distributed_tables.communication(counted)
    assert len(table) == 2 + len(communication.KINDS) + 2
    assert f"{2 * LAYERS + 2} all-reduces" in "\n".join(table)
