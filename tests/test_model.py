"""`load`, `Model` and `Chat` on the bundled model: what users touch."""

import gc
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bitnet_rs as br
from bitnet_rs import _core, completion
from bitnet_rs.engine import Event, FinishReason, Request, Running

DEMO = Path(__file__).parents[1] / "python" / "bitnet_rs" / "demo"
DATA = Path(__file__).parent / "data"
PROMPTS = ["Once upon a time there was", "The", "Chapter 12\n\nIt was a cold day, and she"]
TALK = ["Hello! How are you today?", "What do you like to do for fun?", "Nice. Any pets?"]
GREEDY: Any = {"temperature": 0, "max_tokens": 16}
SEEDED: Any = {"seed": 1, "max_tokens": 16}


@pytest.fixture(scope="module")
def model() -> Iterator[br.Model]:
    with br.load() as loaded:
        yield loaded


def copy_of_demo(tmp_path: Path, **changes: Any) -> Path:
    """The demo checkpoint in a folder of its own, with fields of its JSON files replaced."""
    shutil.copytree(DEMO, tmp_path, dirs_exist_ok=True)
    for name, fields in changes.items():
        file = tmp_path / f"{name}.json"
        content = json.loads(file.read_text(encoding="utf-8")) | fields
        content = {key: value for key, value in content.items() if value is not ...}
        file.write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


# Facts.


def test_a_loaded_model_says_what_it_is(model: br.Model) -> None:
    assert (model.name, model.vocab_size, model.context_length) == ("demo", 4096, 512)
    assert model.stop_ids == {4094, 4095}
    assert model.kernel in _core.kernels()
    assert model.facts["params"] == 5_776_640
    text = repr(model)
    for part in ("demo: bitnet, 5.8 M parameters, 4.7 M", model.kernel, "yes: ", "512 tokens"):
        assert part in text
    assert f"{model.facts['packed_bytes'] / 1e6:.1f} MB" in text  # type: ignore[operator]


def test_info_is_what_a_bug_report_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_RS_THREADS", "3")
    monkeypatch.setenv("BITNET_RS_KERNEL", "generic-i2")
    found = br.info()
    assert (found.threads, found.kernel) == (3, "generic-i2")
    assert found.kernels == tuple(_core.kernels())
    assert found.version == br.__version__ == _core.__version__
    assert json.loads(json.dumps(found.to_dict()))["versions"]["numpy"] == np.__version__
    assert "generic-i2" in str(found)
    assert found.cpu in str(found)


def test_environment_sets_threads_and_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_RS_THREADS", "1")
    monkeypatch.setenv("BITNET_RS_KERNEL", "generic-i2")
    assert (br.load().threads, br.load().kernel) == (1, "generic-i2")
    fastest = _core.kernels()[0]
    loaded = br.load(threads=2, kernel=fastest)  # an argument goes before the environment
    assert (loaded.threads, loaded.kernel) == (2, fastest)
    monkeypatch.setenv("BITNET_RS_THREADS", "")
    monkeypatch.setenv("BITNET_RS_KERNEL", "auto")
    assert br.load().kernel in _core.kernels()


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "10000", "²"])
def test_bad_thread_count_in_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_RS_THREADS", value)
    with pytest.raises(ValueError, match=f"BITNET_RS_THREADS is '{value}'; wanted an integer"):
        br.load()


