"""The reference page docs/configuration.md and the help text, generated from the models."""

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

A setting has the same name everywhere: as the flag `--rollout-batch-size 64`, as the line `rollout_batch_size: 64` in a
YAML file, and as the key `"rollout_batch_size"` in a REST body. Files and bodies are flat. An unknown name is refused,
and a setting with a close name, or that other systems call so, is suggested.

- `--config FILE` reads a YAML file. It is repeatable; a later file overrides an earlier one, and flags override files.
  Plain words are read as on the command line: `1e-6` is a number, `yes` and `no` are values of a switch.
- `--dry-run` prints every process that would be started, with its command line and settings, and starts nothing.
  `--assume-gpus 8,8` plans it for two nodes of 8 GPUs instead of this machine (docs/machines.md).
- A switch takes no value: `--use-kl-loss`. Its opposite has the prefix `--no-` and overrides a file.
- A switch `--disable-…` turns off the setting named below it; files and bodies use the name of the setting.
- A list takes several values, `--rollout-stop a b`; a repeated flag appends. In a file it is a YAML list. Of another
  flag that is given twice, the last one counts.
- `--no-…` leaves out a setting that has a value, whatever a file says: `--no-rm-type`, `--no-save`.
- A JSON setting takes a quoted JSON object; in a file it is a mapping.
- `--flag=value` allows a value that begins with two dashes.
- `null` in a file or body is the same as leaving the setting out, also where an earlier file has a value. So is the
  text None, of a flag too, for a setting that has no value by default.
- Whole numbers may be written as 1000, 1_000 or 1e3; `4k` is refused. `~` and `$NAME` in paths are expanded by a shell
  alone, and refused here.

A default shown as → is derived when the setting is not given. Four settings depend on each other:
`rollout_batch_size × n_samples_per_prompt = global_batch_size × num_steps_per_rollout`. Missing ones are derived;
values that contradict each other are refused.

All faults of a configuration are reported at once: the setting, its value, the problem, and the remedy.
"""

_PASSTHROUGH = """\
Flags that begin with `{flag}` are passed to the engine under its own names. An engine without such flags refuses them.
"""

_COMPATIBILITY = """\
## Recipes of other systems

Names, types and defaults are those of slime and miles recipes. A flag whose feature is not implemented is refused, not
ignored. These defaults differ:

{differences}

The possible values of these differ:

{choices}
"""


def reference_page() -> str:
    """Return the text of docs/configuration.md."""
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


def help_text(width: int | None) -> str:
    """Return what `--help` prints: every flag by section, in lines of `width` columns; None breaks no line."""
    parts = [
        "--no-… turns a switch off, and leaves out any other setting that a file has.\n"
        "--config FILE reads settings from YAML; --dry-run starts nothing, and plans for --assume-gpus 8,8 if given."
    ]
    for section in SECTIONS:
        parts.append(f"\n{section}:")
        for entry in _entries(section):
            default = _default(entry)
            text = _meaning(entry) + (f" [{default}]" if default else "")
            parts.append(f"  {entry.flag} {entry.metavar}".rstrip())
            parts.append(wrapped(text, width, indent=6))
    return "\n".join(parts) + "\n"


def wrapped(text: str, width: int | None, indent: int = 0) -> str:
    """Return a paragraph with lines of at most `width` columns; on one line without a limit."""
    space = " " * indent
    if width is None:
        return space + text
    return textwrap.fill(text, max(20, width), initial_indent=space, subsequent_indent=space)


def _entries(section: str) -> list[Entry]:
    return [entry for entry in catalog().values() if entry.section == section]


def _rows(section: str) -> Iterator[str]:
    for entry in _entries(section):
        flag = f"`{entry.flag}`"
        if entry.kind is bool and entry.default is True:
            flag += f"<br>sets `{entry.key}` to false" if entry.negated else f"<br>`{opposite(entry.flag)}`"
        cells = (flag, _value(entry), _default(entry), _meaning(entry))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meaning(entry: Entry) -> str:
    if entry.states is not None:
        return f"{entry.help} Accepted as {show(entry.states.value)} alone: {entry.states.because}."
    if entry.ignored is not None:
        return f"{entry.help} Changes nothing: {entry.ignored.because}."
    return entry.help


def _value(entry: Entry) -> str:
    if entry.choices:
        return ", ".join(f"`{choice}`" for choice in entry.choices)
    return f"`{entry.metavar}`" if entry.metavar else "switch"


def _default(entry: Entry) -> str:
    if entry.derived:
        return f"→ {entry.derived}"
    if entry.kind is bool:
        return {None: "", True: "on", False: "off"}[entry.default]
    return "" if entry.default in (None, (), {}) else show(entry.default)
