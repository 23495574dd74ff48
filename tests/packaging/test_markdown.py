"""Every Markdown file: its examples run, its commands exist, its links lead somewhere, and its
tables match the committed results."""

import importlib.util
import json
import re
import shlex
import subprocess

import pytest

from benchmarks.harness import provenance
from benchmarks.report import pages
from dfa_kernels import cli
from tests import ROOT

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MAKEFILE = (ROOT / "Makefile").read_text()


def in_git(root):
    """The Markdown files that git knows or would add; none where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    try:
        names = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return []
    return [path for path in sorted({root / name for name in names.splitlines()}) if path.exists()]


def in_folder(root):
    """Those of a source archive: outside hidden folders and those that a build leaves behind."""

    def is_source(path):
        folders = path.relative_to(root).parts[:-1]
        return not any(name.startswith(".") or name in ("build", "dist") for name in folders)

    return sorted(filter(is_source, root.rglob("*.md")))


FILES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in in_git(ROOT) or in_folder(ROOT)
}


def fenced(text, language):
    return [code for name, code in FENCE.findall(text) if name == language]


def each(holds):
    """Run a test for every file for whose text `holds` is true."""
    return pytest.mark.parametrize("name", [name for name in FILES if holds(FILES[name])])


def test_the_files_are_found():
    assert {"README.md", "dfa_kernels/nn/README.md", "dfa_kernels/backends/README.md"} <= {*FILES}


def test_an_archive_is_searched_without_git(tmp_path):
    names = ("README.md", "a/b.md", ".venv/c.md", "build/d.md", "a/.cache/e.md")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert in_folder(tmp_path) == [tmp_path / "README.md", tmp_path / "a/b.md"]
    assert in_git(tmp_path) == []


def test_the_readme_is_short():
    assert len(FILES["README.md"].splitlines()) <= 150
    assert len(fenced(FILES["README.md"], "python")[0].strip().splitlines()) <= 8


# --- examples and commands ---


@each(lambda text: fenced(text, "python"))
def test_the_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in fenced(FILES[name], "python"):
        exec(compile(example, name, "exec"), names)


def test_the_guides_have_examples():
    assert len(fenced(FILES["README.md"], "python")) >= 3
    assert len(fenced(FILES["dfa_kernels/nn/README.md"], "python")) >= 5


def commands(text):
    """The lines of shell blocks, and text between backticks that starts like a command."""
    lines = [line for block in fenced(text, "sh") for line in block.splitlines()]
    inline = re.findall(
        r"`((?:make|python3?|pytest|dfa-kernels|\.ci/)\b[^`]*)`", FENCE.sub("", text)
    )
    lines += [re.sub(r"[\[\]|]", " ", one) for one in inline]  # optional parts are checked too
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def why_unknown(words, options_of):
    """What a command names that does not exist, or None."""
    program, *rest = words
    if program in ("python", "python3") and rest[:1] == ["-m"]:
        module = rest[1]
        if importlib.util.find_spec(module) is None:
            return module
        program, rest = ("dfa-kernels", rest[2:]) if module == "dfa_kernels" else (module, [])
    if program == "make":
        goals = [word for word in rest if "=" not in word]
        return next((goal for goal in goals if f"\n{goal}:" not in MAKEFILE), None)
    if program == "dfa-kernels":
        known = options_of(rest[0]) if rest else ""
        wanted = [word for word in rest[1:] if word.startswith("--")]
        return next((word for word in wanted if f"{word} " not in f"{known} "), None)
    if program in ("python", "python3", "pytest") or "/" in program:
        files = [word for word in words if "/" in word or word.endswith(".py")]
        return next((file for file in files if not (ROOT / file).exists()), None)
    return None


@pytest.fixture
def options_of(capsys):
    """The help of one of our commands; it fails if there is no such command."""

    def help_of(command):
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "--help"])
        assert ended.value.code == 0, command
        return re.sub(r"[\[\],|]", " ", capsys.readouterr().out)

    return help_of


@each(commands)
def test_the_commands_exist(name, options_of):
    unknown = {" ".join(words): why_unknown(words, options_of) for words in commands(FILES[name])}
    assert {command: what for command, what in unknown.items() if what} == {}


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("make test", None),
        ("make coffee", "coffee"),
        ("python -m dfa_kernels verify --backend cpp", None),
        ("python -m dfa_kernels verify --brew", "--brew"),
        ("python -m no_such_module", "no_such_module"),
        ("python .ci/gpu_check.py --plan", None),
        ("pytest -v tests/test_coffee.py", "tests/test_coffee.py"),
    ],
)
def test_unknown_commands_are_found(command, missing, options_of):
    ((words,),) = [commands(f"so `{command}` it")]
    assert why_unknown(words, options_of) == missing


# --- links ---


def anchors(text):
    """The anchors that GitHub gives the headings."""
    found: list[str] = []
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower().strip()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def links(text):
    return re.findall(r"\]\(\s*([^)\s]+)\s*\)", re.sub(r"`[^`]*`", "", FENCE.sub("", text)))


def leads_nowhere(link, path):
    """Whether a link in the file at `path` leads neither to the web nor to something here."""
    if link.startswith("https://"):
        return False
    file, _, anchor = link.partition("#")
    target = (path.parent / file).resolve() if file else path
    if not target.is_relative_to(ROOT) or not target.exists():
        return True
    return bool(anchor) and (target.suffix != ".md" or anchor not in anchors(target.read_text()))


@each(links)
def test_links_lead_somewhere(name):
    assert [link for link in links(FILES[name]) if leads_nowhere(link, ROOT / name)] == []


def test_links_that_lead_nowhere_are_found():
    text = "[a](LICENSE) [`b`](no-file) [c](README.md#limits) [d](#no-heading) [e](../) `[f](g)`"
    found = [link for link in links(text) if leads_nowhere(link, ROOT / "README.md")]
    assert found == ["no-file", "#no-heading", "../"]
    assert anchors("# Uses `x`, [y](z)\n## A\n```sh\n# b\n```\n## A\n") == ["uses-x-y", "a", "a-1"]


# --- tables ---


def test_the_readme_has_one_table_of_speed():
    assert [name for _, name, *_ in pages.TABLE.findall(FILES["README.md"])] == ["headline"]


def test_the_tables_and_pages_are_the_committed_results():
    made = {path.relative_to(ROOT).as_posix(): text for path, text in pages.pages()}
    folders = {path.parent.relative_to(ROOT).as_posix() for path in pages.RESULTS.glob("*/*.json")}
    assert {*made} >= {*FILES, *(f"{folder}/README.md" for folder in folders)}
    wrong = [name for name, text in made.items() if FILES.get(name) != text]
    assert wrong == [], "run python -m benchmarks.report"


@pytest.mark.parametrize("folder", sorted({path.parent for path in pages.RESULTS.glob("*/*.json")}))
def test_a_page_shows_all_of_its_run(folder):
    text = pages.page(folder)
    assert all(f"({path.name})" in text for path in folder.glob("*.json"))
    assert all(f"({path.name})" in text for path in folder.glob("*.png"))
    shown = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()}
    for path in folder.glob("bench.json"):
        cases = json.loads(path.read_text())["cases"]
        assert {case["case"] for case in cases if case["contenders"]} <= shown


def test_a_changed_table_is_made_anew():
    name = "README.md"
    assert pages.render(FILES[name].replace("53.9 us", "1 ns")) == FILES[name]


def test_committed_results_are_of_committed_code():
    results = sorted(pages.RESULTS.glob("*/*.json"))
    assert results
    for path in results:
        measured = json.loads(path.read_text())
        commits = [measured["commit"], *measured.get("run_commits", ())]
        # A note may say how the code that ran differed from the commit.
        assert all(re.fullmatch(r"[0-9a-f]{40}( \([^()]+\))?", commit) for commit in commits), path
        assert not measured.get("quick"), path  # a quick run of the paper's only shows that it runs


def test_a_commit_cut_short_still_says_that_files_had_changed():
    assert provenance.short("0123456789abcdef") == "012345678"
    assert provenance.short("0123456789abcdef-dirty") == "012345678-dirty"
    assert provenance.short("0123456789abcdef (an early build)") == "012345678 (an early build)"