def test_bad_kernel_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITNET_RS_KERNEL", "fast")
    with pytest.raises(ValueError, match=r"BITNET_RS_KERNEL is 'fast'.*generic-i2"):
        br.load()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads is 0; wanted"),
        ({"threads": True}, "threads is True; wanted"),
        ({"kernel": "fast"}, "kernel is 'fast'; this CPU can run .*generic-i2"),
        ({"kv_dtype": "f8"}, "kv_dtype is 'f8'; wanted 'f16' or 'f32'"),
        ({"context": 0}, "context is 0; wanted an integer from 1 to 512"),
        ({"context": 513}, "context is 513; wanted an integer from 1 to 512"),
    ],
)
def test_bad_arguments_of_load(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        br.load(**arguments)


# Generating.


def test_greedy_text(model: br.Model) -> None:
    # The beginning of greedy_text in the model's golden.json.
    assert model.generate(PROMPTS[0], **GREEDY) == ' a very good deal.\n"Certainly, sir," said I,'


@pytest.mark.parametrize("options", [GREEDY, SEEDED, {**SEEDED, "repetition_penalty": 1.3}])
def test_one_or_a_list_is_the_same_text(model: br.Model, options: Any) -> None:
    one_by_one = [model.generate(prompt, **options) for prompt in PROMPTS]
    assert model.generate(PROMPTS, **options) == one_by_one
    assert model.generate([], **options) == []


def test_stream_is_generate_in_pieces(model: br.Model) -> None:
    for options in (GREEDY, SEEDED):
        with model.stream(PROMPTS[0], **options) as stream:
            pieces = list(stream)
        assert all(pieces)
        assert len(pieces) > 5
        assert "".join(pieces) == model.generate(PROMPTS[0], **options)
        assert stream.completion.text == "".join(pieces)


def test_seeds_make_text_repeatable_and_different(model: br.Model) -> None:
    texts = [model.generate("The", seed=seed, max_tokens=12) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    unseeded = {model.generate("The", max_tokens=12) for _ in range(4)}
    assert len(unseeded) > 1  # four equal ones: below 1e-20


def test_several_completions_count_their_seeds_up(model: br.Model) -> None:
    several = model.complete("The", n=3, seed=5, max_tokens=8)
    assert isinstance(several, list)
    singles = [model.complete("The", seed=5 + i, max_tokens=8).text for i in range(3)]
    assert [each.text for each in several] == singles


def test_text_does_not_depend_on_threads_or_kernel(model: br.Model) -> None:
    expected = model.generate(PROMPTS, **SEEDED)
    for kernel in _core.kernels():
        for threads in (1, 2):
            with br.load(kernel=kernel, threads=threads) as other:
                assert other.generate(PROMPTS, **SEEDED) == expected


def test_completion_tells_everything(model: br.Model) -> None:
    result = model.complete(PROMPTS[0], **GREEDY)
    assert result.finish_reason == "length"
    assert model.decode(result.tokens) == result.text == str(result)
    usage = result.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (9, 16, 0)
    assert usage.total_tokens == 25
    timings = result.timings
    assert timings.prefill_tokens_per_s == pytest.approx(9 / timings.prefill_s)
    assert timings.decode_tokens_per_s == pytest.approx(15 / timings.decode_s)
    assert result.logprobs is None


def test_token_ids_are_a_prompt_too(model: br.Model) -> None:
    ids = model.encode(PROMPTS[0])
    expected = model.complete(PROMPTS[0], **GREEDY).tokens
    for prompt in (ids, np.array(ids), np.array(ids, np.uint16), tuple(ids)):
        assert model.complete(prompt, **GREEDY).tokens == expected
    assert model.complete(ids[1:], **GREEDY).tokens != expected  # no BOS is added to ids


def test_stop_token_ends_the_text(model: br.Model) -> None:
    prompt = "User: Hello! How are you today?<|eot_id|>Assistant: "
    result = model.complete(prompt, temperature=0, max_tokens=48)
    assert (result.text, result.finish_reason) == ("I'm doing great! How are you?", "stop")
    assert not set(result.tokens) & model.stop_ids
    on = model.complete(prompt, temperature=0, max_tokens=48, ignore_eos=True)
    assert on.finish_reason == "length"
    assert on.tokens[: len(result.tokens) + 1] == [*result.tokens, 4095]


@pytest.mark.parametrize("stop", [" sir", ["zzz", "nly, s"], "Certainly", '\n"Cert', " a very"])
def test_stop_string_cuts_the_text(model: br.Model, stop: Any) -> None:
    whole = model.generate(PROMPTS[0], **GREEDY)
    strings = [stop] if isinstance(stop, str) else stop
    expected = whole[: min(at for s in strings if (at := whole.find(s)) >= 0)]
    result = model.complete(PROMPTS[0], stop=stop, **GREEDY)
    assert (result.text, result.finish_reason) == (expected, "stop")
    assert whole.startswith(model.decode(result.tokens))
    with model.stream(PROMPTS[0], stop=stop, **GREEDY) as stream:
        assert "".join(stream) == expected
    assert model.generate(PROMPTS, stop=stop, **GREEDY)[0] == expected


def test_stop_string_that_does_not_come_loses_nothing(model: br.Model) -> None:
    whole = model.generate(PROMPTS[0], **GREEDY)
    never = whole[-4:] + "!!"  # its beginning is held back until the very end
    result = model.complete(PROMPTS[0], stop=never, **GREEDY)
    assert (result.text, result.finish_reason) == (whole, "length")


def test_stop_string_that_is_a_special_token_stops_on_it(model: br.Model) -> None:
    prompt = "User: Hello! How are you today?<|eot_id|>Assistant: "
    options: Any = {"temperature": 0, "max_tokens": 48, "ignore_eos": True}
    result = model.complete(prompt, stop="<|eot_id|>", **options)
    assert (result.text, result.finish_reason) == ("I'm doing great! How are you?", "stop")


def test_logprobs_agree_with_logits(model: br.Model) -> None:
    ids = model.encode(PROMPTS[0])
    result = model.complete(ids, logprobs=3, seed=4, max_tokens=10, ignore_eos=True)
    assert result.logprobs is not None
    assert [step.token for step in result.logprobs] == result.tokens
    rows = model.logits(ids + result.tokens[:-1])[len(ids) - 1 :].astype(np.float64)
    expected = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    for step, row in zip(result.logprobs, expected, strict=True):
        assert step.logprob == pytest.approx(row[step.token], abs=1e-9)
        assert [top.token for top in step.top] == np.argsort(-row, kind="stable")[:3].tolist()
        assert [top.logprob for top in step.top] == pytest.approx(np.sort(row)[:-4:-1], abs=1e-9)
        assert step.text == model.tokenizer.token_text(step.token)
    only_own = model.complete(ids, logprobs=0, seed=4, max_tokens=2).logprobs
    assert only_own is not None
    assert [step.top for step in only_own] == [(), ()]


def test_logits_of_long_inputs_are_those_of_one_chunk(model: br.Model) -> None:
    ids = np.random.default_rng(0).integers(0, 4096, 512)
    rows = model.logits(ids)
    assert rows.shape == (512, 4096)
    assert rows.dtype == np.float32
    whole = model.core.forward([(ids.astype(np.uint32), model.new_cache())], logits="all")
    np.testing.assert_array_equal(rows, whole)


def test_the_context_caps_what_is_generated() -> None:
    with br.load(context=20) as model:
        result = model.complete(PROMPTS[0], temperature=0, max_tokens=1000, ignore_eos=True)
        assert (result.usage.total_tokens, result.finish_reason) == (20, "length")
        with pytest.raises(
            ValueError, match=r"prompt has 20 tokens; the context holds 20, .*\(up to 512\)"
        ):
            model.complete([5] * 20)
        assert len(model.logits([5] * 20)) == 20
        with pytest.raises(ValueError, match="ids has 21 tokens; the context holds 20"):
            model.logits([5] * 21)


# Defaults of the checkpoint.


def test_defaults_come_from_generation_config(model: br.Model) -> None:
    settings = model.settings()
    assert settings.params == br.SamplingParams(temperature=0.7, top_p=0.9)
    assert model.settings(temperature=0, top_p=0.5).params == br.SamplingParams(top_p=0.5)
    assert model.complete("The", seed=1, ignore_eos=True).usage.completion_tokens == 128


def test_without_do_sample_decoding_is_greedy(tmp_path: Path) -> None:
    changes = {"do_sample": False, "repetition_penalty": 1.2, "max_new_tokens": ...}
    with br.load(copy_of_demo(tmp_path, generation_config=changes)) as model:
        assert model.settings().params == br.SamplingParams(repetition_penalty=1.2)
        assert model.settings(temperature=1.0).params.temperature == 1.0
        assert model.complete("The", ignore_eos=True).usage.completion_tokens == 128


def test_without_generation_config_decoding_is_greedy(tmp_path: Path) -> None:
    copy_of_demo(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    with br.load(tmp_path) as model:
        assert model.settings().params == br.SamplingParams()
        # One from config.json, the other because chats of this family end turns with it.
        assert model.stop_ids == {4094, 4095}


def test_sampling_without_a_temperature_means_one(tmp_path: Path) -> None:
    changes = {"temperature": None, "top_p": ..., "top_k": 50}
    with br.load(copy_of_demo(tmp_path, generation_config=changes)) as model:
        assert model.settings().params == br.SamplingParams(temperature=1.0, top_k=50)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("generation_config", "do_sample", "false"),
        ("generation_config", "do_sample", 0),
        ("generation_config", "temperature", "hot"),
        ("generation_config", "top_p", 7),
        ("generation_config", "max_new_tokens", 0),
        ("generation_config", "eos_token_id", "x"),
        ("config", "eos_token_id", [1.5]),
    ],
)
def test_bad_defaults_name_file_and_field(
    tmp_path: Path, file: str, field: str, value: object
) -> None:
    folder = copy_of_demo(tmp_path, **{file: {field: value}})
    with pytest.raises(ValueError, match=rf"{file}\.json: {field} is .*; wanted"):
        br.load(folder)


def test_without_a_tokenizer_ids_still_work(tmp_path: Path, model: br.Model) -> None:
    copy_of_demo(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with br.load(tmp_path) as bare:
        np.testing.assert_array_equal(bare.logits([1, 2, 3]), model.logits([1, 2, 3]))
        for use in (
            bare.chat,
            lambda: bare.encode("a"),
            lambda: bare.generate("a"),
            lambda: bare.complete([1, 2]),
            lambda: bare.stream([1, 2]),
        ):
            with pytest.raises(
                FileNotFoundError,
                match=r"has no tokenizer; wanted.*only logits\(\) and core\.forward\(\) work",
            ):
                use()


# Bad input.


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty; wanted some text"),
        ([], "prompt has no tokens; wanted at least one"),
        ([1, 4096], r"token id 4096 at position 1; wanted ids from 0 to 4095"),
        ([-1], r"token id -1 at position 0"),
        ([2**70], f"token id {2**70} at position 0; wanted ids from 0 to 4095"),
        ([1.5], r"prompt has the shape \(1,\) and holds float64; wanted integers"),
        ([[1, 2]], r"prompt has the shape \(1, 2\)"),
        ([[1], [2, 3]], "prompt is not a flat sequence"),
        ([True], "holds bool; wanted integers"),
        ("a " * 600, r"prompt has \d+ tokens; the context holds 512, .*: shorten it$"),
    ],
)
def test_bad_prompts(model: br.Model, prompt: Any, message: str) -> None:
    for use in (model.complete, model.stream):
        with pytest.raises(ValueError, match=message):
            use(prompt)


