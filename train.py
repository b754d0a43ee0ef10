"""Post-train a model on this machine: `python train.py --hf-checkpoint … --prompt-data … --rollout-batch-size …`.

`python train.py --help` lists the flags; docs/configuration.md explains them.
"""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load, Ctrl-C ends the program without a traceback
    from miles.launcher.main import main

    sys.exit(main())
