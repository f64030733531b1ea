"""Sampling against its slow twin, which sorts, and against probabilities."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitnet_rs import SamplingParams, _core, _reference, sampling
from bitnet_rs.engine import choose

Logits = NDArray[np.float32]


def weights_of(logits: Logits, temperature: float) -> list[int]:
    """The integer weights of the definition."""
    with np.errstate(over="ignore", under="ignore"):
        reciprocal = min(float(1 / np.float64(temperature)), np.finfo(np.float64).max)
        shifted = logits.astype(np.float64) - float(logits.max())
        x = (shifted * reciprocal).astype(np.float32)
    return [math.floor(w * 2**40) for w in _core._exp(x).tolist()]


def twin(logits: Logits, params: SamplingParams, draw: float) -> int:
    return _reference.sample(
        logits,
        weights_of(logits, params.temperature),
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        draw=draw,
    )


def core_sample(row: Logits, **arguments: Any) -> int:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "draw": 0.5}
    return _core.sample(row, **(defaults | arguments))


@st.composite
def rows(draw: st.DrawFn) -> Logits:
    """Rows of logits: short and long ones, peaked and flat, with and without equals."""
    n = draw(st.integers(1, 700))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    row = rng.normal(0, draw(st.sampled_from([0.0, 1e-6, 0.3, 2.0, 10.0])), n)
    return np.round(row, draw(st.sampled_from([0, 1, 9]))).astype(np.float32)


# Every kind of float32 that a logit may be.
extreme_rows = (
    st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.sampled_from([-np.inf, -0.0, 0.0, 1e-45, -1e-45, 3.4e38, -3.4e38]),
        min_size=1,
        max_size=40,
    )
    .map(lambda row: np.array(row, np.float32))
    .filter(lambda row: bool(np.isfinite(row).any()))
)

settings_of = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.01, 0.3, 0.7, 1.0, 2.5]) | st.floats(5e-324, 1.7e308),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 600, 3000, 10_000, 10**30]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0]) | st.floats(5e-324, 1.0),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]) | st.floats(0.0, 1.0),
    seed=st.integers(0, 2**64),
)


@given(rows() | extreme_rows, settings_of)
@example(np.zeros(5, np.float32), SamplingParams(temperature=1, top_k=2, seed=0))
def test_the_token_is_that_of_the_definition(row: Logits, params: SamplingParams) -> None:
    before, rng, draws = row.copy(), params.rng(), params.rng()
    for _ in range(5):
        assert choose(row, params, rng) == twin(row, params, draws.random())
    np.testing.assert_array_equal(row, before)


@given(rows(), settings_of)
def test_the_first_and_the_last_draw_take_tokens_too(row: Logits, params: SamplingParams) -> None:
    for draw in (0.0, math.nextafter(1, 0)):
        token = core_sample(
            row,
            temperature=params.temperature,
            top_k=min(params.top_k, len(row)),
            top_p=params.top_p,
            min_p=params.min_p,
            draw=draw,
        )
        assert token == twin(row, params, draw)


def test_a_vocabulary_of_128256_too() -> None:
    rng = np.random.default_rng(0)
    peaked = rng.normal(0, 3, 128_256)
    peaked[rng.integers(0, len(peaked), 20)] += 15
    for row in (peaked, peaked / 10, np.round(peaked)):
        logits = row.astype(np.float32)
        for options in ({}, {"top_p": 0.95}, {"top_k": 5000, "top_p": 0.7, "min_p": 1e-3}):
            params = SamplingParams(temperature=0.8, seed=1, **options)  # type: ignore[arg-type]
            token = choose(logits, params, params.rng())
            assert token == twin(logits, params, params.rng().random())


@given(rows(), settings_of, st.integers(1, 700))
def test_candidates_give_the_token_of_the_whole_row(
    row: Logits, params: SamplingParams, k: int
) -> None:
    ids = sampling.top_k_ids(row, k)
    token = int(ids[choose(row[ids], params, params.rng())])
    if 0 < params.top_k <= k:
        assert token == choose(row, params, params.rng())
    elif params.top_k == 0:
        limited = SamplingParams(params.temperature, k, params.top_p, params.min_p)
        assert token == choose(row, limited, params.rng())


@given(rows(), st.integers(0, 800))
def test_top_k_ids_are_the_first_of_a_stable_sort(row: Logits, k: int) -> None:
    expected = sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])
    assert sampling.top_k_ids(row, k).tolist() == expected


@given(rows())
def test_greedy_takes_the_lowest_id_among_the_highest(row: Logits) -> None:
    token = choose(row, SamplingParams(), np.random.default_rng())
    assert token == row.tolist().index(max(row.tolist()))


@given(
    rows(),
    st.lists(st.integers(0, 699), max_size=50),
    st.sampled_from([0.5, 1.0, 1.1, 3.0]),
)
def test_repetition_penalty_divides_positive_and_multiplies_negative(
    row: Logits, seen: list[int], penalty: float
) -> None:
    seen = [i for i in seen if i < len(row)]
    expected = row.astype(np.float64)
    for i in set(seen):
        expected[i] = row[i] / penalty if row[i] > 0 else row[i] * penalty
    result = sampling.penalize(row, np.array(seen, np.uint32), penalty)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("penalty", [5e-324, 1e-320, 1e-39, 1e39, 1.7e308])
def test_extreme_repetition_penalties_stay_finite(penalty: float) -> None:
    row = np.array([0, 1, -1, 3e38, -3e38, -0.0], np.float32)
    result = sampling.penalize(row, np.arange(len(row)), penalty)
    assert np.isfinite(result).all()
    assert result[0] == result[5] == 0
    assert (np.sign(result[1:5]) * np.sign(row[1:5]) >= 0).all()
    grown = result[1] if penalty < 1 else -result[2]
    assert grown == np.finfo(np.float32).max
    params = SamplingParams(temperature=1.0, seed=0)
    assert choose(result, params, params.rng()) in range(len(row))


def test_repetition_penalty_changes_the_choice() -> None:
    row = np.array([1.0, 3.0, 2.9], np.float32)
    assert sampling.greedy(row) == 1
    assert sampling.greedy(sampling.penalize(row, np.array([1, 1], np.uint32), 1.2)) == 2


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"top_k": 3}, [0, 2, 4]),
        ({"top_p": 0.95}, [0, 1, 2, 4]),
        ({"min_p": 0.2}, [0, 2, 4]),
    ],
)
def test_frequencies_follow_the_probabilities(options: dict[str, float], kept: list[int]) -> None:
    row = np.array([1.0, 0.0, 2.0, -1.0, 1.5], np.float32)
    params = SamplingParams(temperature=0.8, seed=5, **options)  # type: ignore[arg-type]
    rng = params.rng()
    counts = np.bincount([choose(row, params, rng) for _ in range(20_000)], minlength=5)
    assert counts[kept].sum() == 20_000
    p = np.exp(row[kept] / 0.8) / np.exp(row[kept] / 0.8).sum()
    # Chi-squared with 4 degrees of freedom exceeds 18.5 once in a thousand seeds; this one is fixed.
    assert float(((counts[kept] - 20_000 * p) ** 2 / (20_000 * p)).sum()) < 18.5


def test_tiny_temperature_is_greedy_and_extremes_do_not_overflow() -> None:
    row = np.array([-3e38, 3e38, 2.9e38, -np.inf], np.float32)
    for temperature in (5e-324, 1e-30, 1.0, 1e300):
        params = SamplingParams(temperature=temperature, top_p=0.9, seed=0)
        assert choose(row, params, params.rng()) in ((1, 2, 0) if temperature > 1 else (1,))


@given(rows(), st.integers(0, 30))
def test_logprobs_are_the_log_softmax_of_the_raw_logits(row: Logits, top: int) -> None:
    token = len(row) // 2
    wide = [float(x) for x in row]
    log_total = max(wide) + math.log(math.fsum(math.exp(x - max(wide)) for x in wide))
    report = sampling.logprobs(row, token, top)
    assert report.logprob == pytest.approx(wide[token] - log_total, abs=1e-9)
    order = sorted(range(len(row)), key=lambda i: (-wide[i], i))[:top]
    assert [i for i, _ in report.top] == order
    assert [p for _, p in report.top] == pytest.approx([wide[i] - log_total for i in order])


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_logits_that_are_not_numbers_raise(bad: float) -> None:
    row = np.zeros(300, np.float32)
    row[200] = bad
    for params in (SamplingParams(), SamplingParams(temperature=0.7, top_k=3, top_p=0.9, seed=1)):
        with pytest.raises(RuntimeError, match=r"token id 200; wanted\s+finite"):
            choose(row, params, params.rng())
    with pytest.raises(RuntimeError, match=r"token id 200; wanted\s+finite"):
        sampling.penalize(row, np.array([200], np.uint32), 1.5)
    with pytest.raises(RuntimeError, match=r"hold NaN or \+inf"):
        core_sample(row)


def test_a_row_without_any_possible_token_raises() -> None:
    row = np.full(4, -np.inf, np.float32)
    with pytest.raises(RuntimeError, match="-inf"):
        choose(row, SamplingParams(), np.random.default_rng())
    with pytest.raises(RuntimeError, match="nothing above -inf"):
        core_sample(row)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0.0, -1.0, math.nan, math.inf]),
        ("top_p", [0.0, 1.1, math.nan]),
        ("min_p", [-0.1, 1.1, math.nan]),
        ("draw", [-0.1, 1.0, math.nan]),
    ],
)
def test_bad_arguments_of_the_core_are_named(field: str, values: list[float]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^{field} is .*; wanted "):
            core_sample(np.zeros(3, np.float32), **{field: value})
    with pytest.raises(ValueError, match="there are 0 logits"):
        core_sample(np.zeros(0, np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_bad_parameters_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} is .*; wanted "):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_parameters_take_numpy_numbers_and_are_plain_afterwards() -> None:
    params = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3))  # type: ignore[arg-type]
    assert (type(params.temperature), type(params.top_k)) == (float, int)
    with pytest.raises(AttributeError):
        params.top_k = 4  # type: ignore[misc]
