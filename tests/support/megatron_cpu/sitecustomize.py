"""Put this folder on PYTHONPATH and a Python process runs megatron-core on the CPU; see the modules beside it."""

import logging
import os
import sys
import warnings

# Of multiprocessing's own processes, which Megatron-Core starts to write checkpoints, none computes.
of_multiprocessing = any("from multiprocessing" in word for word in sys.orig_argv)
if os.environ.get("MILES_TEST_MEGATRON_CPU") and not of_multiprocessing:
    warnings.filterwarnings("ignore")
    import cuda_stand_ins  # noqa: F401  (first of all)
    from absent_packages import install_transformer_engine, install_triton

    install_triton()
    import megatron.core  # noqa: F401  (finds out that TransformerEngine is not there)
    import megatron_fixes

    install_transformer_engine()
    megatron_fixes.install()
    logging.getLogger("megatron").setLevel(logging.ERROR)
