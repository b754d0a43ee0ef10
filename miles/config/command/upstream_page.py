"""The page docs/flags.md: what becomes of each flag of miles and slime, from the table of flags and the settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from miles.config.command.compatibility import DIFFERENT_CHOICES, DIFFERENT_DEFAULTS
from miles.config.schema.catalog import Entry, catalog
from miles.config.schema.faults import show
from miles.config.sglang import tables
from miles.config.sglang.server_flags import server_flags
from miles.upstream.table import UpstreamFlag, upstream_flags

_INTRODUCTION = """\
<!-- Written by `miles config docs --page flags`; change miles/upstream/flags.tsv and the settings, not this page. -->

# Flags of miles and slime

What becomes of the flags that launch scripts of miles and slime pass, those of Megatron-LM among them. The table is
`miles/upstream/flags.tsv`. [`miles migrate`](migrating.md) writes the command for here from a script.

| | flags |
|---|---|
| settings here, with the same name, type and meaning | {settings} |
| of these, with another default or other choices | {different} |
| of these, which only state what is so anyway | {states} |
| accepted, with a note that they change nothing | {no_effect} |
| refused, with the reason and a way out | {refused} |
| all | {all} |

Besides these, `--sglang-…` takes all {sglang} flags of SGLang's server ([which are taken otherwise](sglang.md)).
"""


def upstream_page() -> str:
    """Return the text of docs/flags.md."""
    rows = list({row.flag: row for row in upstream_flags()}.values())
    settings = [row for row in rows if not row.taken]
    refused = [row for row in rows if row.taken == "refused"]
    no_effect = [row for row in rows if row.taken == "no effect"]
    entries = [(row, _entry(row)) for row in settings]
    different = [entry for _, entry in entries if entry.key in {*DIFFERENT_DEFAULTS, *DIFFERENT_CHOICES}]
    states = [entry for _, entry in entries if entry.states is not None]
    parts = [
        _INTRODUCTION.format(
            settings=len(settings),
            different=len(different),
            states=len(states),
            no_effect=len(no_effect),
            refused=len(refused),
            all=len(rows),
            sglang=len(server_flags()),
        )
    ]
    parts.append("## Other defaults and choices\n\n" + _table("flag | here", _differences(different)))
    parts.append("## Only stated\n\n" + _table("flag | accepted value | because", _statements(states)))
    parts.append("## Accepted, without effect\n\n" + _table("flags | because", _reasons(no_effect, with_remedy=False)))
    parts.append("## Refused\n\n" + _table("flags | because | instead", _reasons(refused, with_remedy=True)))
    renamed = ((_code(old), _code(new)) for old, new in tables.RENAMED.items())
    parts.append("## Renamed in SGLang\n\n" + _table("`--sglang-…` | taken as", renamed))
    parts.append("## Settings\n\n" + _table("group | flags", _groups(settings)))
    return "\n".join(parts)


def _entry(row: UpstreamFlag) -> Entry:
    return next(entry for entry in catalog().values() if row.flag in (entry.flag, entry.key))


def _table(head: str, rows: Iterable[Sequence[str]]) -> str:
    columns = head.count(" | ") + 1
    lines = [f"| {head} |", "|" + "---|" * columns]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _differences(entries: Iterable[Entry]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        texts = []
        if entry.key in DIFFERENT_DEFAULTS:
            texts.append(f"default: {DIFFERENT_DEFAULTS[entry.key]}")
        if entry.key in DIFFERENT_CHOICES:
            texts.append(f"choices: {DIFFERENT_CHOICES[entry.key]}")
        yield _code(entry.flag), "; ".join(texts)


def _statements(entries: Iterable[Entry]) -> Iterator[tuple[str, str, str]]:
    for entry in entries:
        if entry.states is not None:
            yield _code(entry.flag), show(entry.states.value), entry.states.because


def _reasons(rows: Iterable[UpstreamFlag], *, with_remedy: bool) -> Iterator[Sequence[str]]:
    """Put flags with the same reason into one line."""
    grouped: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        grouped.setdefault((row.reason, row.remedy), []).append(_code(row.flag))
    for (reason, remedy), flags in grouped.items():
        yield (" ".join(flags), reason, remedy) if with_remedy else (" ".join(flags), reason)


def _groups(rows: Iterable[UpstreamFlag]) -> Iterator[tuple[str, str]]:
    grouped: dict[str, list[str]] = {}
    for row in rows:
        grouped.setdefault(row.group, []).append(_code(row.flag))
    for group, flags in grouped.items():
        yield group, " ".join(flags)


def _code(flag: str) -> str:
    return f"`{flag}`"
