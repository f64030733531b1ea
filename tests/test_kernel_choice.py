"""The measured choice: what wins, what is remembered, and what a bad cache file does (nothing)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitnet_rs as br
from bitnet_rs import _core
from bitnet_rs.kernel_choice import KernelSpeed, choose_kernels, describe, select
from bitnet_rs.machine import kernel_cache_file
from bitnet_rs.synthetic import synthetic

CONFIG = synthetic("2b-4t").config
TINY = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 4}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BITNET_RS_KERNEL", raising=False)
    return tmp_path / "bitnet-rs" / "kernels.json"


def speed(kernel: str, decode: float, *batch: float) -> KernelSpeed:
    """Of all numbers of tokens; the last stands for those that are left."""
    rest = (batch[-1],) * (len(_core.batch_inputs) - len(batch))
    return KernelSpeed(kernel, tuple(1e-3 * s for s in (decode, *batch, *rest)))


def fastest(*speeds: KernelSpeed) -> tuple[str, str]:
    """For one token and for many."""
    kernels = select(speeds)
    assert len(kernels) == 1 + len(_core.batch_inputs)
    return kernels[0], kernels[-1]


def test_the_faster_wins_by_prompt_and_reply_together() -> None:
    # 512 prompt tokens weigh four times the 128 that are written.
    assert fastest(speed("a-i2", 10, 2), speed("a-t5", 9, 3)) == ("a-i2", "a-i2")
    assert fastest(speed("a-i2", 10, 2), speed("a-t5", 5, 3)) == ("a-t5", "a-t5")


def test_a_pair_reads_one_layout() -> None:
    speeds = [speed("b-i2", 10, 2), speed("a-i2", 9, 4), speed("a-t5", 8, 3)]
    assert fastest(*speeds) == ("a-i2", "b-i2")
    speeds.append(speed("b-t5", 11, 1))
    assert fastest(*speeds) == ("a-t5", "b-t5")


def test_each_number_of_tokens_has_its_fastest() -> None:
    dots = speed("a-i2", 10, 5, 5, 5, 5, 5)
    tables = speed("a-i2-vlut", 10, 5, 6, 4, 3, 2)
    chosen = select([dots, tables])
    assert chosen == ("a-i2",) * 3 + ("a-i2-vlut",) * 3
    assert describe(chosen[0], chosen[1:]) == "a-i2, a-i2-vlut from 12 tokens"
    assert describe("a-i2", ("a-i2",) * 5) == "a-i2"


def test_near_ties_go_to_the_earlier() -> None:
    assert fastest(speed("a-i2", 10.2, 2.0), speed("b-i2", 10.0, 2.0)) == ("a-i2", "a-i2")
    assert fastest(speed("a-i2", 10.6, 2.0), speed("b-i2", 10.0, 2.0)) == ("b-i2", "a-i2")


def test_projections_are_those_of_the_model() -> None:
    assert _core.projections(CONFIG) == [
        (2560, 2560, 60),
        (640, 2560, 60),
        (6912, 2560, 60),
        (2560, 6912, 30),
    ]
    with pytest.raises(ValueError, match="hidden_size"):
        _core.projections({})


def test_measuring_refuses_nonsense() -> None:
    for projections, threads, budget in [
        ([], 1, 0.1),
        ([(0, 1, 1)], 1, 0.1),
        ([(1, 1, 1)], 0, 0.1),
        ([(1, 1, 1)], 1, -1.0),
        ([(1, 1, 1)], 1, float("nan")),
    ]:
        with pytest.raises(ValueError, match=r"wanted|no projections"):
            _core.measure_kernels(projections, threads, budget)


def test_auto_measures_and_remembers(cache: Path) -> None:
    first = choose_kernels("auto", TINY, 2)
    assert first.kernel in _core.kernels()
    assert set(first.batch_kernels) <= set(_core.kernels())
    assert "measured" in first.reason
    assert "2 threads" in first.reason
    assert first.speeds[0].kernel in (first.kernel, *first.batch_kernels)
    assert kernel_cache_file() == cache
    second = choose_kernels("auto", TINY, 2)
    assert "remembered" in second.reason
    assert (second.kernel, second.batch_kernels, second.speeds) == (
        first.kernel,
        first.batch_kernels,
        first.speeds,
    )
    # Another number of threads, other shapes: measured anew, kept beside.
    assert "measured" in choose_kernels("auto", TINY, 1).reason
    assert "measured" in choose_kernels("auto", TINY | {"hidden_size": 128}, 2).reason
    assert len(json.loads(cache.read_text())["entries"]) == 3


def test_what_is_remembered_decides(cache: Path) -> None:
    choose_kernels("auto", TINY, 1)
    content = json.loads(cache.read_text())
    (entry,) = content["entries"].values()
    scalar = _core.kernels()[-1]
    n = 1 + len(_core.batch_inputs)
    entry["speeds"] = [[_core.kernels()[0], *[2.0] * n], [scalar, *[1.0] * n]]
    cache.write_text(json.dumps(content))
    choice = choose_kernels("auto", TINY, 1)
    assert {choice.kernel, *choice.batch_kernels} == {scalar}


def stale(content: dict[str, Any], field: str, value: Any) -> None:
    for entry in content["entries"].values():
        entry["for"][field] = value


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"\xff\xfe not text",
        lambda _: b"[" * 100_000,
        lambda _: b"[1, 2]",
        lambda _: b'{"format": 2, "entries": [3]}',
        lambda _: b'{"format": 1, "entries": {}}',
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(_core.__version__.encode(), b"0.0.0"),
        lambda text: text.replace(b'"speeds": [', b'"speeds": [7, '),
        lambda text: text.replace(b'"speeds"', b'"spreads"'),
        lambda text: text.replace(_core.kernels()[0].encode(), b"abacus-i2"),
    ],
)
def test_a_damaged_or_stale_file_is_measured_over(cache: Path, damage: Any) -> None:
    choose_kernels("auto", TINY, 1)
    cache.write_bytes(damage(cache.read_bytes()))
    assert "measured" in choose_kernels("auto", TINY, 1).reason
    assert "remembered" in choose_kernels("auto", TINY, 1).reason  # and is whole again


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=json_values)
def test_whatever_stands_for_the_speeds_is_no_error(cache: Path, value: Any) -> None:
    choose_kernels("auto", TINY, 1)
    content = json.loads(cache.read_text())
    for entry in content["entries"].values():
        entry["speeds"] = value
    cache.write_text(json.dumps(content))
    assert "measured" in choose_kernels("auto", TINY, 1).reason


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    for _ in range(2):
        assert "measured" in choose_kernels("auto", TINY, 1).reason
    (tmp_path / "bitnet-rs" / "kernels.json").mkdir(parents=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        assert "measured" in choose_kernels("auto", TINY, 1).reason
    assert [p.name for p in (tmp_path / "bitnet-rs").iterdir()] == ["kernels.json"]


def test_the_file_does_not_grow_for_ever(cache: Path) -> None:
    choose_kernels("auto", TINY, 1)
    content = json.loads(cache.read_text())
    (entry,) = content["entries"].values()
    content["entries"] = {str(n): entry for n in range(500)}
    cache.write_text(json.dumps(content))
    choose_kernels("auto", TINY, 1)
    assert len(json.loads(cache.read_text())["entries"]) <= 64
    assert "remembered" in choose_kernels("auto", TINY, 1).reason


def test_a_name_is_taken_and_nothing_is_measured(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalar = _core.kernels()[-1]
    choice = choose_kernels(scalar, TINY, 1)
    assert {choice.kernel, *choice.batch_kernels} == {scalar}
    assert choice.speeds == ()
    assert choice.reason == "asked for with kernel"
    monkeypatch.setenv("BITNET_RS_KERNEL", scalar)
    choice = choose_kernels("auto", TINY, 1)
    assert choice.kernel == scalar
    assert "BITNET_RS_KERNEL" in choice.reason
    assert not cache.exists()


def test_load_takes_the_choice(cache: Path) -> None:
    with br.load("demo") as model:
        assert model.kernel == model.kernel_choice.kernel
        assert model.batch_kernels == model.kernel_choice.batch_kernels
        assert model.prefill_kernel == model.batch_kernels[-1]
        assert model.kernel_choice.speeds
    assert cache.exists()


def test_kernels_of_different_layouts_are_refused() -> None:
    layouts = {name.split("-")[1]: name for name in _core.kernels()}
    first, *others = layouts.values()
    n = len(_core.batch_inputs)
    for other in others:
        for at in range(n):
            batch = [first] * n
            batch[at] = other
            with pytest.raises(ValueError, match="layout"):
                _core.Model(CONFIG, {}, kernel=first, batch_kernels=batch)
    with pytest.raises(ValueError, match="one for each"):
        _core.Model(CONFIG, {}, kernel=first, batch_kernels=[first])
