"""The reference page and the help text, written from the models."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from miles.config.command.compatibility import DIFFERENT_CHOICES, DIFFERENT_DEFAULTS
from miles.config.command.flags import opposite
from miles.config.schema.catalog import SECTIONS, Entry, catalog, passthroughs
from miles.config.schema.faults import show

_INTRODUCTION = """\
<!-- Written by `miles config docs`; change the models in miles/config, not this page. -->

# Configuration

A setting has one name in three spellings: the flag `--rollout-batch-size 64`, the line `rollout_batch_size: 64` of a
YAML file, and the key `"rollout_batch_size"` of a REST body. Files and bodies are flat. A name that does not exist is
refused, with the nearest one that does.

- `--config FILE` reads a YAML file. It can be repeated; a later file wins over an earlier one, and a flag over files.
- `--dry-run` prints every process that would run, with its command line and its settings, and starts nothing.
- A switch is given alone: `--use-kl-loss`. Every switch has an opposite with `--no-` in front, to undo what a file
  says.
- A switch called `--disable-…` turns off the setting whose name is given below it; files and bodies use that name.
- A list takes several values, `--rollout-stop a b`, and grows when its flag is repeated. In a file it is a YAML list.
- A JSON setting takes a JSON object in quotes; in a file it is a mapping.
- `--flag=value` gives a value that begins with two dashes.
- `null` in a file or body means the same as leaving the setting out.

A value shown as → is filled in when it is not given. Four settings are tied together:
`rollout_batch_size × n_samples_per_prompt = global_batch_size × num_steps_per_rollout`. What is missing is filled in;
four that do not agree are refused.

Everything that is wrong with a configuration is reported at once: the setting, its value, why that cannot be, and what
to do about it.
"""

_PASSTHROUGH = """\
Flags that begin with `{flag}` go to a program with flags of its own. An engine that has none refuses them.
"""

_COMPATIBILITY = """\
## Recipes from elsewhere

Names, types and defaults are those that slime and miles recipes use. A flag whose feature is not there yet is unknown
here, not ignored. These defaults differ:

{differences}

These can be set to other values than there:

{choices}
"""


def reference_page() -> str:
    """docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section, model in SECTIONS.items():
        parts.append(f"## {section.capitalize()}\n\n{(model.__doc__ or '').strip()}\n")
        parts.append("| flag | value | default | meaning |\n|---|---|---|---|\n" + "\n".join(_rows(section)) + "\n")
        for prefix, (owner, _) in passthroughs().items():
            if owner == section:
                parts.append(_PASSTHROUGH.format(flag="--" + prefix.replace("_", "-")))
    differences = "\n".join(f"- `{key}`: {why}" for key, why in DIFFERENT_DEFAULTS.items())
    choices = "\n".join(f"- `{key}`: {what}" for key, what in DIFFERENT_CHOICES.items())
    parts.append(_COMPATIBILITY.format(differences=differences, choices=choices))
    return "\n".join(parts)


def help_text() -> str:
    """What `--help` prints: every flag by section."""
    parts = [
        "A switch is undone with --no- in front. --config FILE reads settings from YAML; --dry-run starts nothing."
    ]
    for section in SECTIONS:
        parts.append(f"\n{section}:")
        for entry in _entries(section):
            default = _default(entry)
            text = entry.help + (f" [{default}]" if default else "")
            parts.append(f"  {entry.flag} {entry.metavar}".rstrip())
            parts.append(textwrap.fill(text, width=100, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(parts) + "\n"


def _entries(section: str) -> list[Entry]:
    return [entry for entry in catalog().values() if entry.section == section]


def _rows(section: str) -> Iterator[str]:
    for entry in _entries(section):
        flag = f"`{entry.flag}`"
        if entry.kind is bool and entry.default is True:
            flag += f"<br>sets `{entry.key}` to false" if entry.negated else f"<br>`{opposite(entry.flag)}`"
        cells = (flag, _value(entry), _default(entry), entry.help)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(entry: Entry) -> str:
    if entry.choices:
        return ", ".join(f"`{choice}`" for choice in entry.choices)
    return f"`{entry.metavar}`" if entry.metavar else "switch"


def _default(entry: Entry) -> str:
    if entry.derived:
        return f"→ {entry.derived}"
    if entry.kind is bool:
        return "on" if entry.default else "off"
    return "" if entry.default in (None, (), {}) else show(entry.default)
