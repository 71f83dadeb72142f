"""Every example of the README and the docs is executed, in a folder of its own, as a reader would.

A fenced block under `<!-- file: NAME -->` is written to that file; `python` blocks without one are run in order, in one
namespace per page; lines starting with `$ mist` in `console` blocks are run and must exit with 0, or with what
`# exit N` behind them says. Lines below a command are what it prints, in which `...` stands for anything.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mist.cli import main

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *(p for folder in ("", "guides", "pipelines") for p in sorted((ROOT / "docs" / folder).glob("*.md"))),
]
LINKING = [*PAGES, *sorted((ROOT / "docs/decisions").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- file: (?P<file>\S+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE
)


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
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
            for command, shown in re.findall(r"^\$ mist (.*)\n((?:(?!\$ ).*\n)*)", block["text"], re.MULTILINE):
                run_command(command, shown)


def run_command(command: str, shown: str) -> None:
    """Run one command of a page; `shown` are the lines that the page has below it, none if it doesn't show any."""
    result = CliRunner().invoke(main, shlex.split(command, comments=True))
    expected = re.search(r"# exit (\d)$", command)
    assert result.exit_code == int(expected[1] if expected else 0), f"{command}\n{result.output}\n{result.exception}"
    if shown.strip():
        pattern = "(?s:.*)".join(map(re.escape, lines(shown).split("...")))
        told = lines(result.output if expected else result.stdout)  # progress is told beside it
        assert re.fullmatch(pattern, told), f"{command}\n{told}\nis not as shown:\n{shown}"


def lines(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def test_no_page_takes_the_name_of_one_that_the_site_makes() -> None:
    assert not {page.stem for page in (ROOT / "docs").glob("*.md")} & {"search", "genindex", "modindex"}


def test_links_between_pages_exist() -> None:
    for page in LINKING:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
