"""The measured choice: what wins, what is remembered, and what a bad cache file does (nothing)."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bitnet_rs as br
from bitnet_rs import _core
from bitnet_rs.kernel_choice import KernelSpeed, choose_kernels, select
from bitnet_rs.machine import kernel_cache_file
from bitnet_rs.synthetic import synthetic

CONFIG = synthetic("2b-4t").config
TINY = CONFIG | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 4}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BITNET_RS_KERNEL", raising=False)
    return tmp_path / "bitnet-rs" / "kernels.json"


def speed(kernel: str, decode: float, prefill: float) -> KernelSpeed:
    return KernelSpeed(kernel, decode * 1e-3, prefill * 1e-3)


def test_the_faster_wins_by_prompt_and_reply_together() -> None:
    # 512 prompt tokens weigh four times the 128 that are written.
    assert select([speed("a-i2", 10, 2), speed("a-t5", 9, 3)]) == ("a-i2", "a-i2")
    assert select([speed("a-i2", 10, 2), speed("a-t5", 5, 3)]) == ("a-t5", "a-t5")


def test_a_pair_reads_one_layout() -> None:
    speeds = [speed("b-i2", 10, 2), speed("a-i2", 9, 4), speed("a-t5", 8, 3)]
    assert select(speeds) == ("a-i2", "b-i2")
    speeds.append(speed("b-t5", 11, 1))
    assert select(speeds) == ("a-t5", "b-t5")


def test_near_ties_go_to_the_earlier() -> None:
    assert select([speed("a-i2", 10.2, 2.0), speed("b-i2", 10.0, 2.0)]) == ("a-i2", "a-i2")
    assert select([speed("a-i2", 10.4, 2.0), speed("b-i2", 10.0, 2.0)]) == ("b-i2", "a-i2")


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
    assert first.prefill_kernel in _core.kernels()
    assert "measured" in first.reason
    assert "2 threads" in first.reason
    assert first.speeds[0].kernel in (first.kernel, first.prefill_kernel)
    assert kernel_cache_file() == cache
    second = choose_kernels("auto", TINY, 2)
    assert "remembered" in second.reason
    assert (second.kernel, second.prefill_kernel, second.speeds) == (
        first.kernel,
        first.prefill_kernel,
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
    entry["speeds"] = [[_core.kernels()[0], 2.0, 2.0], [scalar, 1.0, 1.0]]
    cache.write_text(json.dumps(content))
    choice = choose_kernels("auto", TINY, 1)
    assert (choice.kernel, choice.prefill_kernel) == (scalar, scalar)


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
        lambda _: b'{"format": 1, "entries": [3]}',
        lambda _: b'{"format": 2, "entries": {}}',
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
    assert (choice.kernel, choice.prefill_kernel, choice.speeds) == (scalar, scalar, ())
    assert choice.reason == "asked for with kernel"
    monkeypatch.setenv("BITNET_RS_KERNEL", scalar)
    choice = choose_kernels("auto", TINY, 1)
    assert choice.kernel == scalar
    assert "BITNET_RS_KERNEL" in choice.reason
    assert not cache.exists()


def test_load_takes_the_choice(cache: Path) -> None:
    with br.load("demo") as model:
        assert (model.kernel, model.prefill_kernel) == (
            model.kernel_choice.kernel,
            model.kernel_choice.prefill_kernel,
        )
        assert model.kernel_choice.speeds
    assert cache.exists()


def test_two_kernels_of_different_layouts_are_refused() -> None:
    layouts = {name.partition("-")[2]: name for name in _core.kernels()}
    first, *others = layouts.values()
    for other in others:
        with pytest.raises(ValueError, match="layout"):
            _core.Model(CONFIG, {}, kernel=first, prefill_kernel=other)
