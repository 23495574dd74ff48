"""Made-up GPUs, whose check is a small script in its own process."""

import json
import sys
import warnings

import torch

from dfa_kernels.backends import registry, trial, verdicts

GPUS = [torch.device("cuda", i) for i in range(2)]
NEW = verdicts.Facts("Z100", (99, 0), "580.65")  # nothing is proven there
H100 = verdicts.Facts("H100", (9, 0), "580.65")
UNAVAILABLE = registry.unavailable
PASSED = """json.dump({"passed": True, "failures": []}, open(report, "w"))"""
WRONG = """json.dump({"passed": False, "failures": ["bits", "sums"]}, open(report, "w")); exit(1)"""


class Machine:
    """Devices, each of some kind, and the script that a check runs."""

    def __init__(self, folder, monkeypatch):
        self.log = folder / "checks.jsonl"
        self.cache = folder / "cache"
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        self.kinds = dict.fromkeys(GPUS, NEW)
        self.check = PASSED
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("DFA_KERNELS_CACHE", str(self.cache))
        monkeypatch.delenv("DFA_KERNELS_CHECK", raising=False)
        monkeypatch.delenv("DFA_KERNELS_BACKEND", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(self.temporary))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(verdicts, "facts", self.kinds.__getitem__)
        monkeypatch.setattr(verdicts, "kernels", lambda backend: f"kernels of {backend}")
        monkeypatch.setattr(trial, "command", self.command)
        monkeypatch.setattr(verdicts, "triton_version", lambda: "3.7")
        self.works("torch", "cuda", "triton")
        self.restart()

    def works(self, *backends):
        """Make only these available; other GPU backends are not even in the order of choice."""
        for name in ("cuda", "triton"):
            devices = ("cuda",) if name in backends else ()
            self.monkeypatch.setattr(registry.BACKENDS[name], "DEVICES", devices)
        self.monkeypatch.setattr(
            registry, "unavailable", lambda name, *_: None if name in backends else "not today"
        )

    def by_distribution(self, *backends):
        """As `works`, but each serves the distributions that it makes."""
        self.works(*backends)
        for name in backends:
            self.monkeypatch.setattr(
                registry.BACKENDS[name], "unavailable", lambda device_type: None
            )
        self.monkeypatch.setattr(registry, "unavailable", UNAVAILABLE)

    def proves(self):
        """Make the first GPU one on which "cuda" and "triton" are proven."""
        self.kinds[GPUS[0]] = H100
        for name in ("cuda", "triton"):
            proven = {H100.capability: registry.BACKENDS[name].DISTRIBUTIONS}
            self.monkeypatch.setattr(registry.BACKENDS[name], "PROVEN", proven)

    def command(self, backend, device, report):
        head = f"""
import json, os, sys
backend, report = {backend!r}, {str(report)!r}
with open({str(self.log)!r}, "a") as file:
    print(json.dumps([backend, "{device}", dict(os.environ), os.getcwd(), sys.path]), file=file)
"""
        return [sys.executable, "-c", head + self.check]

    def checks(self):
        """What each check covered, and where it ran."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def checked(self):
        return [(backend, device) for backend, device, *_ in self.checks()]

    def restart(self):
        """As in a new process: only the disk remembers."""
        self.monkeypatch.setattr(verdicts, "_remembered", {})
        self.monkeypatch.setattr(registry, "_chosen", {})
        self.monkeypatch.setattr(registry, "_said", {})

    def files(self):
        return sorted(path.name for path in self.cache.glob("*.json"))


def choose(device=GPUS[0], distribution="normal"):
    """What an automatic choice takes, and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = registry.choose("project", device, None, distribution)
    assert {warning.category for warning in caught} <= {RuntimeWarning}
    return name, [str(warning.message) for warning in caught]


def fault(name):
    return f"import signal; print('before', flush=True); os.kill(os.getpid(), signal.{name})"
