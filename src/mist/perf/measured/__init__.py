"""Operator times measured on real devices: the tables of the PyPI package aiconfigurator-core, to interpolate.

A performance model asks `OperatorTables` for a family of one system; it is converted from Parquet once and cached.
Only the package's data files are read: its code is never imported, and nothing here knows of models or steps.
"""

from mist.perf.measured.families import BY_NAME, FAMILIES, Family
from mist.perf.measured.grid import EXTRAPOLATED, INTERPOLATED, MEASURED, Estimate, RaggedGrid
from mist.perf.measured.package import SYSTEMS, find_tables
from mist.perf.measured.tables import OperatorTables, Table

__all__ = [
    "BY_NAME", "EXTRAPOLATED", "FAMILIES", "INTERPOLATED", "MEASURED", "SYSTEMS", "Estimate", "Family",
    "OperatorTables", "RaggedGrid", "Table", "find_tables",
]  # fmt: skip
