"""Every example of the README and the docs is executed, in a folder of its own, as a reader would.

A fenced block under `<!-- file: NAME -->` is written to that file; `python` blocks without one are run in order, in one
namespace per page; lines starting with `$ mist` in `console` blocks are run and must exit with 0.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mist.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs/pipelines").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = [match.groupdict() for match in BLOCK.finditer(page.read_text())]
    for block in blocks:
        if block["file"]:
            Path(block["file"]).write_text(block["text"])
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks:
        if block["language"] == "python" and not block["file"]:
            exec(compile(block["text"], str(page), "exec"), namespace)
        elif block["language"] == "console":
            for line in block["text"].splitlines():
                if line.startswith("$ mist "):
                    run_command(line)


def run_command(line: str) -> None:
    arguments = shlex.split(line.removeprefix("$ mist "), comments=True)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


def test_links_between_pages_exist() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
