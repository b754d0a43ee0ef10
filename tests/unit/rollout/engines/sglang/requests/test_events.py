from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles.services.rollout.engines.sglang.requests.events import DONE, EventSplitter


@given(texts=st.lists(st.text(alphabet="ab{}", max_size=12), max_size=6), data=st.data())
def test_events_come_out_whole_however_a_connection_cuts_them(texts: list[str], data: st.DataObject) -> None:
    wanted = [*(text.encode() for text in texts), DONE]
    stream = b"".join(b"data: " + text + b"\n\n" for text in wanted)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(stream)))))
    splitter = EventSplitter()
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    assert [found for piece in pieces for found in splitter.feed(piece)] == wanted


@given(cut=st.integers(0, 25))
def test_a_single_newline_ends_no_event(cut: int) -> None:
    stream = b"data: a\nb\n\ndata: \nc\n\n"
    splitter = EventSplitter()
    found = [each for piece in (stream[:cut], stream[cut:]) for each in splitter.feed(piece)]
    assert found == [b"a\nb", b"\nc"]
