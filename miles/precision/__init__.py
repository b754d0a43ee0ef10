"""Number types and low-precision formats: one quantiser for training, export, conversion, engines and checks.

Number types: which ones a machine is fast in and which ones a run uses (`number_types`, the decision, and `speed`,
which measures). Formats: what is held or computed with in few bits. `recipe` says how and which of a model's matrices,
and `quantization_config` reads and writes what Hugging Face folders say of it, both without PyTorch; `base` has the
Protocol of a format, `registry` its implementations, and `rounding` what training computes with. The package knows no
service and no model.
"""
