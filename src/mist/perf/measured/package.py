"""Where the measured tables lie: the installed package's data folder, or a folder that the user names.

The package is found by its metadata and import path alone, never imported. Reads no table.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from mist.perf.measured.families import Family

DISTRIBUTION = "aiconfigurator-core"
PACKAGE = "aiconfigurator_core"
#: Overrides the installed package's tables with those in a folder of the same layout.
TABLES_VARIABLE = "MIST_KERNEL_TABLES"

#: Device of the catalogue -> system of the package: the same silicon, memory and links.
SYSTEMS: dict[str, str] = {
    "a100-sxm-80gb": "a100_sxm", "arc-pro-b60": "b60", "b200-sxm": "b200_sxm", "b300-sxm": "b300_sxm",
    "gb200": "gb200", "gb300": "gb300", "h100-sxm": "h100_sxm", "h200-sxm": "h200_sxm", "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TablesFolder:
    """A folder `<system>/<family>/<framework>/<version>/*.parquet`, and the package version that it belongs to."""

    path: Path
    version: str

    def systems(self) -> list[str]:
        return sorted(p.name for p in self.path.iterdir() if p.is_dir())

    def versions(self, system: str, family: Family, framework: str) -> list[str]:
        """Versions for which the family was measured, oldest first."""
        folder = self.path / system / family.folder / (family.library or framework)
        return sorted((p.parent.name for p in folder.glob(f"*/{family.file}.parquet")), key=version_key)

    def file(self, system: str, family: Family, framework: str, version: str) -> Path | None:
        """The family's table of `version`, else of the newest older one, else of the oldest; "" is the newest.

        A release stands for all that its numbers begin: 0.19 for 0.19.2, 1.3 for 1.3.0rc20, but 1.3.0rc10 for itself.
        """
        found = self.versions(system, family, framework)
        if not found:
            return None
        wanted = version_key(version)[:-1]
        older = [v for v in found if not version or family.library or version_key(v)[: len(wanted)] <= wanted]
        chosen = older[-1] if older else found[0]
        return self.path / system / family.folder / (family.library or framework) / chosen / f"{family.file}.parquet"


def find_tables(folder: str = "") -> TablesFolder | str:
    """The tables in `folder`, else those of MIST_KERNEL_TABLES, else the installed package's; or why there are none."""
    given = folder or os.environ.get(TABLES_VARIABLE, "")
    if given:
        path = Path(given).expanduser()
        return TablesFolder(path, "given") if path.is_dir() else f"there is no folder {given} with operator tables"
    try:
        spec = importlib.util.find_spec(PACKAGE)
        version = importlib.metadata.version(DISTRIBUTION)
    except (ImportError, ValueError, importlib.metadata.PackageNotFoundError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return f"the measured tables of {DISTRIBUTION} are not installed (pip install -e '.[kernels]' beside MIST)"
    path = Path(spec.submodule_search_locations[0]) / "systems" / "data"
    if not path.is_dir():
        return f"{DISTRIBUTION} {version} has no tables in {path}"
    return TablesFolder(path, version)


def version_key(version: str) -> tuple[tuple[int, str], ...]:
    """Sorts versions: numbers as numbers, a release candidate or other suffix before its release."""
    parts = re.findall(r"\d+|[a-z]+", version.lower())
    return (*((int(p), "") if p.isdigit() else (-1, p) for p in parts), (0, ""))
