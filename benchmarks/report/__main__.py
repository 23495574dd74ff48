"""The command line of reports.

python -m benchmarks.report            writes the pages of all committed results, and the tables in
                                       the other Markdown files
python -m benchmarks.report FILE ...   shows runs again and draws their figures beside them
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.report import pages


def main(files: list[str]) -> None:
    """Show the runs in `files`, or write all pages."""
    if not files:
        for path, text in pages.pages():
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                print(f"written: {path}")
        return
    from benchmarks.report import terminal  # needs rich, which the pages do not

    console = terminal.console()
    for file in map(Path, files):
        measured = json.loads(file.read_text())
        terminal.show_all(console, measured)
        terminal.draw(console, measured, file)


if __name__ == "__main__":
    main(sys.argv[1:])
