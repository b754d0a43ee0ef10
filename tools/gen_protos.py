"""Write miles/rpc/gen from protos/, or check that it is up to date.

protoc names Python modules after the .proto's path (miles/v1/x.proto becomes miles.v1.x_pb2); the stubs live in
miles.rpc.gen instead, so the imports between them are rewritten.
"""

from __future__ import annotations

import argparse
import filecmp
import os
import pathlib
import re
import shutil
import sys
import tempfile

import grpc_tools
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "miles" / "rpc" / "gen"
WELL_KNOWN = pathlib.Path(grpc_tools.__file__).parent / "_proto"


def generate(out: pathlib.Path) -> None:
    """Compile every .proto below PROTOS into the flat package folder out."""
    sources = sorted(PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = ["protoc", f"-I{PROTOS}", f"-I{WELL_KNOWN}", f"--python_out={scratch}", f"--mypy_out=quiet:{scratch}"]
        arguments += [f"--grpc_python_out={scratch}", f"--mypy_grpc_out=quiet:{scratch}", *map(str, sources)]
        if protoc.main(arguments) != 0:
            raise SystemExit("protoc failed")
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted(pathlib.Path(scratch).rglob("*.py*")):
            text = path.read_text()
            text = re.sub(r"^from miles\.v1 import", "from miles.rpc.gen import", text, flags=re.M)
            text = re.sub(r"\bmiles\.v1\.(\w+_pb2)\b", r"miles.rpc.gen.\1", text)
            (out / path.name).write_text(text)
    (out / "__init__.py").write_text('"""Stubs generated from protos/ by tools/gen_protos.py; do not edit."""\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is checked in, change nothing")
    # protoc finds its plug-ins on PATH; they lie beside the interpreter, which need not be on it.
    os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])
    if not parser.parse_args().check:
        with tempfile.TemporaryDirectory() as fresh:
            generate(pathlib.Path(fresh))
            shutil.rmtree(GENERATED, ignore_errors=True)
            shutil.copytree(fresh, GENERATED)
        return
    with tempfile.TemporaryDirectory() as fresh:
        generate(pathlib.Path(fresh))
        names = {p.name for p in pathlib.Path(fresh).iterdir()} | {p.name for p in GENERATED.glob("*.py*")}
        _, different, missing = filecmp.cmpfiles(fresh, GENERATED, sorted(names), shallow=False)
    if different or missing:
        sys.exit(f"miles/rpc/gen does not match protos/: {sorted(different + missing)}; run `make protos`")


if __name__ == "__main__":
    main()
