"""A held chunk comes out as it was, though SGLang's lists in it went on growing."""

from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.streaming.held_chunks import Holder


def cumulative(pieces):
    """Chunks as SGLang makes them: text so far, and one live list each of ids and logprobs."""
    ids, logprobs, text = [], [], ""
    for number, piece in enumerate(pieces):
        text += piece
        ids.append(number)
        logprobs.append([-0.5, number, None])
        meta = {"id": "r", "output_token_logprobs": logprobs, "completion_tokens": len(ids)}
        yield {"text": text, "output_ids": ids, "meta_info": meta}


@given(st.lists(st.text(max_size=3), max_size=12))
def test_a_cumulative_stream(pieces):
    holder = Holder()
    held = [holder.hold(c) for c in cumulative(pieces)]
    for n, chunk in enumerate((h.as_it_was() for h in held), start=1):
        assert list(chunk) == ["text", "output_ids", "meta_info"]
        assert chunk["text"] == "".join(pieces[:n])
        assert chunk["output_ids"] == list(range(n))
        assert len(chunk["meta_info"]["output_token_logprobs"]) == n


@given(st.lists(st.text("ab", max_size=2), max_size=12))
def test_an_incremental_stream(pieces):
    """Increments that happen to begin like the ones before them included."""
    holder = Holder()
    chunks = [{"text": p, "output_ids": [n], "meta_info": {}} for n, p in enumerate(pieces)]
    held = [holder.hold(c) for c in chunks]
    assert [h.as_it_was() for h in held] == chunks


def test_ids_that_came_before_the_chunk_could_be_held_are_not_its_own():
    chunk = {"text": "ab", "output_ids": [1, 2, 3], "meta_info": {"completion_tokens": 2}}
    assert Holder().hold(chunk).as_it_was()["output_ids"] == [1, 2]


def test_the_text_of_a_cumulative_stream_is_kept_once():
    holder = Holder()
    held = [holder.hold(c) for c in cumulative(["word "] * 100)]
    assert all(h.chunk["text"] is None for h in held)
    assert len({id(h.text) for h in held}) == 1


def test_the_original_stays_untouched():
    """SGLang keeps the last chunk of a request for its crash dump."""
    original = {"text": "end", "output_ids": [1], "meta_info": {"id": "r"}}
    Holder().hold(original)
    assert original == {"text": "end", "output_ids": [1], "meta_info": {"id": "r"}}


def test_chunks_without_text_or_meta_pass():
    holder = Holder()
    for chunk in ({"output_ids": [1, 2]}, {"embedding": [0.1]}, {"meta_info": None}):
        assert holder.hold(chunk).as_it_was() == chunk
