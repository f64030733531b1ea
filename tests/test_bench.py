"""Benchmarks, random models and facts about the machine. No time is asserted anywhere."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from bitnet_rs import _core, bench, machine, synthetic, system


def make_cpus(root: Path, siblings: Mapping[int, str], file: str = "core_cpus_list") -> Path:
    for cpu, listed in siblings.items():
        topology = root / "devices/system/cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / file).write_text(f"{listed}\n")
    return root


@pytest.mark.parametrize("file", ["core_cpus_list", "thread_siblings_list"])
def test_cores_with_two_threads_each_count_once(tmp_path: Path, file: str) -> None:
    root = make_cpus(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, file)
    assert system.count_cores([0, 1, 2, 3], root) == 2
    assert system.count_cores([0, 2], root) == 1
    assert system.count_cores([2, 3], root) == 2


def test_cores_are_unknown_without_topology(tmp_path: Path) -> None:
    root = make_cpus(tmp_path, {0: "0"})
    assert system.count_cores([0, 1], root) is None
    assert system.count_cores([], root) is None


def cgroups(tmp_path: Path, own: str, files: Mapping[str, str]) -> tuple[Path, Path]:
    """The root of a tree of control groups, and the file that names the process's own."""
    root = tmp_path / "cgroup"
    root.mkdir()
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    own_file = tmp_path / "own"
    own_file.write_text(f"{own}\n")
    return root, own_file


@pytest.mark.parametrize(
    ("own", "files", "quota"),
    [
        # version 2: unlimited, limited, limited by a parent, a path of the host's
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {"a/cpu.max": "150000 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/not/here", {"cpu.max": "300000 100000"}, 3.0),
        ("0::/", {}, None),
        # version 1: by the controllers' joint name, by the link, unlimited
        (
            "5:memory:/x\n4:cpu,cpuacct:/a",
            {
                "cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
                "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        # nothing that could be understood
        ("0::/a", {"a/cpu.max": "garbage"}, None),
        ("0::/a", {"a/cpu.max": "100000 0"}, None),
        ("nonsense", {}, None),
    ],
)
def test_cgroup_quota(
    tmp_path: Path, own: str, files: Mapping[str, str], quota: float | None
) -> None:
    assert system.cgroup_cpu_quota(*cgroups(tmp_path, own, files)) == quota


@pytest.mark.parametrize(
    ("own", "files", "limit"),
    [
        ("0::/a", {"a/memory.max": "max"}, None),
        ("0::/a/b", {"a/b/memory.max": "4000", "a/memory.max": "3000"}, 3000),
        ("0::/not/here", {"memory.max": "5000"}, 5000),
        ("3:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": "7000"}, 7000),
        # version 1 without a limit
        ("3:memory:/", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("4:cpu:/x", {"memory/x/memory.limit_in_bytes": "7000"}, None),
        ("0::/a", {"a/memory.max": "plenty"}, None),
        ("nonsense", {}, None),
    ],
)
def test_cgroup_memory(
    tmp_path: Path, own: str, files: Mapping[str, str], limit: int | None
) -> None:
    assert system.cgroup_memory_limit(*cgroups(tmp_path, own, files)) == limit


def test_memory_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "memory_bytes", lambda: 8000)
    for limit, chosen in ((None, 2000), (4000, 1000), (100, 300)):
        monkeypatch.setattr(system, "cgroup_memory_limit", lambda limit=limit: limit)
        assert machine.choose_kv_memory(None, 300) == chosen
        assert machine.choose_kv_memory(50, 300) == 50


def test_quota_is_none_without_cgroups(tmp_path: Path) -> None:
    assert system.cgroup_cpu_quota(tmp_path / "none", tmp_path / "nowhere") is None


@pytest.mark.parametrize(("quota", "threads"), [(None, 4), (2.9, 2), (0.5, 1), (64.0, 4)])
def test_default_threads_are_capped_by_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: int
) -> None:
    monkeypatch.setattr(system, "physical_cores", lambda: 4)
    monkeypatch.setattr(system, "cgroup_cpu_quota", lambda: quota)
    assert system.default_threads() == threads


def test_this_machine() -> None:
    assert 1 <= system.default_threads() <= system.physical_cores() <= (os.cpu_count() or 1)
    memory = system.memory_bytes()
    peak = system.peak_rss_bytes()
    assert memory is None or memory > 2**28
    # An interpreter with numpy loaded has at least some megabytes, and fits the machine.
    assert peak is None or 2**23 < peak < 2**50
    assert system.cpu_name()


