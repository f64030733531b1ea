"""`verify` passes on models that keep the promise, and names what is wrong with others.

The wrong ones are real cores behind a thin wrapper that spoils one logit by one bit, or
worse, in one situation only: exactly the checks that see the situation must fail.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

import bitnet_rs
from bitnet_rs import _core, synthetic, verify

DATA = Path(__file__).parent / "data"

Batch = list[tuple[np.ndarray, _core.KvCache]]
Spoil = Callable[["Core", Batch, np.ndarray], None]


class Core:
    """A core whose logits pass through `spoil`, which may change them in place."""

    def __init__(self, inner: _core.Model, spoil: Spoil, *, spoil_top: bool = False) -> None:
        self._inner = inner
        self._spoil = spoil
        self._spoil_top = spoil_top
        self.kernel, self.threads, self.facts = inner.kernel, inner.threads, inner.facts

    def new_cache(self, capacity: int, kv_dtype: Literal["f16", "f32"]) -> _core.KvCache:
        return self._inner.new_cache(capacity, kv_dtype)

    def forward(self, batch: Batch, *, logits: Literal["last", "all"] = "last") -> np.ndarray:
        rows = self._inner.forward(batch, logits=logits)
        self._spoil(self, batch, rows)
        return rows

    def forward_top(
        self, batch: Batch, top: list[int | None]
    ) -> list[tuple[np.ndarray | None, np.ndarray]]:
        found = self._inner.forward_top(batch, top)
        if self._spoil_top:
            found[0][1].view(np.uint32)[-1] ^= 1
        return found

    @property
    def head_use(self) -> dict[str, int]:
        return self._inner.head_use


def failed(spoil: Spoil, golden: Path | None = None, *, top: bool = False) -> dict[str, str]:
    """Names and details of the checks that fail with spoiled logits, or spoiled best ones."""
    source = synthetic.synthetic("tiny")

    def build(kernel: str, threads: int) -> Any:
        return Core(source.build(kernel=kernel, threads=threads), spoil, spoil_top=top)

    kernels = _core.kernels()
    checks = list(verify.check_core(build(kernels[0], 2), build, kernels=kernels, golden=golden))
    assert len(checks) >= 7
    return {check.name: check.detail for check in checks if not check.ok}


def flip_a_bit(rows: np.ndarray) -> None:
    rows.view(np.uint32)[-1, 5] ^= 1


def test_demo_passes() -> None:
    seen: list[verify.Check] = []
    said: list[str] = []
    with bitnet_rs.load(threads=2) as model:
        report = verify.run(model, on_check=seen.append, on_progress=said.append)
    assert report.ok, [check for check in report.checks if not check.ok]
    assert report.checks == seen
    assert said
    names = [check.name for check in report.checks]
    assert len(set(names)) == len(names)
    *fast, scalar = _core.kernels()
    for name in (
        "logits finite",
        "int8-scanned head = full head",
        "prefill = token by token",
        "chunks = one",
        "truncated cache = fresh",
        "batch of 8 = alone",
        *(f"kernel {kernel} = {scalar}" for kernel in fast),
        "threads 1 = 2",
        "threads 3 = 2",
        "golden logits",
        "golden greedy tokens",
    ):
        assert name in names
    content = json.loads(json.dumps(report.to_dict()))
    assert content["ok"] is True
    assert content["model"] == "demo"
    assert all(check.keys() == {"name", "ok", "detail"} for check in content["checks"])


def test_model_has_it_as_a_method() -> None:
    with bitnet_rs.load(threads=1, kernel=_core.kernels()[-1], kv_dtype="f32") as model:
        report = model.verify()
    assert report.ok
    assert (report.kernel, report.threads, report.kv_dtype) == (_core.kernels()[-1], 1, "f32")


@pytest.mark.parametrize("name", ["bitnet-online", "bitnet-packed", "llama-packed"])
def test_golden_logits_beside_the_weights_are_compared(name: str) -> None:
    with bitnet_rs.load(DATA / name, threads=1) as model:
        checks = {check.name: check for check in verify.run(model).checks}
    assert all(check.ok for check in checks.values() if not check.name.startswith("golden"))
    assert "golden greedy tokens" in checks
    assert checks["golden logits"].ok, checks["golden logits"].detail


def test_golden_logits_elsewhere_are_compared_if_named(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(DATA / "bitnet-packed" / name, tmp_path)
    with bitnet_rs.load(tmp_path, threads=1) as model:
        without = verify.run(model)
        golden = verify.run(model, golden=DATA / "bitnet-packed" / "golden.npz")
    names = [check.name for check in without.checks]
    assert not any(name.startswith("golden") for name in names)
    assert [check.name for check in golden.checks] == [
        *names,
        "golden logits",
        "golden greedy tokens",
    ]
    assert golden.ok, golden.checks


def test_nothing_fails_unspoiled() -> None:
    assert failed(lambda core, batch, rows: None) == {}


def test_best_logits_that_differ_are_named() -> None:
    wrong = failed(lambda core, batch, rows: None, top=True)
    assert list(wrong) == ["int8-scanned head = full head"]
    assert "rows rescored" in wrong["int8-scanned head = full head"]


def test_a_kernel_that_differs_is_named() -> None:
    *fast, scalar = _core.kernels()
    if not fast:
        pytest.skip("only the scalar kernel runs on this CPU")

    def spoil(core: Core, batch: Batch, rows: np.ndarray) -> None:
        if core.kernel == fast[-1]:
            flip_a_bit(rows)

    wrong = failed(spoil)
    name = f"kernel {fast[-1]} = {scalar}"
    assert list(wrong) == [name]
    assert "of 99 rows" in wrong[name]


def test_threads_that_differ_are_named() -> None:
    wrong = failed(lambda core, batch, rows: flip_a_bit(rows) if core.threads == 3 else None)
    assert list(wrong) == ["threads 3 = 2"]


def test_a_batch_that_differs_is_named() -> None:
    wrong = failed(lambda core, batch, rows: flip_a_bit(rows) if len(batch) > 1 else None)
    assert list(wrong) == ["batch of 8 = alone"]
    assert "2 of" in wrong["batch of 8 = alone"]  # the last row of the prompts and of the step


def test_short_chunks_that_differ_are_named() -> None:
    def spoil(core: Core, batch: Batch, rows: np.ndarray) -> None:
        if len(batch[0][0]) == verify._CHUNK:
            flip_a_bit(rows)

    # Some prompts of the batch have that length, too.
    assert {"chunks = one", "batch of 8 = alone"} >= failed(spoil).keys() >= {"chunks = one"}


def test_decoding_that_differs_from_prefill_is_named() -> None:
    # In the steps after the prompt, too, so that the expected logits themselves are spoiled there.
    wrong = failed(lambda core, batch, rows: flip_a_bit(rows) if len(batch[0][0]) == 1 else None)
    assert "prefill = token by token" in wrong


def test_a_cache_that_remembers_too_much_is_named() -> None:
    def spoil(core: Core, batch: Batch, rows: np.ndarray) -> None:
        if len(batch[0][0]) == 50:  # what follows after `truncate` to 49 of 99
            flip_a_bit(rows)

    assert list(failed(spoil)) == ["truncated cache = fresh"]


def test_nan_is_not_equal_enough() -> None:
    wrong = failed(lambda core, batch, rows: rows.fill(np.nan))
    # The bits are all the same; the best few of them are not those of the head.
    assert list(wrong) == ["logits finite", "int8-scanned head = full head"]


def test_an_error_in_a_rebuilt_core_is_a_failed_check() -> None:
    def spoil(core: Core, batch: Batch, rows: np.ndarray) -> None:
        if core.threads == 1:
            raise RuntimeError("no such luck")

    assert failed(spoil) == {"threads 1 = 2": "RuntimeError: no such luck"}


def write_golden(path: Path, change: Callable[[dict[str, np.ndarray]], None]) -> Path:
    with np.load(DATA / "bitnet-packed" / "golden.npz") as arrays:
        content = dict(arrays)
    change(content)
    np.savez(path, **content)
    return path


def golden_failures(golden: Path) -> dict[str, str]:
    with bitnet_rs.load(DATA / "bitnet-packed") as model:
        checks = list(verify._check_golden(model.core, golden))
    return {check.name: check.detail for check in checks if not check.ok}


def test_golden_as_it_is(tmp_path: Path) -> None:
    assert golden_failures(write_golden(tmp_path / "g.npz", lambda arrays: None)) == {}


def test_golden_logits_far_away_fail(tmp_path: Path) -> None:
    def far(arrays: dict[str, np.ndarray]) -> None:
        arrays["logits_1"][3, 7] += 0.2

    wrong = golden_failures(write_golden(tmp_path / "g.npz", far))
    assert list(wrong) == ["golden logits"]
    assert "largest difference 0.2" in wrong["golden logits"]


def test_golden_logits_that_are_all_a_bit_off_fail(tmp_path: Path) -> None:
    def off(arrays: dict[str, np.ndarray]) -> None:
        arrays["logits_0"] += 5e-5

    assert list(golden_failures(write_golden(tmp_path / "g.npz", off))) == ["golden logits"]


def test_golden_logits_that_are_not_numbers_fail(tmp_path: Path) -> None:
    def nan(arrays: dict[str, np.ndarray]) -> None:
        arrays["logits_0"][0, 0] = np.nan

    assert list(golden_failures(write_golden(tmp_path / "g.npz", nan))) == ["golden logits"]


def test_other_greedy_tokens_fail(tmp_path: Path) -> None:
    def other(arrays: dict[str, np.ndarray]) -> None:
        for n in range(4):
            arrays[f"greedy_{n}"] ^= 1

    wrong = golden_failures(write_golden(tmp_path / "g.npz", other))
    assert list(wrong) == ["golden greedy tokens"]
    assert "step 0" in wrong["golden greedy tokens"]


def test_golden_files_that_can_not_be_used_fail(tmp_path: Path) -> None:
    broken = tmp_path / "broken.npz"
    broken.write_bytes((DATA / "bitnet-packed" / "golden.npz").read_bytes()[:1000])
    assert "broken.npz" in golden_failures(broken)["golden logits"]
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    assert "ids_0" in golden_failures(tmp_path / "other.npz")["golden logits"]
    np.savez(
        tmp_path / "short.npz",
        ids_0=np.zeros(2, np.uint32),
        logits_0=np.zeros((3, 1024), np.float32),
    )
    assert "shape" in golden_failures(tmp_path / "short.npz")["golden logits"]


def test_a_single_array_is_no_golden_file(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.zeros(2, np.uint32))
    assert "ids.npy: holds a single array" in golden_failures(tmp_path / "ids.npy")["golden logits"]


def renamed(old: str, new: str) -> Callable[[dict[str, np.ndarray]], None]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[new] = arrays.pop(old)

    return change


def replaced(name: str, value: np.ndarray) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("ids_0", "ids_4"), "no array named ids_0"),
        (renamed("ids_1", "ids_7"), "no array named ids_1"),
        (renamed("ids_3", "other"), "an array greedy_3, but no ids"),
        (renamed("logits_2", "other"), "no array named logits_2"),
        (renamed("logits_0", "logits_00"), "no array named logits_0"),
        (replaced("greedy_x", np.zeros(1, np.uint32)), "an array greedy_x, but no ids"),
        (replaced("ids_0", np.zeros((1, 6), np.uint32)), "array ids_0 is uint32 of shape (1, 6)"),
        (replaced("ids_0", np.full(6, 1.5)), "array ids_0 is float64"),
        (replaced("ids_0", np.array([], np.uint32)), "array ids_0 is uint32 of shape (0,)"),
        (replaced("ids_0", np.full(6, -1)), "array ids_0 has ids from -1 to -1"),
        (replaced("ids_0", np.full(6, 2**32)), "the model's vocabulary has 0 to 1023"),
        (replaced("greedy_0", np.array([], np.uint32)), "array greedy_0 is uint32 of shape (0,)"),
        (replaced("greedy_1", np.full(24, 1.5)), "array greedy_1 is float64"),
        (replaced("logits_0", np.zeros((6, 1024), np.int64)), "array logits_0 is int64"),
        (replaced("logits_0", np.zeros(6)), "array logits_0 is float64 of shape (6,)"),
        (replaced("logits_0", np.array([None])), "allow_pickle"),
    ],
)
def test_nothing_of_a_golden_file_is_left_out(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    wrong = golden_failures(write_golden(tmp_path / "g.npz", change))
    assert list(wrong) == ["golden logits"]
    assert "g.npz: " in wrong["golden logits"]
    assert message in wrong["golden logits"]


def test_greedy_tokens_may_be_absent_but_not_all_too_close_to_call(tmp_path: Path) -> None:
    def without_greedy(arrays: dict[str, np.ndarray]) -> None:
        for n in range(4):
            del arrays[f"greedy_{n}"]

    golden = write_golden(tmp_path / "g.npz", without_greedy)
    with bitnet_rs.load(DATA / "bitnet-packed") as model:
        checks = list(verify._check_golden(model.core, golden))
    assert [(check.name, check.ok) for check in checks] == [("golden logits", True)]

    core: Any = Core(synthetic.synthetic("tiny").build(), lambda core, batch, rows: rows.fill(0))
    one = np.zeros(1, np.uint32)
    check = verify._golden_greedy(core, [(one, np.zeros((1, 1024), np.float32), one)])
    assert not check.ok
    assert "0 tokens" in check.detail


def test_an_error_on_a_golden_prompt_is_a_failed_check() -> None:
    def spoil(core: Core, batch: Batch, rows: np.ndarray) -> None:
        raise RuntimeError("no such luck")

    with bitnet_rs.load(DATA / "bitnet-packed") as model:
        core: Any = Core(model.core, spoil)
        checks = list(verify._check_golden(core, DATA / "bitnet-packed" / "golden.npz"))
    assert [(check.name, check.ok) for check in checks] == [("golden logits", False)]
    assert "golden.npz: RuntimeError: no such luck" in checks[0].detail


def test_files_that_are_gone_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "bitnet-packed", folder)
    with bitnet_rs.load(folder) as model:
        (folder / "config.json").unlink()
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            verify.run(model)


@pytest.mark.parametrize(
    ("in_use", "few", "counts"),
    [
        (1, False, [2, 3]),
        (2, False, [1, 3]),
        (5, False, [1, 2, 3, 4]),
        (64, False, [1, 2, 3, 32, 63]),
        (1, True, [2]),
        (8, True, [1]),
    ],
)
def test_thread_counts(in_use: int, few: bool, counts: list[int]) -> None:  # noqa: FBT001
    assert verify._thread_counts(in_use, few=few) == counts
