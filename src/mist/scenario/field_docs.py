"""What the docstring below a field says: the field's help, read from its section's source when somebody asks.

Below the sections, whose messages and JSON Schema show it. pydantic would read every section's source on import, which
each start would pay for; that is why it isn't asked to. This never looks at values.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from itertools import pairwise


@functools.cache
def field_docs(section: type) -> Mapping[str, str]:
    """The docstrings below a class's own annotated fields, by field; empty where its source can't be read."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    except (OSError, TypeError):  # a class that was made, not written
        return {}
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
    }