def test_cpu_name_and_peak_from_files(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast CPU: Model 1\nmodel name\t: Other\n")
    assert system.cpu_name(cpuinfo) == "Fast CPU: Model 1"
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t   9 kB\nVmHWM:\t   12 kB\n")
    assert system.peak_rss_bytes(status) == 12 * 1024


@pytest.mark.parametrize("name", synthetic.SHAPES)
def test_synthetic_configs_are_whole(name: str) -> None:
    model = synthetic.synthetic(name)
    config = model.config
    assert config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    tensors = set(model.weights)
    assert len(tensors) == len(model.weights)
    assert ("lm_head.weight" in tensors) is not config["tie_word_embeddings"]
    sub_norms = any(tensor.endswith("attn_sub_norm.weight") for tensor in tensors)
    assert sub_norms is (config["model_type"] == "bitnet")


@pytest.mark.parametrize(
    ("name", "params"),
    # 2b-4t: the count that its model card gives. 8b: Llama-3-8B's. 3b: "3.3B" in its paper.
    [("2b-4t", 2_412_820_480), ("8b", 8_030_261_248), ("3b", 3_324_387_840)],
)
def test_synthetic_sizes_are_the_published_ones(name: str, params: int) -> None:
    shapes = synthetic._tensor_shapes(synthetic._SHAPES[name])
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == params


def test_synthetic_weights_are_what_the_core_takes() -> None:
    model = synthetic.synthetic("tiny")
    for name in model.weights:
        tensor = model.weights[name]
        if name.endswith("_scale"):
            assert tensor.dtype == np.float32
            assert tensor.shape == (1,)
        elif "_proj." in name:
            assert tensor.dtype == np.int8
            counts = [int((tensor == trit).sum()) for trit in (-1, 0, 1)]
            assert sum(counts) == tensor.size
            assert min(counts) > tensor.size / 4
        elif "norm" in name:
            assert tensor.dtype == np.float32
            assert tensor.ndim == 1
        else:
            assert tensor.dtype == np.uint16
    with pytest.raises(KeyError):
        model.weights["model.layers.0.self_attn.q_proj.bias"]


def test_synthetic_weights_depend_on_seed_and_name_only() -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    first = synthetic.synthetic("tiny", seed=3)
    second = synthetic.synthetic("tiny", seed=3)
    assert second.weights["model.embed_tokens.weight"].any()
    assert np.array_equal(first.weights[name], second.weights[name])
    other = synthetic.synthetic("tiny", seed=4).weights[name]
    assert not np.array_equal(first.weights[name], other)
    layer_0 = first.weights["model.layers.0.mlp.down_proj.weight"]
    assert not np.array_equal(first.weights[name], layer_0)


def test_rows_longer_than_the_pool_are_filled() -> None:
    pool = np.arange(10, dtype=np.int8)
    filled = synthetic._copy_at_random(pool, (7, 9), np.random.default_rng(0))
    assert filled.shape == (7, 9)
    steps = np.diff(filled.ravel()) % 10
    assert (steps == 1).sum() > 40  # runs of the pool, one after the other
    assert set(np.unique(filled)) <= set(range(10))


def test_bfloat16_rounds_to_nearest_even() -> None:
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 0.0], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2**-6, -1 - 2**-7, 0.0], np.float32)
    widened = synthetic._to_bfloat16(values).astype(np.uint32) << 16
    assert np.array_equal(widened.view(np.float32), expected)


def test_unknown_shape_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'70b'.*2b-4t, 3b, 8b"):
        synthetic.synthetic("70b")


@pytest.fixture(scope="module")
def tiny() -> _core.Model:
    return synthetic.synthetic("tiny").build(threads=1)


def test_activations_of_a_random_model_stay_sane(tiny: _core.Model) -> None:
    ids = np.arange(100, dtype=np.uint32)
    logits = tiny.forward([(ids, tiny.new_cache(100))], logits="all")
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


