"""The shell of a page: head, navigation, style and script, all in one text that asks no network for anything.

Sections come in as fragments; reports of other things than a run have the same shell. A policy in its head forbids
browsers to fetch anything, whatever is in a fragment.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from mist.report.html.markup import Child, Markup, el

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
#: the anchor and title of a section
_TITLE = re.compile(r'<h2 id="([^"]*)-title">(.*?)</h2>')


def page(title: str, kind: str, sections: Sequence[Markup], *, footer: Child = None, assets: Sequence[str] = ()) -> str:
    """A whole HTML document; `kind` stands over the title, and each section has a link in the navigation.

    `assets`: style sheets and scripts beside `report.css` and `report.js` that the sections need.
    """
    titles = [found for section in sections if (found := _TITLE.search(section))]
    links = [el("a", Markup(found[2]), href=f"#{found[1]}") for found in titles]
    head = el(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        el("title", f"{title} · {kind}"),
        el("style", Markup("".join(_asset(name) for name in ("report.css", *assets) if name.endswith(".css")))),
        # before anything is drawn: the colours that were chosen the last time
        el(
            "script",
            Markup("try{document.documentElement.dataset.theme=localStorage.getItem('mist-theme')||''}catch{}"),
        ),
    )
    switch = el("button", "Dark", type="button", id="theme", aria_label="Switch between light and dark")
    top = el("header", el("div", el("p", kind, class_="kind"), el("h1", title)), switch)
    navigation = el("nav", links, aria_label="Sections")
    body = el(
        "body",
        el("a", "Skip to the content", href="#content", class_="skip"),
        top,
        navigation,
        el("main", sections, id="content"),
        el("footer", footer) if footer else None,
        el("div", id="tip", role="tooltip", hidden=True),
        el("div", id="told", class_="unseen", aria_live="polite"),
        [el("script", Markup(_asset(name))) for name in ("report.js", *assets) if name.endswith(".js")],
    )
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def write_page(text: str, path: str | Path) -> Path:
    """Write a page to `path`; the file appears when it is whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _asset(name: str) -> str:
    return (files("mist.report.html") / name).read_text(encoding="utf-8")
