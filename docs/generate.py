"""The reference, written from the code: Python API, commands, scenario keys, catalogues and policies, as Markdown.

`conf.py` calls it before the site is built; what it writes is not kept in the repository. Nothing is said here that the
code, its docstrings or the data files don't say.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import click

from mist import registry
from mist.cli import main
from mist.scenario import catalogue
from mist.scenario.listing import POLICIES, price_rows, rows
from mist.scenario.named import NOUNS, parameters
from mist.scenario.schema import json_schema

#: what a user may import, by chapter: modules, with their names where these aren't all; all else may change unannounced
MODULES = {
    "Running and results": [
        "mist: run Scenario Result ScenarioError InvariantError", "mist.scenario: load",
        "mist.scenario.stored: read_result", "mist.errors: Problem", "mist.units",
    ],
    "Contracts": [
        "mist.registry: register lookup names load_plugin_file", "mist.request", "mist.batching",
        "mist.batching.orders", "mist.routing", "mist.admission", "mist.pipeline", "mist.memory.eviction", "mist.perf",
        "mist.workload",
    ],
    "Workloads": ["mist.workload.trace", "mist.workload.columns", "mist.workload.synthetic", "mist.workload.sessions"],
    "Many runs": [
        "mist.search.capacity", "mist.search.compare", "mist.search.run", "mist.search.evaluate",
        "mist.search.executors", "mist.search.executors.serial",
    ],
    "What to make of a result": ["mist.advice", "mist.cost", "mist.report.html", "mist.report.timeline"],
    "Tests of your own": ["mist.testing"],
}  # fmt: skip
#: a link from a page to a file of the source
SOURCE_LINK = re.compile(r"\]\(\.\./src/mist/([\w/]+?)(?:/__init__)?\.py\)")
CATALOGUES = {
    "devices": "Devices", "models": "Models", "engines": "Engines", "networks": "Networks", "memories": "Memories",
    "prices": "Prices", "steps": "Learned steps", "acceptance": "Measured acceptance",
    "workloads": "Lengths of workloads",
}  # fmt: skip


def write_reference(folder: Path) -> None:
    """Write every page of the reference to `folder`; a page that hasn't changed stays as it is."""
    folder.mkdir(exist_ok=True)
    pages = {
        "python": "".join(_python()), "cli": "".join(_commands()), "scenario": "".join(_scenario()),
        "policies": "".join(_policies()), **{kind: "".join(_catalogue(kind)) for kind in CATALOGUES},
    }  # fmt: skip
    for name, text in pages.items():
        page = folder / f"{name}.md"
        if not page.exists() or page.read_text() != text:
            page.write_text(text)
    for name in SOURCE_LINK.findall((folder.parent / "how-it-works.md").read_text()):
        _write_source(folder / "source" / f"{name}.md", name)


def _write_source(page: Path, name: str) -> None:
    """A page that shows one file of the source, for the pages that link to it."""
    home = Path(inspect.getfile(import_module(f"mist.{name.replace('/', '.')}")))
    page.parent.mkdir(parents=True, exist_ok=True)
    shown = f"````{{code-block}} python\n:linenos:\n\n{home.read_text()}````\n"
    page.write_text(f"---\norphan: true\n---\n# mist/{name}{'/__init__' * (home.stem == '__init__')}.py\n\n{shown}")


def _python() -> Iterator[str]:
    yield "# Python API\n\nWhat is on this page is there to be imported; all else may change without notice.\n"
    for chapter, modules in MODULES.items():
        yield f"\n## {chapter}\n"
        for name, _, only in (module.partition(": ") for module in modules):
            module = import_module(name)
            yield f"\n### `{name}`\n\n{inspect.getdoc(module)}\n\n```{{py:module}} {name}\n```\n"
            for public in only.split() or _public(module):
                value = getattr(module, public)
                is_data = not (inspect.isclass(value) or inspect.isfunction(value))
                yield from [_data(module, public)] if is_data else _described(public, value)


def _public(module: ModuleType) -> list[str]:
    """`__all__`, or what the module itself defines, in its order."""
    return [name for name in getattr(module, "__all__", _defined(module)) if not name.startswith("_")]


