"""Write miles/rpc/gen and protos/fields.lock from protos/, or check that they are up to date.

protoc names Python modules after the .proto's path (miles/v1/x.proto becomes miles.v1.x_pb2); the stubs live in
miles.rpc.gen instead, so the imports between them are rewritten. The lock refuses changes that would give a field
number a second meaning.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import re
import sys
import tempfile

import field_lock
import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
LOCK = PROTOS / "fields.lock"
GENERATED = ROOT / "miles" / "rpc" / "gen"
WELL_KNOWN = pathlib.Path(grpc_tools.__file__).parent / "_proto"


def compile_protos(*arguments: str, protos: pathlib.Path = PROTOS) -> None:
    """Run protoc with these arguments over every .proto below a folder."""
    sources = [str(path) for path in sorted(protos.rglob("*.proto"))]
    if protoc.main(["protoc", f"-I{protos}", f"-I{WELL_KNOWN}", *arguments, *sources]) != 0:
        raise SystemExit("protoc failed")


def generate() -> dict[str, str]:
    """Text by file name of the package miles.rpc.gen."""
    files = {"__init__.py": '"""Stubs generated from protos/ by tools/gen_protos.py; do not edit."""\n'}
    with tempfile.TemporaryDirectory() as scratch:
        compile_protos(
            f"--python_out={scratch}",
            f"--mypy_out=quiet:{scratch}",
            f"--grpc_python_out={scratch}",
            f"--mypy_grpc_out=quiet:{scratch}",
        )
        for path in sorted(pathlib.Path(scratch).rglob("*.py*")):
            text = path.read_text()
            text = re.sub(r"^from miles\.v1 import", "from miles.rpc.gen import", text, flags=re.M)
            files[path.name] = re.sub(r"\bmiles\.v1\.(\w+_pb2)\b", r"miles.rpc.gen.\1", text)
    return files


def describe(protos: pathlib.Path = PROTOS) -> list[descriptor_pb2.FileDescriptorProto]:
    """Descriptors, with their comments, of every .proto below a folder."""
    with tempfile.TemporaryDirectory() as scratch:
        out = pathlib.Path(scratch, "descriptors.pb")
        compile_protos("--include_source_info", f"--descriptor_set_out={out}", protos=protos)
        return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def locked_text() -> str:
    """The text that protos/fields.lock should have; exits naming what breaks older messages."""
    locked = field_lock.parse_lock(LOCK.read_text() if LOCK.exists() else "")
    try:
        return field_lock.format_lock(field_lock.update_lock(locked, field_lock.read_contracts(describe())))
    except ValueError as error:
        raise SystemExit(f"protos/ breaks messages of older programs:\n{error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is checked in, change nothing")
    check = parser.parse_args().check
    # protoc finds its plug-ins on PATH; they lie beside the interpreter, which need not be on it.
    os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ.get("PATH", "")])

    wanted = {GENERATED / name: text for name, text in generate().items()} | {LOCK: locked_text()}
    present = {*GENERATED.glob("*.py*"), *([LOCK] if LOCK.exists() else [])}
    different = {path for path in wanted if path not in present or path.read_text() != wanted[path]}
    stale = present - set(wanted)
    if check and (different or stale):
        names = ", ".join(str(path.relative_to(ROOT)) for path in sorted(different | stale))
        sys.exit(f"not what protos/ gives: {names}; run `python tools/gen_protos.py`")
    if not check:
        GENERATED.mkdir(parents=True, exist_ok=True)
        for path in different:
            path.write_text(wanted[path])
        for path in stale:
            path.unlink()


if __name__ == "__main__":
    main()
