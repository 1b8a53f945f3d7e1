"""``resnet-fused bench`` with the results of this repository: rows go to bench/results, and only from here.

python bench/run.py --suite kernels blocks models training --batch 1 8 32 --dtype float32 bfloat16
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from resnet_fused.cli import main as resnet_fused

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    return resnet_fused(["bench", "--results", str(RESULTS), *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
