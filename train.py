"""Post-train a model on this machine: `python train.py --hf-checkpoint … --prompt-data … --rollout-batch-size …`.

`python train.py --help` lists the flags; docs/configuration.md explains them.
"""

from __future__ import annotations

import sys

from miles.launcher.main import main

if __name__ == "__main__":
    sys.exit(main())
