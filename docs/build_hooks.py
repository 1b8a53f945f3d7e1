"""What MkDocs needs besides Markdown: help of the command line, and the few reStructuredText marks of docstrings."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["COLUMNS"] = "88"  # the width that argparse wraps at
COMMAND = re.compile(r"^\{\{ help: (\w+) \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the help of a command where a page has ``{{ help: COMMAND }}``."""
    return COMMAND.sub(lambda found: f"```text\n{_help(found[1])}```", markdown)


def _help(name: str) -> str:
    from resnet_fused.cli import parser

    top = parser()
    if name == "all":
        return top.format_help()
    commands = next(a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    return str(commands.choices[name].format_help())
