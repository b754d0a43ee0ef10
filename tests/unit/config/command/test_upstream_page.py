from __future__ import annotations

import re

from miles.config.command.upstream_page import upstream_page
from miles.upstream.table import upstream_flags


def test_every_flag_is_on_the_page_once_as_what_it_is() -> None:
    _head, *sections = re.split(r"^## ", upstream_page(), flags=re.MULTILINE)
    flags_of = {text.partition("\n")[0]: re.findall(r"`([\w*-]+)`", text) for text in sections}
    listed = [flag for title in ("Settings", "Accepted, without effect") for flag in flags_of[title]]
    refused = re.findall(r"^\|((?: `[\w*-]+`)+) \|", next(s for s in sections if s.startswith("Refused")), re.MULTILINE)
    listed += [flag for cell in refused for flag in re.findall(r"`([\w*-]+)`", cell)]
    assert sorted(listed) == sorted({row.flag for row in upstream_flags()})


def test_the_counts_add_up() -> None:
    counts = [int(number) for number in re.findall(r"\| (\d+) \|$", upstream_page(), re.MULTILINE)[:6]]
    settings, _, _, no_effect, refused, total = counts
    assert settings + no_effect + refused == total == len({row.flag for row in upstream_flags()})
