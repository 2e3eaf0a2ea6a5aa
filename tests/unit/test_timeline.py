"""Phase timelines against hand-computed ones, and their promises under random progress."""

from hypothesis import given
from hypothesis import strategies as st

from pascal_sglang.policy.timeline import Phase, PhaseTimeline, Progress


def run(steps, arrival=10.0):
    timeline = PhaseTimeline(arrival=arrival)
    for now, output, reasoning, thinking in steps:
        timeline.observe(now, Progress(output, reasoning, thinking))
    return timeline


def test_a_thinking_request_by_hand():
    timeline = run(
        [
            (10.5, 1, 1, True),
            (11.0, 2, 2, True),
            (12.0, 3, 3, False),  # the end-of-thinking token
            (12.5, 4, 3, False),
            (13.5, 6, 3, False),  # two tokens in one pass
        ]
    )
    assert timeline.phase is Phase.ANSWERING
    assert timeline.ttft == 0.5
    assert timeline.reasoning_time == 1.5
    assert timeline.ttfo == 2.5
    assert timeline.answer_tokens == 3
    assert timeline.answer_tpot == 0.5


def test_a_request_that_does_not_think_is_reasoning_until_its_first_token():
    timeline = run([])
    assert timeline.phase is Phase.REASONING
    timeline.observe(11.0, Progress(1, 0, False))
    assert timeline.phase is Phase.ANSWERING
    assert timeline.ttfo == timeline.ttft == 1.0
    assert timeline.reasoning_time is None
    assert timeline.answer_tpot is None


def test_thinking_that_never_ends_has_no_ttfo():
    timeline = run([(11.0, 1, 1, True), (12.0, 50, 50, True)])
    timeline.finish(12.0)
    assert timeline.phase is Phase.FINISHED
    assert timeline.ttfo is None
    assert timeline.reasoning_time is None
    assert (timeline.reasoning_tokens, timeline.answer_tokens) == (50, 0)


def test_thinking_and_answer_in_one_pass():
    timeline = run([(11.0, 8, 5, False)])
    assert timeline.ttft == timeline.ttfo == 1.0
    assert timeline.reasoning_time == 0.0
    assert timeline.answer_tokens == 3


def test_nothing_changes_after_the_end():
    timeline = run([(11.0, 2, 1, False)])
    timeline.finish(11.5)
    timeline.observe(12.0, Progress(9, 1, False))
    timeline.finish(13.0)
    assert timeline.answer_tokens == 1
    assert timeline.finished == 11.5


def test_breaks_end_when_the_request_goes_on_or_ends():
    timeline = run([(11.0, 2, 1, False)])
    timeline.went_on(11.1)
    assert timeline.breaks == []
    timeline.stopped("paused", 11.5)
    assert timeline.breaks[-1].end is None
    timeline.went_on(12.0)
    timeline.went_on(12.5)
    timeline.stopped("paused", 13.0)
    timeline.stopped("moved", 13.5)
    timeline.finish(14.0)
    assert [(b.kind, b.start, b.end) for b in timeline.breaks] == [
        ("paused", 11.5, 12.0),
        ("paused", 13.0, 13.5),
        ("moved", 13.5, 14.0),
    ]


@given(
    thinking=st.integers(0, 30),
    answering=st.integers(0, 30),
    pace=st.lists(st.integers(1, 4), min_size=1),
    gaps=st.lists(st.floats(0, 5), min_size=1),
    repeat=st.booleans(),
)
def test_times_are_ordered_and_counts_exact(thinking, answering, pace, gaps, repeat):
    timeline, now, done, step = PhaseTimeline(arrival=1.0), 1.0, 0, 0
    while done < thinking + answering:
        done = min(thinking + answering, done + pace[step % len(pace)])
        now += gaps[step % len(gaps)]
        step += 1
        progress = Progress(done, min(done, thinking), done < thinking)
        timeline.observe(now, progress)
        if repeat:
            timeline.observe(now + 0.5, progress)
    timeline.finish(now)
    assert timeline.reasoning_tokens == thinking
    assert timeline.answer_tokens == answering
    times = [
        timeline.arrival,
        timeline.first_token,
        timeline.reasoning_end,
        timeline.first_answer,
        timeline.last_answer,
    ]
    reached = [t for t in times if t is not None]
    assert reached == sorted(reached)
    assert (timeline.ttfo is not None) == (answering > 0)
