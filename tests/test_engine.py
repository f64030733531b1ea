"""The engine: ids in, ids out, on a real (tiny) core model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitnet_rs import SamplingParams, _core
from bitnet_rs.engine import Engine, Event, Request, Running, check_ids, shared_prefix
from bitnet_rs.loaders import open_checkpoint

SAMPLED = SamplingParams(temperature=1.0, top_p=0.95, repetition_penalty=1.1, seed=7)
GREEDY = SamplingParams()
NO_TOKENS = np.array([], np.uint32)


@pytest.fixture(scope="module")
def core() -> _core.Model:
    checkpoint = open_checkpoint(Path(__file__).parent / "data" / "bitnet-packed")
    return _core.Model(checkpoint.core_config, checkpoint.weights, threads=2)


def prompt(n: int, seed: int = 0) -> NDArray[np.uint32]:
    return np.random.default_rng(seed).integers(0, 1021, n).astype(np.uint32)


def finish(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.busy:
        events += engine.step()
    return events


def alone(core: _core.Model, request: Request) -> list[int]:
    engine = Engine(core)
    sequence = engine.add(request)
    finish(engine)
    return sequence.tokens


def requests() -> Iterator[Request]:
    """Requests of all sorts: short and long prompts, greedy and sampled, long and short answers."""
    for i, n in enumerate((1, 5, 40, 130, 3)):
        yield Request(prompt(n, i), 4 + 3 * i, SAMPLED if i % 2 else GREEDY)


@given(st.lists(st.integers(0, 2), max_size=9), st.lists(st.integers(0, 2), max_size=9))
def test_shared_prefix_counts_equal_tokens(a: list[int], b: list[int]) -> None:
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert shared_prefix(np.array(a, np.uint32), np.array(b, np.uint32)) == expected


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=1.3, top_k=7, seed=1),
        SamplingParams(temperature=0.9, top_k=40, top_p=0.8, min_p=0.05, seed=2),
        SamplingParams(temperature=1.0, top_k=400, seed=3),
        SamplingParams(temperature=1.0, top_k=5000, seed=3),
        SAMPLED,
    ],
)
def test_few_logits_choose_what_all_would(core: _core.Model, params: SamplingParams) -> None:
    request = Request(prompt(20, 9), 24, params)
    few = alone(core, request)
    used = core.head_use
    # Asked for log-probabilities, the engine computes all logits.
    everything = alone(core, Request(prompt(20, 9), 24, params, logprobs=0))
    assert few == everything
    assert core.head_use == used


def test_greedy_is_a_loop_over_forward(core: _core.Model) -> None:
    cache = core.new_cache(30)
    ids = prompt(10)
    expected: list[int] = []
    for _ in range(12):
        row = core.forward([(ids, cache)])[0]
        expected.append(int(row.argmax()))
        ids = np.array(expected[-1:], np.uint32)
    assert alone(core, Request(prompt(10), 12)) == expected


@pytest.mark.parametrize("prefill_tokens", [1, 7, 64, 1000])
@pytest.mark.parametrize("max_sequences", [1, 2, 16])
def test_a_sequence_does_not_depend_on_the_others(
    core: _core.Model, prefill_tokens: int, max_sequences: int
) -> None:
    engine = Engine(core, prefill_tokens=prefill_tokens, max_sequences=max_sequences)
    sequences = [engine.add(request) for request in requests()]
    finish(engine)
    assert [s.tokens for s in sequences] == [alone(core, request) for request in requests()]
    assert {s.finish_reason for s in sequences} == {"length"}


def test_sequences_may_join_and_leave_between_steps(core: _core.Model) -> None:
    engine = Engine(core, prefill_tokens=16)
    sequences: list[Running] = []
    for request in requests():
        sequences.append(engine.add(request))
        engine.step()
    engine.finish(sequences[2])
    finish(engine)
    assert sequences[2].finish_reason == "cancelled"
    for i, request in enumerate(requests()):
        expected = alone(core, request)
        assert sequences[i].tokens == (expected[: sequences[i].n_generated] if i == 2 else expected)


def test_long_prompts_do_not_hold_up_those_that_decode(core: _core.Model) -> None:
    engine = Engine(core, prefill_tokens=8)
    short = engine.add(Request(prompt(2), 10))
    engine.step()
    engine.add(Request(prompt(100), 1))
    for generated in range(2, 10):
        engine.step()
        assert short.n_generated == generated


def test_events_tell_every_token_once(core: _core.Model) -> None:
    engine = Engine(core)
    sequences = [engine.add(request) for request in requests()]
    events = finish(engine)
    for sequence in sequences:
        own = [event for event in events if event.sequence is sequence]
        assert [event.token for event in own] == sequence.tokens
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + ["length"]


def test_a_stop_id_ends_the_sequence_and_is_left_out(core: _core.Model) -> None:
    tokens = alone(core, Request(prompt(10), 12))
    stop = tokens[5]
    engine = Engine(core)
    sequence = engine.add(Request(prompt(10), 12, stop_ids=frozenset([stop])))
    last = finish(engine)[-1]
    assert sequence.tokens == tokens[: tokens.index(stop)]
    assert (last.token, last.finish_reason, sequence.finish_reason) == (None, "stop", "stop")


def test_logprobs_are_those_of_the_model(core: _core.Model) -> None:
    engine = Engine(core)
    sequence = engine.add(Request(prompt(10), 6, SAMPLED, logprobs=3))
    events = finish(engine)
    rows = core.forward([(sequence.ids, core.new_cache(16))], logits="all")[9:]
    for event, row in zip(events, rows, strict=False):
        assert event.logprobs is not None
        assert event.token is not None
        log_softmax = row - np.log(np.exp(row.astype(np.float64)).sum())
        assert event.logprobs.logprob == pytest.approx(log_softmax[event.token], abs=1e-6)
        assert [i for i, _ in event.logprobs.top] == np.argsort(-row, kind="stable")[:3].tolist()


def test_close_cancels_everything_and_lets_caches_go(core: _core.Model) -> None:
    engine = Engine(core, max_sequences=2)
    sequences = [engine.add(request) for request in requests()]
    engine.step()
    engine.close()
    assert not engine.busy
    assert list(engine.step()) == []
    assert {s.finish_reason for s in sequences} == {"cancelled"}
    assert all(s._cache is None and s.finished is not None for s in sequences)


@given(
    first=st.integers(1, 60),
    kept=st.integers(0, 70),
    new=st.integers(0, 30),
)
def test_a_reused_cache_changes_nothing(core: _core.Model, first: int, kept: int, new: int) -> None:
    cache = core.new_cache(128)
    engine = Engine(core)
    before = engine.add(Request(prompt(first), 8), cache=cache, cached=NO_TOKENS)
    finish(engine)
    assert len(cache) == first + 7  # the last token was never put in
    ids = np.concatenate([before.ids[:kept], prompt(new + 1, seed=1)])
    request = Request(ids, 5, SAMPLED)
    again = engine.add(request, cache=cache, cached=before.ids)
    assert again.n_cached == len(cache)
    shared = shared_prefix(before.ids[: first + 7], ids)
    assert again.n_cached == min(shared, len(ids) - 1)
    finish(engine)
    assert again.tokens == alone(core, request)


def test_the_same_prompt_again_computes_one_token(core: _core.Model) -> None:
    cache = core.new_cache(64)
    engine = Engine(core)
    first = engine.add(Request(prompt(20), 4), cache=cache)
    finish(engine)
    again = engine.add(Request(prompt(20), 4), cache=cache, cached=first.ids)
    finish(engine)
    assert (again.n_cached, again.tokens) == (19, first.tokens)


def test_a_cache_of_unknown_content_is_emptied(core: _core.Model) -> None:
    cache = core.new_cache(64)
    core.forward([(prompt(9, seed=3), cache)])
    engine = Engine(core)
    sequence = engine.add(Request(prompt(9), 4), cache=cache)
    finish(engine)
    assert sequence.n_cached == 0
    assert sequence.tokens == alone(core, Request(prompt(9), 4))


def test_bad_requests_are_refused(core: _core.Model) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Request(NO_TOKENS, 1)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        Request(prompt(1), 0)
    engine = Engine(core)
    with pytest.raises(ValueError, match="capacity of 10 tokens; wanted 11"):
        engine.add(Request(prompt(8), 4), cache=core.new_cache(10))
    cache = core.new_cache(16)
    core.forward([(prompt(9), cache)])
    with pytest.raises(ValueError, match="names 8 tokens, but the cache holds 9"):
        engine.add(Request(prompt(8), 4), cache=cache, cached=prompt(8))
    assert not engine.busy


def test_ids_are_checked_and_named() -> None:
    for good in ([3, 1], (3, 1), np.array([3, 1], np.int8), np.array([3, 1], object).tolist()):
        checked = check_ids(good, 4, "ids")
        assert checked.dtype == np.uint32
        assert checked.tolist() == [3, 1]
    for huge in (2**63, 2**64, 2**100):
        with pytest.raises(ValueError, match=rf"ids has the token id {huge} at position 1; wanted"):
            check_ids([1, huge], 4, "ids")
    with pytest.raises(ValueError, match=r"ids has the token id -1 at position 0"):
        check_ids([-1, 2**63], 4, "ids")  # numpy makes floats of these
    for mixed in ([2**64, 1.5], [2**64, None], [2**64, True]):
        with pytest.raises(ValueError, match="wanted integers along one axis"):
            check_ids(mixed, 4, "ids")  # type: ignore[arg-type]
    masked = np.ma.MaskedArray([1, 2], [True, False])
    with pytest.raises(TypeError, match=r"masked array; wanted a plain one: ids.compressed\(\)"):
        check_ids(masked, 4, "ids")
    for none in (None, 5, "ab", {1: 2}, np.int64(1)):
        with pytest.raises(TypeError, match=r"ids is of type .*; wanted a sequence of token ids"):
            check_ids(none, 4, "ids")  # type: ignore[arg-type]


def test_a_cache_exactly_large_enough_is_enough(core: _core.Model) -> None:
    engine = Engine(core)
    sequence = engine.add(Request(prompt(8), 4), cache=core.new_cache(11))
    finish(engine)
    assert sequence.n_generated == 4


def test_times_are_in_order(core: _core.Model) -> None:
    engine = Engine(core)
    sequence = engine.add(Request(prompt(8), 4))
    assert sequence.started is None
    finish(engine)
    assert sequence.started is not None
    assert sequence.first_token is not None
    assert sequence.finished is not None
    assert sequence.started < sequence.first_token < sequence.finished
