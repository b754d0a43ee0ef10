"""Reads YAML files of settings: one flat mapping in which every key is unique."""

from __future__ import annotations

import pathlib
from collections.abc import Hashable
from typing import Any

import yaml

from miles.config.schema.faults import Fault


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses duplicate keys, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key_node.value} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def read_file(path: str) -> tuple[dict[str, Any], list[Fault]]:
    """Return the settings of a YAML (or JSON) file, and the faults of the file itself."""
    try:
        content = yaml.load(pathlib.Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        return {}, [Fault("--config", path, f"it cannot be read ({error.strerror})", "check the path")]
    except UnicodeDecodeError:
        return {}, [Fault("--config", path, "it is not UTF-8 text", "give a YAML file")]
    except yaml.YAMLError as error:
        return {}, [Fault("--config", path, f"it is not YAML: {' '.join(str(error).split())}", "correct it")]
    if content is None:
        return {}, []
    if not isinstance(content, dict):
        return {}, [Fault("--config", path, "it must map setting names to values", "write lines like lr: 1.0e-6")]
    faults = [
        Fault("--config", path, f"its key {key!r} is not text", "use setting names as keys")
        for key in content
        if not isinstance(key, str)
    ]
    return {key: value for key, value in content.items() if isinstance(key, str)}, faults
