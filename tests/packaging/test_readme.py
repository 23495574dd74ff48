"""The README: its examples run, its figures are the committed ones, its links lead somewhere."""

import json
import re
from pathlib import Path

import provenance
import pytest
import readme_tables

ROOT = Path(__file__).parents[2]
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
    assert len(readme_tables.BLOCK.findall(README)) == 12
    assert readme_tables.render(README) == README, "run python benchmarks/readme_tables.py"


def test_committed_results_are_of_committed_code():
    results = sorted(readme_tables.RESULTS.glob("*/*.json"))
    assert results
    for path in results:
        measured = json.loads(path.read_text())
        commits = [measured["commit"], *measured.get("run_commits", ())]
        assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits), path
        assert not measured.get("quick"), path  # a run of the paper's that only shows that it runs


def test_a_commit_cut_short_still_says_that_files_had_changed():
    assert provenance.short("0123456789abcdef") == "012345678"
    assert provenance.short("0123456789abcdef-dirty") == "012345678-dirty"


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", PROSE))))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()
