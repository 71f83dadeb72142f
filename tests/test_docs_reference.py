"""The reference of the documentation is written from the code and leaves nothing out.

Beside `test_docs.py`, which runs the examples; `make docs` builds the site, where a broken link fails.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from mist import registry
from mist.cli import main
from mist.scenario import catalogue
from mist.scenario.schema import json_schema

DOCS = Path(__file__).parent.parent / "docs"
sys.path.insert(0, str(DOCS))
from generate import CATALOGUES, _escaped, _table, write_reference  # noqa: E402

pytestmark = pytest.mark.docs


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "how-it-works.md").write_text((DOCS / "how-it-works.md").read_text())
    write_reference(folder / "reference")
    return {page.stem: page.read_text() for page in (folder / "reference").rglob("*.md")}


def test_every_command_has_its_help(pages: dict[str, str]) -> None:
    def commands(group: click.Group, path: str) -> Iterator[str]:
        for name, command in group.commands.items():
            yield f"{path} {name}"
            if isinstance(command, click.Group):
                yield from commands(command, f"{path} {name}")

    named = list(commands(main, "mist"))
    assert "mist calibrate points" in named
    for name in named:
        assert f"\n## {name}\n\n```text\nUsage: {name} " in pages["cli"], name


def test_every_key_of_a_scenario_is_explained(pages: dict[str, str]) -> None:
    schema = json_schema()
    sections = {"The file": schema, **schema["$defs"]}
    for name, section in sections.items():
        text = pages["scenario"].split(f"\n## {name}\n")[1].split("\n## ")[0]
        for key in section["properties"]:
            row = re.search(rf"^\| `{key}` \| (.*) \| (.*) \| (.*) \|$", text, re.MULTILINE)
            assert row is not None, f"{name}: {key}"
            assert row[1], f"{name}: {key} has no type"
    for target in re.findall(r"\]\(#(\w+)\)", pages["scenario"]):
        assert re.search(rf"^## {target}$", pages["scenario"], re.MULTILINE | re.IGNORECASE), target


@pytest.mark.parametrize("kind", CATALOGUES)
def test_every_entry_of_a_catalogue_is_there(kind: str, pages: dict[str, str]) -> None:
    for name in catalogue.names(kind):
        assert f"\n| {name} | " in pages[kind], name


def test_figures_have_their_sources(pages: dict[str, str]) -> None:
    text = pages["devices"].split("\n## l40s\n")[1].split("\n## ")[0]
    assert "| memory_bytes | aiconfigurator-core 0.12.0 systems/l40s.yaml (48 GiB less ECC) |" in text


@pytest.mark.parametrize("kind", ["batching", "order", "routing", "admission", "perf", "eviction", "pipeline", "trace"])
def test_every_policy_is_there_with_its_docstring(kind: str, pages: dict[str, str]) -> None:
    text = pages["policies"].split(f"\n## {kind}\n")[1].split("\n## ")[0]
    for name in registry.names(kind):
        assert re.search(rf"^### {name}\n\n\S", text, re.MULTILINE), name


def test_what_the_pages_import_is_in_the_reference(pages: dict[str, str]) -> None:
    shown = [
        DOCS / name for name in ("tutorial.md", "extending.md", "capacity.md", "searching.md", "advice.md", "cost.md")
    ]
    for page in (*shown, *(DOCS / "guides").glob("*.md")):
        for module, names in re.findall(r"^from (mist\S*) import (.*)$", page.read_text(), re.MULTILINE):
            text = pages["python"].partition(f"\n```{{py:module}} {module}\n")[2].partition("{py:module}")[0]
            for name in names.split(", "):
                assert re.search(rf"{{py:\w+}} {name}\b", text), f"{page.name}: {module}.{name}"


def test_text_of_docstrings_and_data_is_not_taken_for_markup() -> None:
    assert _escaped("`<a>` and <b>") == "`<a>` and \\<b>"
    assert _table(["x"], [["a|b\nc"]]) == "| x |\n| --- |\n| a\\|b c |\n"