def test_wrong_types_are_named(model: br.Model) -> None:
    uses: list[tuple[Callable[[Any], Any], str]] = [
        (model.generate, "prompt is of type {}; wanted a str, or a list of them"),
        (model.complete, "prompt is of type {}; wanted a str, or a sequence of token ids"),
        (model.stream, "prompt is of type {}; wanted a str, or a sequence of token ids"),
        (model.decode, "ids is of type {}; wanted a sequence of token ids"),
        (model.logits, "ids is of type {}; wanted a sequence of token ids"),
        (lambda x: model.generate("a", stop=x), "stop is of type {}; wanted a str, or a list"),
        (lambda x: setattr(model.chat(), "messages", x), "messages is of type {}; wanted a list"),
        (lambda x: model.chat(system=x), "system is of type {}; wanted a str"),
    ]
    for use, message in uses:
        with pytest.raises(TypeError, match=message.format("int")):
            use(5)
    for use, message in (*uses[:5], uses[6]):
        with pytest.raises(TypeError, match=message.format("NoneType")):
            use(None)


def test_numpy_integers_are_integers(model: br.Model) -> None:
    one = np.int64(1)
    with br.load(threads=one, context=np.int16(100)) as loaded:  # type: ignore[arg-type]
        assert (type(loaded.threads), type(loaded.context_length)) == (int, int)
        assert (loaded.threads, loaded.context_length) == (1, 100)
        assert loaded.new_cache(np.uint8(7)).capacity == 7  # type: ignore[arg-type]
    options: Any = {"max_tokens": np.uint8(4), "logprobs": one, "n": one, "top_k": one, "seed": one}
    found = model.complete("The", **options)
    expected = model.complete("The", max_tokens=4, logprobs=1, n=1, top_k=1, seed=1)
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    copy_of_demo(tmp_path)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    last = max(content["added_tokens"], key=lambda token: int(token["id"]))
    content["added_tokens"].append({**last, "id": 5000, "content": "<|extra|>"})
    file.write_text(json.dumps(content), encoding="utf-8")
    with br.load(tmp_path) as odd:
        wanted = r"{} has the token id \d+: .*tokenizer\.json has more .* 4096 in config\.json"
        with pytest.raises(ValueError, match=wanted.format("prompt")):
            odd.complete("The <|extra|>")
        with pytest.raises(ValueError, match=wanted.format("the conversation")):
            odd.chat().send("The <|extra|>")
        assert odd.generate("The", **GREEDY)


