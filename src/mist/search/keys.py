"""By what a run is known again: all that its figures depend on, as one short text.

Between the laboratory and its store. A resolved scenario names entries of the catalogue and files, so what these hold
is in the key too: a changed price or device asks for new runs. It never reads what a scenario doesn't name.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mist import __version__, registry
from mist.perf.measured import find_tables
from mist.scenario import catalogue


def run_key(resolved: Mapping[str, Any], overrides: Mapping[str, Any]) -> str:
    """The key of a run: 32 hexadecimal digits."""
    parts = [
        __version__,
        str(find_tables()),
        [_digest_of_file(path, _time_of(path)) for path in registry.plugin_files()],
        resolved,
        overrides,
        contents_of(resolved),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def contents_of(resolved: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what a resolved scenario names: of entries that ship with MIST, and of files."""
    found = {}
    for text in sorted(set(_texts(resolved))):
        if digest := catalogue.digest(text):
            found[text] = digest
        elif ("." in text or os.sep in text) and os.path.isfile(text):
            found[text] = _digest_of_file(text, _time_of(text))
    return found


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for key, inner in data.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(data, list | tuple):
        for inner in data:
            yield from _texts(inner)


def _time_of(path: str) -> int:
    return os.stat(path).st_mtime_ns


@functools.lru_cache(maxsize=64)
def _digest_of_file(path: str, _changed_ns: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