def _defined(module: ModuleType) -> dict[str, ast.stmt]:
    """The top-level definitions of a module by name: classes, functions, aliases of types and constants."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    return found


def _data(module: ModuleType, name: str) -> str:
    """A constant or an alias of types, with the comment above it."""
    node, comment = _defined(module).get(name), ""
    if not isinstance(node, ast.Assign):
        return f"\n````{{py:data}} {name}\n````\n"
    for line in reversed(inspect.getsource(module).splitlines()[: node.lineno - 1]):
        if not line.startswith("#: "):
            break
        comment = f"{line.removeprefix('#: ')}\n{comment}"
    return f"\n````{{py:data}} {name}\n:value: {_short(ast.unparse(node.value))}\n\n{_escaped(comment)}````\n"


def _short(text: str) -> str:
    return text if len(text) < 80 else f"{text[:77]}..."


def _described(name: str, value: Any, indent: str = "") -> Iterator[str]:
    kind = "class" if inspect.isclass(value) else "method" if indent else "function"
    fence = "`" * (3 if indent else 5)
    flags = ":classmethod:\n" if inspect.ismethod(value) else ""
    yield f"\n{fence}{{py:{kind}}} {name}{_signature(value)}\n{flags}\n{_doc(value)}\n"
    if inspect.isclass(value):
        for member, raw in vars(value).items():
            if not member.startswith("_") and isinstance(raw, FunctionType | classmethod):
                yield from _described(member, getattr(value, member), "in a class")
            elif isinstance(raw, property | functools.cached_property) and not member.startswith("_"):
                yield f"\n```{{py:property}} {member}\n\n{_doc(raw)}\n```\n"
    yield f"{fence}\n"


def _signature(value: Any) -> str:
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # built in
        return ""
    if inspect.isclass(value) and getattr(value, "_is_protocol", False):
        return ""
    shown = [
        each.replace(default=_Shown(each.default)) if each.default is not each.empty else each
        for each in signature.parameters.values()
        if each.name != "self"
    ]
    if inspect.isclass(value):
        signature = signature.replace(return_annotation=signature.empty)
    text = str(signature.replace(parameters=shown)).replace("'", "").replace("\n", " ")
    known = getattr(inspect.unwrap(value), "__globals__", None) or vars(import_module(value.__module__))
    return re.sub(r"(?<![\w.])[A-Z]\w+", lambda found: _homes().get(id(known.get(found[0])), found[0]), text)


@functools.cache
def _homes() -> Mapping[int, str]:
    """The full name of each class of this reference, by which signatures link to it."""
    found = {}
    for entry in (entry for chapter in MODULES.values() for entry in chapter):
        name, _, only = entry.partition(": ")
        module = import_module(name)
        for public in only.split() or _public(module):
            if inspect.isclass(getattr(module, public)):
                found.setdefault(id(getattr(module, public)), f"{name}.{public}")
    return found


@dataclasses.dataclass
class _Shown:
    """A default as its source would have it; what has no short form is `...`."""

    value: Any

    def __repr__(self) -> str:
        text = repr(self.value).replace("'", '"')
        return "..." if "<" in text or len(text) > 40 else text


def _doc(value: Any) -> str:
    """The docstring, which is Markdown; that of a dataclass without one would only repeat its signature."""
    text = inspect.getdoc(value) or ""
    own = text and not (dataclasses.is_dataclass(value) and text.startswith(f"{getattr(value, '__name__', '')}("))
    return _escaped(text) if own else ""


def _escaped(text: str) -> str:
    """A docstring's angle brackets as text: outside of code they would be taken for HTML."""
    return re.sub(r"`[^`]*`|<", lambda found: found[0] if len(found[0]) > 1 else "\\<", text)


def _commands() -> Iterator[str]:
    yield "# Commands\n\nWhat `--help` says of each; Ctrl-C ends any of them with 130, a scenario's problems with 2.\n"
    yield from _command(main, "mist", None)


def _command(command: click.Command, name: str, above: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=above, terminal_width=100, max_content_width=100)
    yield f"\n## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            found = command.get_command(context, each)
            assert found is not None
            yield from _command(found, each, context)


def _scenario() -> Iterator[str]:
    """Every section of a scenario, the file itself first, then in the order in which sections are referred to."""
    schema = json_schema()
    yield (
        "# Scenario keys\n\nEvery key that a scenario may have. Unknown keys are errors, and `mist check --resolved` "
        "prints a scenario with every default; `mist schema` prints this page for editors, as a JSON Schema.\n"
    )
    sections = {"The file": schema} | {name: schema["$defs"][name] for name in _in_order(schema)}
    for name, section in sections.items():
        yield f"\n## {name}\n\n{_escaped(section.get('description', ''))}\n\n"
        needed = section.get("required", ())
        cells = [
            [f"`{key}`", _type(value), _default(value, key in needed), _escaped(value.get("description", ""))]
            for key, value in section["properties"].items()
        ]
        yield _table(["key", "value", "default", "is"], cells)


