"""Griffe reads docstrings for the reference: what they have of reStructuredText becomes Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

LITERAL = re.compile(r"^(.*)::\n\n((?:[ ]+.*\n|\n)+)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


class Markdown(griffe.Extension):
    """``Equivalent to::`` with what follows becomes a highlighted block, and a role the name that it holds."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = LITERAL.sub(_fenced, obj.docstring.value + "\n")
            obj.docstring.value = ROLE.sub(r"`\1`", text).rstrip()


def _fenced(found: re.Match[str]) -> str:
    lead = f"{found[1]}&#58;" if found[1] else ""  # a colon that does not open a section of Google's style
    return f"{lead}\n\n```python\n{textwrap.dedent(found[2]).strip()}\n```\n\n"
