"""Griffe reads docstrings for the reference: what they have of reStructuredText becomes Markdown."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

LITERAL = re.compile(r"^(.*)::\n\n((?:[ ]+.*\n|\n)+)", re.MULTILINE)
SHARED = re.compile(r"^(    )(\w+)((?:, \w+)+): ((?:.*\n)(?: {5,}.*\n)*)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod):`~?([\w.]+)`")


class Markdown(griffe.Extension):
    """``Equivalent to::`` with what follows becomes a highlighted block, a role the name that it holds, and ``a, b: …``
    an entry for each argument, so that each has its type and default."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text, args, rest = (obj.docstring.value + "\n").partition("\nArgs:\n")
            body, blank, rest = rest.partition("\n\n")
            text = LITERAL.sub(_fenced, text + args + SHARED.sub(_apart, body + "\n" if body else "") + blank + rest)
            obj.docstring.value = ROLE.sub(r"`\1`", text).rstrip()


def _apart(found: re.Match[str]) -> str:
    others = "".join(f"{found[1]}{name}: see `{found[2]}`.\n" for name in found[3].lstrip(", ").split(", "))
    return f"{found[1]}{found[2]}: {found[4]}{others}"


def _fenced(found: re.Match[str]) -> str:
    lead = f"{found[1]}&#58;" if found[1] else ""  # a colon that does not open a section of Google's style
    return f"{lead}\n\n```python\n{textwrap.dedent(found[2]).strip()}\n```\n\n"