def _in_order(schema: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    todo = [dict(schema["properties"])]
    for node in todo:
        for name in re.findall(r'"#/\$defs/(\w+)"', json.dumps(node)):
            if name not in found:
                found.append(name)
                todo.append(schema["$defs"][name]["properties"])
    return found


def _type(node: Mapping[str, Any]) -> str:
    """A JSON Schema's type in words, with links to the section, the policies or the catalogue that is meant."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in node:
        found = [_type(each) for each in node["anyOf"]]
        named = [text for text in found if text.startswith("[")]
        dropped = {"", "none"} | ({"mapping", "text"} if any(text.startswith("[a name") for text in found) else set())
        return " or ".join(dict.fromkeys(named + [text for text in found if text not in dropped])) or "any"
    if "enum" in node:
        return _home(node["enum"]) or ", ".join(f"`{value}`" for value in node["enum"])
    if node.get("type") == "array":
        return f"list of {_type(node['items'])}" if "items" in node else "list"
    if node.get("type") == "object":
        inner = node.get("additionalProperties")
        if isinstance(inner, Mapping):
            return f"mapping of names to {_type(inner)}"
        return "" if len(node.get("properties", ())) == 1 else "mapping"  # {policy: parameters}: said by its name
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "null": "none",
    }
    return words.get(str(node.get("type", "")), "") + _range(node)


def _range(node: Mapping[str, Any]) -> str:
    bounds = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ "}
    told = [f"{sign}{node[key]:,}" for key, sign in bounds.items() if abs(node.get(key, 1e9)) < 1e9]
    return f", {', '.join(told)}" if told else ""


def _home(names: list[str]) -> str:
    """Where the implementations or catalogue entries of exactly these names are listed; "" where it isn't one."""
    for kind in (*POLICIES, "pipeline"):
        if names == registry.names(kind):
            return f"[{NOUNS[kind]}](policies.md#{kind})"
    for kind in CATALOGUES:
        if names == catalogue.names(kind):
            return f"[a name]({kind}.md), a file or a mapping"
    return ""


def _default(node: Mapping[str, Any], needed: bool) -> str:
    if needed:
        return "**required**"
    value = node.get("default")
    return "" if value in (None, {}, []) or isinstance(value, dict) else f"`{json.dumps(value)}`"


def _policies() -> Iterator[str]:
    """What the registry knows, by kind, with parameters and docstrings."""
    yield "# Policies and pipelines\n\nAll that has a name in the registry, by kind. "
    yield "Each is one file; [yours](../extending.md) may be the next.\n"
    for kind in (*POLICIES, "pipeline", "executor"):
        yield f"\n## {kind}\n"
        for name in registry.names(kind):
            cells = [
                [
                    f"`{key}`",
                    "**required**"
                    if field.is_required()
                    else f"`{_plain(field.get_default(call_default_factory=True))}`",
                ]
                for key, field in (parameters(kind, name).model_fields if kind in NOUNS else {}).items()
            ]
            yield f"\n### {name}\n\n{_doc(registry.lookup(kind, name))}\n\n"
            if cells:
                yield _table(["parameter", "default"], cells)


def _plain(value: Any) -> str:
    return json.dumps(value, default=lambda each: getattr(each, "name", str(each)))


def _catalogue(kind: str) -> Iterator[str]:
    """All entries in one table, then the source of each figure."""
    yield f"# {CATALOGUES[kind]}\n\nAll that ships, as `mist list {kind}` prints it; sources are below.\n\n"
    found = rows(kind)
    yield _table([f"`{key}`" for key in found[0]], [[_cell(value) for value in row.values()] for row in found])
    for entry in catalogue.entries(kind):
        yield from _sources(kind, entry.name, entry.source.data())


def _sources(kind: str, name: str, entry: Mapping[str, Any]) -> Iterator[str]:
    named = entry.get("sources") or {}
    single = {
        key.replace("_", " "): value for key, value in entry.items() if "source" in key and isinstance(value, str)
    }
    if kind == "prices":
        cells = [[_cell(value) for value in row.values()] for row in price_rows(name)]
        yield f"\n## {name}\n\n" + _table(list(price_rows(name)[0]), cells)
    elif named or single:
        yield f"\n## {name}\n\n"
        yield _table(["figure", "source"], [[_cell(key), _cell(value)] for key, value in {**single, **named}.items()])


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:,}" if isinstance(value, int | float) else str(value)
    return _escaped(text).replace("*", "\\*")


def _table(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table; a cell is one line, in which bars are text."""
    lines = [head, ["---"] * len(head), *body]
    return "".join(
        f"| {' | '.join(' '.join(cell.replace('|', chr(92) + '|').split()) for cell in line)} |\n" for line in lines
    )
