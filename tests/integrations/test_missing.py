"""The callbacks' libraries are no requirement, and are asked for where they are missing."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("library", ["transformers", "lightning"])
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    for name in ("transformers.trainer_callback", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name.partition(".")[0], None)
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"dfa_kernels.integrations.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {library}: pip .*dfa-kernels\[{library}\]"):
        __import__(f"dfa_kernels.integrations.{library}")


def test_the_package_imports_neither():
    code = """
import sys
sys.modules |= dict.fromkeys(("transformers", "lightning", "pytorch_lightning"))
import dfa_kernels.integrations
import dfa_kernels.integrations.common
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
