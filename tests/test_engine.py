"""The engine: ids in, ids out, on a real (tiny) core model."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitnet_rs import SamplingParams, _core
from bitnet_rs.engine import Engine, Event, Request, Running, check_ids, share_out
from bitnet_rs.loaders import open_checkpoint
from bitnet_rs.prefixes import MAX_ENTRIES, MIN_TOKENS, Prefixes, shared_prefix

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
def test_a_reused_prefix_changes_nothing(
    core: _core.Model, first: int, kept: int, new: int
) -> None:
    engine = Engine(core)
    before = engine.add(Request(prompt(first), 8))
    finish(engine)
    ids = np.concatenate([before.ids[:kept], prompt(new + 1, seed=1)])
    request = Request(ids, 5, SAMPLED)
    again = engine.add(request)
    finish(engine)
    # The last token was never put in; one is always computed.
    shared = min(shared_prefix(before.ids[: first + 7], ids), len(ids) - 1)
    assert again.n_cached == (shared if shared >= MIN_TOKENS else 0)
    assert again.tokens == alone(core, request)


def test_the_same_prompt_again_computes_one_token(core: _core.Model) -> None:
    engine = Engine(core)
    first = engine.add(Request(prompt(20), 4))
    finish(engine)
    again = engine.add(Request(prompt(20), 4))
    finish(engine)
    assert (again.n_cached, again.tokens) == (19, first.tokens)
    assert engine.stats.prompt_tokens == 21


def test_a_prompt_begins_with_what_a_running_one_has(core: _core.Model) -> None:
    """Also where that is still being computed: it waits for it."""
    engine = Engine(core, prefill_tokens=32)
    ids = prompt(150)
    others = [np.concatenate([ids[:n], prompt(9, seed=n)]) for n in (20, 100, 140)]
    wanted = [Request(each, 6, SAMPLED) for each in (ids, *others)]
    sequences = [engine.add(request) for request in wanted]
    finish(engine)
    assert sequences[0].n_cached == 0
    for sequence, n in zip(sequences[1:], (20, 100, 140), strict=True):
        assert n - MIN_TOKENS < sequence.n_cached <= n  # for less than that it does not wait
    assert [s.tokens for s in sequences] == [alone(core, request) for request in wanted]
    computed = sum(len(s.request.prompt) - s.n_cached for s in sequences)
    assert engine.stats.prompt_tokens == computed


def test_one_that_waits_for_another_goes_on_without_it(core: _core.Model) -> None:
    engine = Engine(core, prefill_tokens=16)
    leader = engine.add(Request(prompt(200), 4))
    follower = engine.add(Request(prompt(190), 4))
    engine.step()
    engine.finish(leader)
    finish(engine)
    assert follower.n_cached == 16
    assert follower.tokens == alone(core, follower.request)


def test_prefixes_go_by_use_when_memory_is_short(core: _core.Model) -> None:
    page = core.new_cache(1).n_bytes
    engine = Engine(core, kv_limit=4 * page)

    def run(seed: int) -> Running:
        sequence = engine.add(Request(prompt(20, seed), 4))
        finish(engine)
        return sequence

    for seed in (1, 2, 3):
        run(seed)
    assert engine.stats.kv_bytes == 3 * page
    assert run(1).n_cached == 19  # used again, and so the last to go
    run(4)
    run(5)
    assert engine.stats.kv_bytes <= 4 * page
    assert run(1).n_cached == 19
    assert run(2).n_cached == 0
    engine.close()
    assert engine.stats.kv_bytes == 0


def test_kv_memory_bounds_who_runs(core: _core.Model) -> None:
    """And nobody is overtaken: the long one that does not fit yet is the next to run."""
    page = core.new_cache(1).n_bytes
    engine = Engine(core, kv_limit=4 * page, prefill_tokens=64)
    sizes = (100, 300, 20, 20)
    sequences = [engine.add(Request(prompt(n, n), 8)) for n in sizes]
    peak, order = 0, []
    while engine.busy:
        order += [e.sequence for e in engine.step() if e.finish_reason]
        peak = max(peak, engine.stats.kv_bytes)
        assert sum(s._bytes_when_full for s in engine._active) <= 4 * page
    assert peak <= 4 * page
    assert order.index(sequences[0]) < order.index(sequences[1]) or sequences[1].started
    assert [s.tokens for s in sequences] == [alone(core, s.request) for s in sequences]
    with pytest.raises(ValueError, match=r"600 tokens and 8 to generate take .* lower max_tokens"):
        engine.add(Request(prompt(600), 8))


def test_sequences_are_admitted_in_the_order_they_came(core: _core.Model) -> None:
    engine = Engine(core, max_sequences=2)
    sequences = [engine.add(Request(prompt(n, n), 3)) for n in (40, 3, 90, 5, 7)]
    finish(engine)
    started = [s.started or 0 for s in sequences]
    assert started == sorted(started)


@given(st.lists(st.integers(1, 400), max_size=9), st.integers(1, 300))
def test_room_is_shared_evenly(wanted: list[int], room: int) -> None:
    shares = share_out(wanted, room)
    assert sum(shares) == min(sum(wanted), room)
    even = room // max(1, len(wanted))
    for want, share in zip(wanted, shares, strict=True):
        assert min(want, even) <= share <= want


def test_a_short_prompt_is_not_held_up_by_a_long_one(core: _core.Model) -> None:
    engine = Engine(core, prefill_tokens=64, shared_prefill_tokens=32)
    long = engine.add(Request(prompt(600), 2))
    engine.step()
    short = engine.add(Request(prompt(12, 9), 2))
    engine.step()
    assert short.n_generated == 1
    # And the long one goes on, however many short ones come.
    before = long._n_kv
    for seed in range(8):
        engine.add(Request(prompt(16, seed + 20), 1))
        engine.step()
    assert long._n_kv >= before + 8 * 16


def test_a_sequence_rests_until_it_is_read(core: _core.Model) -> None:
    engine = Engine(core)
    sequence = engine.add(Running(Request(prompt(8), 20), ahead=3))
    while engine.runnable:
        engine.step()
    assert (sequence.n_generated, engine.busy) == (3, True)
    assert list(engine.step()) == []
    sequence.taken = 2
    while engine.runnable:
        engine.step()
    assert sequence.n_generated == 5
    sequence.ahead = None
    finish(engine)
    assert sequence.tokens == alone(core, sequence.request)


def test_log_probabilities_of_a_prompt(core: _core.Model) -> None:
    ids = prompt(150)
    engine = Engine(core, prefill_tokens=70)
    beside = engine.add(Request(prompt(9, 1), 30))
    scored = engine.add(Request(ids, 0, prompt_logprobs=True, logprobs=2))
    generating = engine.add(Request(ids, 3, prompt_logprobs=True))
    events = finish(engine)
    rows = core.forward([(ids, core.new_cache(150))], logits="all").astype(np.float64)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    for sequence in (scored, generating):
        found = [each.logprob for each in sequence.prompt_logprobs]
        assert found == pytest.approx(rows[np.arange(149), ids[1:]], abs=1e-5)
        assert sequence.n_cached == 0
    assert [i for i, _ in scored.prompt_logprobs[7].top] == np.argsort(-rows[7])[:2].tolist()
    assert [(e.token, e.finish_reason) for e in events if e.sequence is scored] == [
        (None, "length")
    ]
    assert generating.tokens == alone(core, Request(ids, 3))
    assert beside.tokens == alone(core, beside.request)


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), max_size=12), st.data())
def test_prefixes_against_a_plain_list(
    core: _core.Model, kept: list[list[int]], data: st.DataObject
) -> None:
    """The longest shared beginning is found, whatever was kept in whatever order."""
    prefixes = Prefixes()

    def tokens(bits: list[int]) -> NDArray[np.uint32]:
        return np.repeat(np.array(bits, np.uint32), 7)

    for bits in kept:
        prefixes.keep(tokens(bits), core.new_cache(1))
    asked = tokens(data.draw(st.lists(st.integers(0, 1), max_size=7)))
    expected = max((shared_prefix(tokens(bits), asked) for bits in kept), default=0)
    entry, n = prefixes.find(asked)
    assert n == (expected if expected >= MIN_TOKENS else 0)
    assert (entry is not None) == (n > 0)
    # None is a beginning of another.
    texts = [entry.tokens.tobytes() for entry in prefixes]
    assert not any(a is not b and b.startswith(a) for a in texts for b in texts)


def test_prefixes_are_bounded_in_number(core: _core.Model) -> None:
    prefixes = Prefixes()
    cache = core.new_cache(1)
    for i in range(MAX_ENTRIES + 20):
        prefixes.keep(np.full(MIN_TOKENS, i, np.uint32), cache)
    assert len(prefixes) == MAX_ENTRIES
    assert prefixes.find(np.full(MIN_TOKENS, 19, np.uint32)) == (None, 0)
    assert prefixes.find(np.full(MIN_TOKENS, 20, np.uint32))[1] == MIN_TOKENS
    prefixes.clear()
    assert prefixes.find(np.full(MIN_TOKENS, 20, np.uint32)) == (None, 0)


class Ladder:
    """Allows ids in ascending order only, and ends with the vocabulary or after `most`."""

    def __init__(self, most: int) -> None:
        self.last, self.left, self.remaining = -1, most, list[int]()

    def restrict(self, logits: NDArray[np.float32], remaining: int) -> None:
        self.remaining.append(remaining)
        logits[: self.last + 1] = -np.inf

    def accept(self, token: int) -> bool:
        self.last, self.left = token, self.left - 1
        return self.left == 0


@pytest.mark.parametrize("params", [GREEDY, SAMPLED])
def test_a_constraint_restricts_what_comes(core: _core.Model, params: SamplingParams) -> None:
    engine = Engine(core)
    ladder = Ladder(5)
    free = engine.add(Request(prompt(8), 9, params))
    bound = engine.add(Request(prompt(8), 9, params, constraint=ladder, logprobs=0))
    cut = engine.add(Request(prompt(8), 2, params, constraint=Ladder(5)))
    finish(engine)
    assert bound.tokens == sorted(set(bound.tokens))
    assert (bound.n_generated, bound.finish_reason) == (5, "stop")
    assert ladder.remaining == [9, 8, 7, 6, 5]
    assert (cut.n_generated, cut.finish_reason) == (2, "length")
    assert free.tokens == alone(core, free.request)


class Broken(Ladder):
    """Fails at the third token."""

    def restrict(self, logits: NDArray[np.float32], remaining: int) -> None:
        if len(self.remaining) == 2:
            raise LookupError("lost")
        super().restrict(logits, remaining)


class Nothing(Ladder):
    """Allows no token at all."""

    def restrict(self, logits: NDArray[np.float32], remaining: int) -> None:
        logits[:] = -np.inf


def test_what_fails_ends_alone(core: _core.Model) -> None:
    engine = Engine(core)
    fine = engine.add(Request(prompt(8), 9))
    broken = engine.add(Request(prompt(9), 9, constraint=Broken(9)))
    stuck = engine.add(Request(prompt(10), 9, constraint=Nothing(9)))
    events = finish(engine)
    assert fine.tokens == alone(core, fine.request)
    assert (broken.finish_reason, broken.n_generated) == ("error", 2)
    assert isinstance(broken.error, LookupError)
    assert "allows none of the model's tokens" in str(stuck.error)
    assert [e.finish_reason for e in events if e.sequence is broken] == [None, None, "error"]


def test_no_memory_for_keys_and_values_is_an_error_of_the_sequences(
    core: _core.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(core)
    sequence = engine.add(Request(prompt(8), 4))
    with monkeypatch.context() as patch:
        # What the core says where the system has no more memory, which a test cannot take away.
        error = RuntimeError("no memory for keys and values of 8 tokens")
        patch.setattr(engine, "_forward", lambda segments: (_ for _ in ()).throw(error))
        (event,) = engine.step()
    assert (event.finish_reason, sequence.error) == ("error", error)
    assert alone(core, Request(prompt(8), 4))


def test_bad_requests_are_refused(core: _core.Model) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Request(NO_TOKENS, 1)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        Request(prompt(1), 0)
    with pytest.raises(ValueError, match="max_tokens is -1"):
        Request(prompt(1), -1, prompt_logprobs=True)


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


def test_times_are_in_order(core: _core.Model) -> None:
    engine = Engine(core)
    sequence = engine.add(Request(prompt(8), 4))
    assert sequence.started is None
    events = finish(engine)
    assert sequence.started is not None
    assert sequence.first_token is not None
    assert sequence.finished is not None
    assert sequence.submitted < sequence.started < sequence.first_token < sequence.finished
    assert [sequence.first_token] == [e.time for e in events[:1]]
    assert [e.time for e in events] == sorted(e.time for e in events)
