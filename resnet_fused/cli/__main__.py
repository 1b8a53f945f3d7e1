"""``python -m resnet_fused.cli``: the command line where its script is not installed."""

import sys

from resnet_fused.cli import main

sys.exit(main())
