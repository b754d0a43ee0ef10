"""How data/ was made: sums and differences of two one-digit numbers, from reasoning-gym's `chain_sum`.

pip install reasoning-gym==0.1.25                               # some of its dependencies need a C compiler
python -m examples.smollm2_chain_sum.make_prompts               # write them again
python -m examples.smollm2_chain_sum.make_prompts --check       # compare with what is there
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

DATA = pathlib.Path(__file__).resolve().parent / "data"
FILES = {"train.jsonl": (512, 7), "eval.jsonl": (64, 12345)}
"""Number of prompts and seed of each file. Only about 200 different problems exist."""


def prompts(count: int, seed: int) -> str:
    """JSON lines with the columns prompt (chat messages), label and metadata."""
    import reasoning_gym

    items = reasoning_gym.create_dataset(
        "chain_sum", size=count, seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": item["question"]}],
            "label": item["answer"],
            "metadata": {"expression": item["metadata"]["expression"]},
        }
        for item in items
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write or check the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the files are what would be written")
    check = parser.parse_args().check
    for name, (count, seed) in FILES.items():
        text = prompts(count, seed)
        if not check:
            (DATA / name).write_text(text)
        elif (DATA / name).read_text() != text:
            sys.exit(f"{DATA / name} is not what make_prompts writes")


if __name__ == "__main__":
    main()