def test_report(tiny: _core.Model) -> None:
    said: list[str] = []
    report = bench.run(
        tiny, name="t", prompt_tokens=70, new_tokens=5, repetitions=2, on_progress=said.append
    )
    assert report.prompt_tokens == 70
    assert report.new_tokens == 5
    assert report.kernel == tiny.kernel
    assert report.threads == 1
    assert report.kv_dtype == "f16"
    assert report.bytes_per_token == tiny.facts["bytes_per_token"]
    assert len(report.runs) == 2
    assert report.prefill_tokens_per_s > 0
    # 2 layers, 2 key/value heads of 16, float16, keys and values; 73 positions on average
    assert report.kv_bytes_per_token == 2 * 2 * 16 * 2 * 2 * 73
    read = report.bytes_per_token + report.kv_bytes_per_token
    in_all = report.decode_tokens_per_s * read / 1e9
    assert report.read_gb_per_s == pytest.approx(in_all)
    assert report.memory_read_gb_per_s is not None
    assert report.read_percent == pytest.approx(
        100 * report.read_gb_per_s / report.memory_read_gb_per_s
    )
    assert any("run 2 of 2" in line for line in said)
    assert 1 <= report.rescored_per_token <= 307
    assert report.full_heads <= 2 * (5 + 1)
    for profile in (report.profile, report.prefill_profile):
        assert sum(row.percent for row in profile) == pytest.approx(100)
    assert report.prefill_gmac_per_s > 0
    assert {"q, k, v", "attention", "head: scan"} <= {row.name for row in report.profile}
    # One thread waits for nobody.
    assert report.waiting_percent == report.alone_percent == 0
    content = json.loads(json.dumps(report.to_dict()))
    assert content["runs"][0].keys() == {"prefill_s", "decode_s"}
    assert content["build_profile"] in ("release", "debug")


@pytest.mark.parametrize("room", [1 << 26, 0])
def test_without_memory_for_the_bandwidth_the_rest_is_reported(
    tiny: _core.Model, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    asked: list[int] = []

    def read_bandwidth(threads: int, n_bytes: int = 1 << 29) -> float:
        asked.append(n_bytes)
        if n_bytes > room:
            raise RuntimeError(f"no memory for a buffer of {n_bytes} bytes")
        return 20.0

    monkeypatch.setattr(_core, "read_bandwidth", read_bandwidth)
    report = bench.run(tiny, name="t", prompt_tokens=4, new_tokens=2, repetitions=1)
    assert asked == [1 << 29, 1 << 26]
    assert report.decode_tokens_per_s > 0
    found = report.memory_read_gb_per_s, report.read_percent
    assert found == ((20.0, pytest.approx(5 * report.read_gb_per_s)) if room else (None, None))


def test_bench_runs_the_steps_it_counts(tiny: _core.Model) -> None:
    calls: list[tuple[int, int]] = []

    class Counting:
        facts, kernel, threads = tiny.facts, tiny.kernel, tiny.threads
        batch_kernels = tiny.batch_kernels
        new_cache = staticmethod(tiny.new_cache)

        profile = staticmethod(tiny.profile)

        @property
        def head_use(self) -> dict[str, int]:
            return tiny.head_use

        def forward_top(
            self, batch: list[tuple[np.ndarray, _core.KvCache]], top: list[int]
        ) -> list[tuple[np.ndarray | None, np.ndarray]]:
            calls.append((len(batch[0][0]), top[0]))
            return tiny.forward_top(batch, top)

    bench.run(
        Counting(),  # type: ignore[arg-type]  # as much of the core as is used
        name="t",
        prompt_tokens=25,
        new_tokens=3,
        repetitions=2,
        chunk_tokens=10,
    )
    # Logits of the prompt's last token only, and of each that follows. Warm-up, runs, profile.
    one = [(10, 0), (10, 0), (5, 1), (1, 1), (1, 1), (1, 1)]
    assert calls == 4 * one


def test_lengths_left_open_fit_the_context(tiny: _core.Model) -> None:
    report = bench.run(tiny, name="t", repetitions=1, context_length=100)
    assert (report.prompt_tokens, report.new_tokens) == (75, 25)
    report = bench.run(tiny, name="t", repetitions=1, new_tokens=200)
    assert (report.prompt_tokens, report.new_tokens) == (56, 200)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 250, "new_tokens": 7}, "257, but the model's context holds 256"),
        ({"prompt_tokens": 60, "new_tokens": 7, "context_length": 50}, "holds 50"),
        ({"new_tokens": 256}, "holds 256"),
        ({"prompt_tokens": 0}, "prompt_tokens is 0"),
        ({"prompt_tokens": 2.5}, "prompt_tokens is 2.5; wanted an integer >= 1"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"repetitions": 0}, "repetitions is 0"),
    ],
)
def test_bad_lengths(tiny: _core.Model, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.run(tiny, name="t", **options)  # type: ignore[arg-type]