@pytest.mark.parametrize("capacity", [0, -1, 513, 2**70, 2.5, True])
def test_bad_capacities_are_refused(model: br.Model, capacity: Any) -> None:
    with pytest.raises(ValueError, match=r"capacity is .*; wanted an integer from 1 to 512"):
        model.new_cache(capacity)


def test_bad_prompts_in_a_list_are_counted(model: br.Model) -> None:
    with pytest.raises(ValueError, match=r"prompt\[1\] is empty"):
        model.generate(["a", ""])
    with pytest.raises(TypeError, match=r"prompt\[0\] is a int; wanted a str.*complete\(\)"):
        model.generate([1, 2])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; wanted an integer >= 1"),
        ({"max_tokens": 2.0}, "max_tokens is 2.0; wanted"),
        ({"temperature": -1}, "temperature is -1; wanted"),
        ({"logprobs": -1}, "logprobs is -1; wanted an integer >= 0"),
        ({"logprobs": True}, "logprobs is True; wanted"),
        ({"stop": ""}, "stop has ''; wanted strings that are not empty"),
        ({"stop": ["a", 5]}, "stop has 5; wanted"),
        ({"n": 0}, "n is 0; wanted an integer >= 1"),
    ],
)
def test_bad_options_are_named(model: br.Model, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.complete("The", **options)


def test_unknown_options_are_refused(model: br.Model) -> None:
    for use in (model.generate, model.stream, model.complete, model.chat().send):
        with pytest.raises(TypeError, match="temprature"):
            use("The", temprature=1)  # type: ignore[call-overload, call-arg]


def test_a_closed_model_says_so() -> None:
    model = br.load()
    stream = model.stream(PROMPTS[0], **GREEDY)
    first = next(stream)
    model.close()
    model.close()
    assert first + "".join(stream)  # what runs already goes on
    with pytest.raises(RuntimeError, match="the model 'demo' was closed; load it again"):
        model.generate("The")


# Cancelling and sharing.


def test_closing_a_stream_cancels(model: br.Model) -> None:
    stream = model.stream(PROMPTS[0], temperature=0, max_tokens=400)
    pieces = [next(stream), next(stream)]
    with pytest.raises(RuntimeError, match="has not ended"):
        _ = stream.completion
    stream.close()
    assert list(stream) == []
    result = stream.completion
    assert (result.text, result.finish_reason) == ("".join(pieces), "cancelled")
    assert result.usage.completion_tokens < 10
    never_started = model.stream("The")
    never_started.close()
    assert never_started.completion.finish_reason == "cancelled"


@pytest.mark.parametrize(
    "open_stream",
    [
        lambda model: model.stream(PROMPTS[0], temperature=0, max_tokens=400),
        lambda model: model.chat().stream(TALK[0], temperature=0, ignore_eos=True),
    ],
    ids=["stream", "chat"],
)
def test_dropping_a_stream_ends_its_sequence(
    model: br.Model, open_stream: Callable[[br.Model], br.Stream]
) -> None:
    stream = open_stream(model)
    next(stream)
    sequence = stream._reply.sequence
    gc.disable()  # by reference counts alone, so at once
    try:
        del stream
        until_idle(model)  # the step under way is computed to its end
        assert sequence.finish_reason == "cancelled"
        assert sequence.n_generated < 100
    finally:
        gc.enable()


def test_ctrl_c_ends_a_stream(model: br.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = model.stream(PROMPTS[0], temperature=0, max_tokens=400)
    said = next(stream)

    def interrupted(events: Any) -> Any:
        raise KeyboardInterrupt

    # Where it lands: the thread that computes gets no signals.
    monkeypatch.setattr(completion, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        "".join(stream)
    result = stream.completion
    assert result.text.startswith(said)
    assert result.finish_reason == "cancelled"
    until_idle(model)
    assert stream._reply.sequence.finish_reason == "cancelled"


def until_idle(model: br.Model) -> None:
    """Waits until nothing runs; the limit is for a machine that stands still."""
    deadline = time.monotonic() + 60
    while (stats := model.runner.stats()).active or stats.waiting:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_stream_does_not_run_far_ahead_of_its_reader(model: br.Model) -> None:
    with model.stream(PROMPTS[0], temperature=0, ignore_eos=True, max_tokens=400) as stream:
        next(stream)
        # Others are served while it waits to be read.
        assert model.generate(PROMPTS[1], max_tokens=40)
        read = len(stream._reply._tokens)
        assert stream._reply.sequence.n_generated <= read + completion._AHEAD
        text = "".join(stream)
    assert len(stream.completion.tokens) == 400
    expected = model.generate(PROMPTS[0], temperature=0, ignore_eos=True, max_tokens=400)
    assert expected.endswith(text)


def test_more_streams_than_run_at_once_can_be_read_in_turns() -> None:
    with br.load(max_sequences=2) as model:
        options: Any = {"temperature": 0, "ignore_eos": True, "max_tokens": 40}
        streams = [model.stream(PROMPTS[i % 3], **options) for i in range(5)]
        texts = [
            "".join(pieces)
            for pieces in zip(*itertools.zip_longest(*streams, fillvalue=""), strict=True)
        ]
        assert texts == [model.generate(PROMPTS[i % 3], **options) for i in range(5)]


def test_prompts_that_begin_alike_are_computed_once(tmp_path: Path) -> None:
    shared = "It was the best of times, it was the worst of times, it was the age of wisdom. "
    prompts = [shared + end for end in ("Once", "The whale", "Emma looked at her sister")]
    with br.load() as model:
        together = model.generate(prompts, temperature=0, max_tokens=12)
        stats = model.runner.stats()
        assert stats.prefix_hits == 2
        assert stats.cached_tokens >= 2 * (len(model.encode(shared)) - 1)
        again = model.complete(prompts[1], temperature=0, max_tokens=12)
        assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
        assert [again.text] == together[1:2]
    with br.load(kv_memory=1 << 20) as small:
        assert [small.generate(p, temperature=0, max_tokens=12) for p in prompts] == together
        assert small.runner.stats().kv_bytes <= 1 << 20


def test_a_request_beyond_the_kv_memory_is_refused() -> None:
    with br.load(kv_memory=1000) as model:
        for run in (model.generate, model.stream, model.chat().send):
            with pytest.raises(ValueError, match=r"MB of keys and values; the limit is 0.0 MB"):
                run("Once")
    for name in ("kv_memory", "max_sequences"):
        with pytest.raises(ValueError, match=f"{name} is 0"):
            br.load(**{name: 0})  # type: ignore[arg-type]


def test_a_closed_model_ends_what_runs_and_takes_no_more() -> None:
    model = br.load()
    stream = model.stream(PROMPTS[0], temperature=0, max_tokens=60)
    said = next(stream)
    runner = model.runner
    model.close()
    rest = "".join(stream)
    assert len(stream.completion.tokens) == 60
    assert said + rest
    with pytest.raises(RuntimeError, match="was closed"):
        runner.submit([stream._reply.sequence.request], print)
    with pytest.raises(RuntimeError, match="was closed"):
        model.generate("Once")


def test_threads_share_a_model(model: br.Model) -> None:
    jobs = [(prompt, seed) for prompt in PROMPTS for seed in (1, 2)]
    expected = [model.generate(prompt, seed=seed, max_tokens=12) for prompt, seed in jobs]
    together = threading.Barrier(3)

    def work(job: tuple[str, int]) -> str:
        together.wait(timeout=30)
        return model.generate(job[0], seed=job[1], max_tokens=12)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, jobs)) == expected


# Chat.


def from_scratch(model: br.Model, messages: list[dict[str, Any]], **options: Any) -> str:
    prompt = model.apply_chat_template(messages)
    return model.generate(prompt, **options)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"seed": 3}])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_chat_is_what_a_fresh_start_would_give(
    model: br.Model, options: Any, system: str | None
) -> None:
    chat = model.chat(system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    before = 0
    for text in TALK:
        messages.append({"role": "user", "content": text})
        expected = from_scratch(model, messages, max_tokens=24, **options)
        with chat.stream(text, max_tokens=24, **options) as stream:
            assert "".join(stream) == expected
        messages.append({"role": "assistant", "content": expected})
        assert chat.messages == messages
        usage = stream.completion.usage
        # The prompt before, but for its last token: the space that ends "Assistant: " becomes
        # part of the answer's first word when the next prompt is encoded.
        assert usage.cached_tokens >= before - 1
        before = usage.prompt_tokens


def test_chat_messages_may_be_edited(model: br.Model) -> None:
    chat = model.chat()
    for text in TALK[:2]:
        chat.send(text, temperature=0, max_tokens=16)
    chat.messages[1]["content"] = "I am a ship."
    messages = [*chat.messages, {"role": "user", "content": TALK[2]}]
    expected = from_scratch(model, messages, temperature=0, max_tokens=16)
    assert chat.send(TALK[2], temperature=0, max_tokens=16) == expected


def test_chat_messages_may_be_any_sequence(model: br.Model) -> None:
    chat = model.chat()
    chat.messages = ({"role": "system", "content": "Be brief."},)
    chat.send(TALK[0], temperature=0, max_tokens=4)
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    mine: list[dict[str, Any]] = []
    chat.messages = mine
    chat.send(TALK[0], temperature=0, max_tokens=4)
    assert mine is chat.messages
    assert len(mine) == 2


@pytest.mark.parametrize("entry", [5, {}, {"role": 5, "content": "a"}])
def test_clear_cures_messages_that_are_none(model: br.Model, entry: Any) -> None:
    chat = model.chat()
    chat.messages = [entry]
    with pytest.raises((TypeError, ValueError), match=r"messages\[0\] .*; wanted"):
        chat.send(TALK[0])
    chat.clear()
    assert chat.messages == []
    assert chat.send(TALK[0], temperature=0, max_tokens=4)


def test_a_chat_template_that_writes_nothing_is_named(tmp_path: Path) -> None:
    copy_of_demo(tmp_path, tokenizer_config={"chat_template": "{# nothing #}"})
    with br.load(tmp_path) as model:
        chat = model.chat()
        with pytest.raises(ValueError, match=r"the chat template writes nothing") as caught:
            chat.send("Hello")
        assert str(caught.value).startswith(str(tmp_path))
        assert chat.messages == []


def test_a_reply_cut_short_keeps_what_was_said(model: br.Model) -> None:
    chat = model.chat()
    with chat.stream(TALK[0], temperature=0, max_tokens=24) as stream:
        said = next(stream) + next(stream)
        assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert chat.messages == [
        {"role": "user", "content": TALK[0]},
        {"role": "assistant", "content": said},
    ]
    messages = [*chat.messages, {"role": "user", "content": TALK[1]}]
    expected = from_scratch(model, messages, temperature=0, max_tokens=16)
    assert chat.send(TALK[1], temperature=0, max_tokens=16) == expected


def test_the_next_turn_ends_one_that_was_left_open(model: br.Model) -> None:
    chat = model.chat()
    left = chat.stream(TALK[0], temperature=0, max_tokens=24)
    said = next(left)
    chat.send(TALK[1], temperature=0, max_tokens=4)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"] == said
    assert list(left) == []


@pytest.mark.parametrize("steps", [0, 3])
def test_ctrl_c_leaves_the_chat_in_order(
    model: br.Model, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    wait, taken = completion._wait, 0

    def interrupted(events: Any) -> Any:
        nonlocal taken
        found = wait(events)  # the cache has grown already when Ctrl-C is noticed
        taken += 1
        if taken > steps:
            raise KeyboardInterrupt
        return found

    chat = model.chat()
    chat.send(TALK[0], temperature=0, max_tokens=16)
    before = list(chat.messages)
    with monkeypatch.context() as patch:
        patch.setattr(completion, "_wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            chat.send(TALK[1], temperature=0, max_tokens=16)
    if steps:
        assert chat.messages[-2] == {"role": "user", "content": TALK[1]}
        assert chat.messages[-1]["content"]
    else:
        assert chat.messages == before  # nothing was said: the turn is taken back
    messages = [*chat.messages, {"role": "user", "content": TALK[2]}]
    expected = from_scratch(model, messages, temperature=0, max_tokens=16)
    assert chat.send(TALK[2], temperature=0, max_tokens=16) == expected


def test_a_chat_that_outgrows_the_context_says_how_to_go_on() -> None:
    with br.load(context=60) as model:
        chat = model.chat("Be brief.")
        chat.send(TALK[0], temperature=0, max_tokens=8)
        before = list(chat.messages)
        with pytest.raises(
            ValueError, match=r"conversation has \d+ tokens; the context holds 60.*clear\(\)"
        ):
            chat.send("word " * 60)
        assert chat.messages == before
        assert isinstance(chat.send(TALK[1], temperature=0, max_tokens=4), str)
        chat.clear()
        assert chat.messages == [{"role": "system", "content": "Be brief."}]
        assert len(chat.send(TALK[0], temperature=0)) > 0


def test_an_answer_may_fill_the_context(tmp_path: Path) -> None:
    folder = copy_of_demo(tmp_path, generation_config={"max_new_tokens": ...})
    with (
        br.load(folder, context=40) as model,
        model.chat().stream(TALK[0], temperature=0, ignore_eos=True) as stream,
    ):
        list(stream)
        assert stream.completion.usage.total_tokens == 40


def test_chat_refuses_empty_text_and_missing_templates(model: br.Model, tmp_path: Path) -> None:
    chat = model.chat()
    for text in ("", None):
        with pytest.raises(ValueError, match=r"text is .*; wanted a str that is not empty"):
            chat.send(text)  # type: ignore[arg-type]
    assert chat.messages == []
    with br.load(copy_of_demo(tmp_path, tokenizer_config={"chat_template": ...})) as base:
        with pytest.raises(ValueError, match=r"no chat template.*complete\(\)"):
            base.chat()
        assert base.generate("The", **GREEDY) == model.generate("The", **GREEDY)
    broken = br.load(copy_of_demo(tmp_path, tokenizer_config={"chat_template": "{% for"}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json, field chat_template"):
        broken.chat()


# Loading.


def test_weights_are_counted_for_the_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitnet_rs.loaders import progress

    monkeypatch.setattr(progress, "_PROGRESS_BYTES", 0)
    br.load()
    assert capsys.readouterr().err == ""  # not a terminal
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    loaded = br.load()
    assert "Loading demo" in capsys.readouterr().err
    assert loaded.generate(PROMPTS[0], **GREEDY).startswith(" a very good deal.")


def test_replies_are_cut_before_the_earliest_stop_string(model: br.Model) -> None:
    """Token by token, over every way to cut a short text, against a search in the whole."""
    text = "aab abc"
    ids = [model.tokenizer.token_id(c.replace(" ", "\u0120")) for c in text]
    tokens = [i for i in ids if i is not None]
    assert model.decode(tokens) == text
    for stop in (["aab"], ["ab"], ["ab a"], ["abc", "b a"], ["bb", "c"], ["abcd"], ["b abd"]):
        request = Request(np.array([1], np.uint32), 10)
        reply = completion.Reply(Running(request), model.tokenizer, stop)
        pieces = []
        for n, token in enumerate(tokens, 1):
            last: FinishReason | None = "length" if n == len(tokens) else None
            pieces.append(reply.take(Event(reply.sequence, token, None, last, 0.0)))
            if reply.finish_reason:
                break
        # A string is found when its last character comes.
        ends = {text.find(s) + len(s): text.find(s) for s in stop if s in text}
        assert "".join(pieces) == text[: ends[min(ends)] if ends else None]
        assert reply.finish_reason == ("stop" if ends else "length")
