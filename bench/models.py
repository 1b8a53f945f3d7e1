"""The model table: torchvision's ResNets, eager in both layouts and fused, in turns in one process.

    python bench/models.py --batch 1 8 32 --dtype float32 bfloat16

The options are those of run.py, with this suite and these contenders for defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import run

CONTENDERS = ("eager NCHW", "eager channels_last", "fused")


def main(argv: Sequence[str] | None = None) -> int:
    options = run.parser(__doc__ or "", ("models",), (1, 8, 32))
    options.set_defaults(contender=list(CONTENDERS))
    return run.execute(options.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
