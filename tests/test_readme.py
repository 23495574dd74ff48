"""The README: its examples run, its figures are the committed ones, its links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PROSE = re.sub(r"```.*?```", "", README, flags=re.DOTALL)


def test_the_examples_run():
    assert len(EXAMPLES) >= 3
    names: dict = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)


def test_the_first_example_is_eight_lines():
    assert len(EXAMPLES[0].strip().splitlines()) <= 8


def test_the_tables_are_the_committed_results():
    path = ROOT / "benchmarks" / "readme_tables.py"
    spec = importlib.util.spec_from_file_location("readme_tables", path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert len(tables.BLOCK.findall(README)) == 11
    assert tables.render(README) == README, "run python benchmarks/readme_tables.py"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", PROSE))))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()
