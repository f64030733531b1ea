"""The command line as users and scripts see it: output, streams, exit codes.

What a process alone can show (pipes, signals, terminals) runs in one; the rest calls
`main` in this process, which is quicker.
"""

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import bitnet_rs
from bitnet_rs import _core
from bitnet_rs.cli import generate, main

DATA = Path(__file__).parent / "data"
GGUF = DATA / "gguf"
DEMO = Path(bitnet_rs.__file__).parent / "demo"
ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("BITNET_RS_")},
    "HF_HUB_OFFLINE": "1",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONWARNINGS": "error",
}


def start(*arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "bitnet_rs", *arguments]
    return subprocess.Popen(
        command,
        stdin=options.pop("stdin", subprocess.DEVNULL),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**ENVIRONMENT, **options.pop("env", {})},
        **options,
    )


def process(*arguments: str, stdin: bytes = b"", env: dict[str, str] | None = None) -> "Outcome":
    with start(*arguments, stdin=subprocess.PIPE, env=env or {}) as child:
        out, err = child.communicate(stdin, timeout=120)
    return Outcome(child.returncode, out.decode(), err.decode())


class Outcome:
    """What a command did: exit code, and what it wrote."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


class Here:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capsys, self._patch = capsys, patch

    def __call__(self, *arguments: str, stdin: str = "") -> Outcome:
        self._patch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        captured = self._capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Outcome(caught.value.code, captured.out, captured.err)


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    for name in ("BITNET_RS_KERNEL", "BITNET_RS_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return Here(capsys, monkeypatch)


def failure(outcome: Outcome) -> str:
    """The one line that a failed command leaves on stderr."""
    assert outcome.code == 1, outcome
    assert outcome.out == "", outcome
    assert outcome.err.startswith("error: "), outcome
    assert outcome.err.count("\n") == 1, outcome
    return outcome.err


def misuse(outcome: Outcome) -> str:
    """What a command says to wrong usage."""
    assert outcome.code == 2, outcome
    assert outcome.out == "", outcome
    assert "Traceback" not in outcome.err, outcome
    return " ".join(outcome.err.split())


# The program.


def test_version_and_help() -> None:
    version = process("--version")
    assert version.code == 0, version
    assert version.out == f"bitnet-rs {bitnet_rs.__version__}\n"
    shown = process("--help")
    assert shown.code == 0, shown
    for command in ("generate", "chat", "info", "verify", "bench", "convert"):
        assert command in shown.out


@pytest.mark.parametrize("command", ["generate", "chat", "info", "verify", "bench", "convert"])
def test_every_command_has_help(here: Here, command: str) -> None:
    shown = here(command, "--help")
    assert shown.code == 0, shown
    assert f"Usage: bitnet-rs {command}" in shown.out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from bitnet_rs.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'tokenizers', 'huggingface_hub', 'jinja2', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate", "a", "b", "c"],
        ["generate", "a", "b", "--model", "demo"],
        ["generate", "a", "--no-such-option"],
        ["generate", "a", "--temperature", "-1"],
        ["generate", "a", "--temperature", "warm"],
        ["generate", "no/such-model", "a", "--temperature", "inf"],
        ["generate", "no/such-model", "a", "--temperature", "nan"],
        ["generate", "no/such-model", "a", "--top-p", "nan"],
        ["generate", "no/such-model", "a", "--min-p", "nan"],
        ["generate", "no/such-model", "a", "--repetition-penalty", "nan"],
        ["generate", "no/such-model", "a", "--repetition-penalty", "inf"],
        ["generate", "no/such-model", "a", "--threads", "100000"],
        ["generate", "no/such-model", "a", "--stop", ""],
        ["chat", "no/such-model", "--stop", "b", "--stop", ""],
        ["generate", "a", "--top-k", "-1"],
        ["generate", "a", "--top-p", "0"],
        ["generate", "a", "--top-p", "1.5"],
        ["generate", "a", "--min-p", "2"],
        ["generate", "a", "--repetition-penalty", "0"],
        ["generate", "a", "--seed", "-1"],
        ["generate", "a", "--max-tokens", "0"],
        ["generate", "a", "--threads", "0"],
        ["generate", "a", "--kv-dtype", "f8"],
        ["generate", "a", "--kernel", "abacus"],
        ["chat", "a", "b"],
        ["bench", "demo", "--synthetic", "tiny"],
        ["bench", "--synthetic", "70b"],
        ["bench", "--synthetic", "tiny", "--revision", "x"],
        ["bench", "--repetitions", "0"],
        ["verify", "--golden", "no such file"],
    ],
)
def test_wrong_usage(here: Here, arguments: list[str]) -> None:
    assert "Error: " in misuse(here(*arguments))


def test_unknown_kernel_says_which_there_are(here: Here) -> None:
    message = misuse(here("generate", "a", "--kernel", "abacus"))
    for kernel in ("abacus", "auto", *_core.kernels()):
        assert kernel in message


def test_no_arguments_show_the_help(here: Here) -> None:
    outcome = here()
    assert outcome.code == 2
    assert "Usage: bitnet-rs" in outcome.out + outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no/such-model", "a"], "no/such-model"),
        (["generate", "no such model", "a"], "no such model"),
        (["info", "model.gguf"], "no folder or file"),
        (["info", str(DATA)], "config.json"),
        (["generate", "demo", "a " * 600], "context"),
        (["generate", ""], "empty"),
        (["chat", str(DATA), "--system", "x"], "config.json"),
        (["bench", "--prompt-tokens", "500", "--new-tokens", "13"], "513"),
    ],
)
def test_work_that_fails(here: Here, arguments: list[str], message: str) -> None:
    assert message in failure(here(*arguments))


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
@pytest.mark.parametrize(
    ("arguments", "closed", "message"),
    [
        (["info"], ">&-", "standard output is closed"),
        (["--version"], ">&-", "standard output is closed"),
        (["generate"], "<&-", "standard input is closed"),
        (["chat"], "<&-", "standard input is closed"),
        (["info"], "<&- >&- 2>&-", None),
    ],
)
def test_closed_streams(arguments: list[str], closed: str, message: str | None) -> None:
    command = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-m", "bitnet_rs", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    if message is None:
        assert (outcome.code, outcome.out, outcome.err) == (1, "", ""), outcome
    else:
        assert message in failure(outcome)


@pytest.mark.skipif(os.name != "posix", reason="closes streams as a shell does")
def test_closed_streams_that_are_not_needed() -> None:
    arguments = ["generate", "The", "-n", "2", "--temperature", "0", "--stats"]
    expected = process(*arguments)
    command = ["sh", "-c", '"$@" <&- 2>&-', "sh", sys.executable, "-m", "bitnet_rs", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, expected.out, "")


def test_bad_environment_is_named() -> None:
    for name, value in (("BITNET_RS_KERNEL", "abacus"), ("BITNET_RS_THREADS", "many")):
        message = failure(process("generate", "a", env={name: value}))
        assert name in message
        assert value in message


# generate


def test_generate_streams_the_text_of_the_model(here: Here) -> None:
    outcome = here("generate", "Once upon a time", "--max-tokens", "12", "--temperature", "0")
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    with bitnet_rs.load() as model:
        text = model.generate("Once upon a time", max_tokens=12, temperature=0)
    assert outcome.out == f"{text}\n"


def test_generate_in_a_process() -> None:
    outcome = process("generate", "demo", "Once upon a time", "-n", "5", "--seed", "1", "--echo")
    assert outcome.code == 0, outcome
    assert outcome.out.startswith("Once upon a time")
    assert len(outcome.out) > len("Once upon a time\n")


def test_generate_reads_a_pipe(here: Here) -> None:
    options = ["--max-tokens", "4", "--temperature", "0", "--json"]
    wanted = json.loads(here("generate", "Once upon\na time", *options).out)
    for arguments in (["demo"], [], ["-"], ["demo", "-"], ["--model", "demo"], [str(DEMO)]):
        piped = here("generate", *arguments, *options, stdin="Once upon\na time\n")
        assert piped.code == 0, piped
        content = json.loads(piped.out)
        assert content["prompt"] == "Once upon\na time"
        assert content["tokens"] == wanted["tokens"]


def test_piped_bytes_reach_the_model() -> None:
    outcome = process("generate", "--json", "-n", "1", stdin="Zażółć 🙂\r\n".encode())
    assert outcome.code == 0, outcome
    assert json.loads(outcome.out)["prompt"] == "Zażółć 🙂"
    message = failure(process("generate", stdin=b"\xff\xfe", env={"PYTHONIOENCODING": ""}))
    assert "UTF-8" in message


def test_an_empty_pipe_says_what_to_do(here: Here) -> None:
    assert "--model demo" in failure(here("generate", "and/or"))
    assert "empty" in failure(here("generate"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_is_not_waited_for(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "StringIO", Terminal)
    assert "no prompt" in misuse(here("generate"))
    assert "no prompt" in misuse(here("generate", "demo"))
    assert "--model demo" in misuse(here("generate", "and/or"))


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("demo", True),
        ("microsoft/bitnet-b1.58-2B-4T", True),
        (str(DEMO), True),
        ("model.gguf", True),
        ("Once upon a time", False),
        ("Hello", False),
        ("", False),
        ("-", False),
        ("either/or not", False),
        ("https://a/b", False),
        ("x" * 10_000, False),
        ("nul\0byte", False),
    ],
)
def test_which_lone_arguments_are_models(argument: str, names: object) -> None:
    assert generate._names_model(argument) is names


def test_generate_json(here: Here) -> None:
    outcome = here(
        "generate", "Once upon a time", "--json", "--max-tokens", "9", "--temperature", "0"
    )
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    content = json.loads(outcome.out)
    assert content["model"] == "demo"
    assert content["kernel"] in _core.kernels()
    assert content["finish_reason"] == "length"
    assert len(content["tokens"]) == 9
    assert content["usage"]["completion_tokens"] == 9
    assert content["timings"].keys() >= {"prefill_tokens_per_s", "decode_tokens_per_s"}
    with bitnet_rs.load() as model:
        assert (
            model.complete("Once upon a time", max_tokens=9, temperature=0).text
            == (content["text"])
        )


def test_sampling_options_reach_the_model(here: Here) -> None:
    outcome = here(
        *("generate", "The", "--json", "-n", "20", "--temperature", "1.3", "--top-k", "50"),
        *("--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.2", "--seed", "7"),
    )
    with bitnet_rs.load() as model:
        completion = model.complete(
            "The",
            max_tokens=20,
            temperature=1.3,
            top_k=50,
            top_p=0.9,
            min_p=0.01,
            repetition_penalty=1.2,
            seed=7,
        )
    assert json.loads(outcome.out)["tokens"] == completion.tokens


def test_stop_strings(here: Here) -> None:
    common = ["Once upon a time", "--json", "--max-tokens", "30", "--temperature", "0"]
    text = json.loads(here("generate", *common).out)["text"]
    words = text.split()
    stopped = json.loads(here("generate", *common, "--stop", "@@", "--stop", words[3]).out)
    assert stopped["text"] == text[: text.index(words[3])]
    assert stopped["finish_reason"] == "stop"


def test_other_kernels_threads_and_caches_give_the_same_text(here: Here) -> None:
    command = ["generate", "The", "--json", "--temperature", "0", "-n", "8", "--kv-dtype", "f32"]
    expected = json.loads(here(*command).out)["tokens"]
    scalar = _core.kernels()[-1]
    content = json.loads(here(*command, "--kernel", scalar, "--threads", "3").out)
    assert (content["kernel"], content["threads"]) == (scalar, 3)
    assert content["tokens"] == expected


def test_stats_go_to_stderr(here: Here) -> None:
    outcome = here("generate", "Once", "-n", "3", "--ignore-eos", "--stats", "--seed", "1")
    assert outcome.code == 0, outcome
    assert re.search(r"prefill: 4 tokens, [\d.]+ tokens/s .* decode: 3 tokens,", outcome.err)
    assert "tokens/s" not in outcome.out


def test_a_reader_that_leaves_is_no_error() -> None:
    with start("generate", "Once upon a time", "--ignore-eos", "-n", "400") as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) in (0, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX systems")
def test_ctrl_c_ends_generate_quietly() -> None:
    slow = ("--kernel", _core.kernels()[-1], "--threads", "1")
    with start("generate", "Once", "--ignore-eos", "-n", "450", *slow) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(1)
        child.send_signal(signal.SIGINT)
        assert child.stdout.read().endswith(b"\n")
        assert child.stderr.read() == b""
        assert child.wait(timeout=60) == 130


# info, verify, bench


def test_info(here: Here) -> None:
    outcome = here("info")
    assert outcome.code == 0, outcome
    for words in (bitnet_rs.__version__, *_core.kernels(), "fastest", "lossless", "512 tokens"):
        assert words in outcome.out


def test_info_json(here: Here) -> None:
    content = json.loads(here("info", "--json", "--tensors", "--threads", "1").out)
    assert content["kernels"] == _core.kernels()
    assert content["kernel"] in _core.kernels()
    assert content["threads"] == 1
    assert content["cpu_features"] == _core.cpu_features()
    model = content["model"]
    assert model["name"] == "demo"
    assert model["params"] == 5_776_640
    assert model["lossless"] is True
    assert model["lossless_reason"]
    assert model["stop_ids"] == [4094, 4095]
    assert model["chat_template"] is True
    embedding = next(t for t in model["tensors"] if t["name"] == "model.embed_tokens.weight")
    assert embedding == {"name": embedding["name"], "dtype": "BF16", "shape": [4096, 256]}


def test_info_says_why_this_kernel() -> None:
    scalar = _core.kernels()[-1]
    forced = process("info", "--json", env={"BITNET_RS_KERNEL": scalar})
    assert (
        json.loads(forced.out)["kernel_reason"]
        == "asked for with the environment variable BITNET_RS_KERNEL"
    )
    asked = process("info", "--json", "--kernel", scalar)
    assert json.loads(asked.out)["kernel_reason"] == "asked for with kernel"
    capped = process("info", "--json", env={"BITNET_RS_ISA": "generic"})
    assert "BITNET_RS_ISA=generic" in json.loads(capped.out)["kernel_reason"]
    assert all(name.startswith("generic-") for name in json.loads(capped.out)["kernels"])


def test_info_of_a_model_without_tokenizer(here: Here, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((DATA / "bitnet-packed" / name).read_bytes())
    outcome = here("info", str(tmp_path))
    assert outcome.code == 0, outcome
    assert "none; only logits() and core.forward() work, on token ids" in outcome.out
    message = failure(here("generate", str(tmp_path), "a"))
    assert "only logits() and core.forward() work, on token ids" in message


def test_verify(here: Here) -> None:
    outcome = here("verify")
    assert outcome.code == 0, outcome
    lines = outcome.out.splitlines()
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert "golden logits" in outcome.out
    assert lines[-1].endswith("all checks ok")


def test_verify_json_and_exit_code(here: Here, tmp_path: Path) -> None:
    passed = here("verify", str(DATA / "bitnet-packed"), "--json")
    assert passed.code == 0, passed
    content = json.loads(passed.out)
    assert content["ok"] is True
    assert {"name", "ok", "detail"} == content["checks"][0].keys()

    wrong = DATA / "llama-packed" / "golden.npz"  # another model's logits
    failed = here("verify", str(DATA / "bitnet-packed"), "--golden", str(wrong), "--json")
    assert failed.code == 1, failed
    content = json.loads(failed.out)
    assert content["ok"] is False
    assert "golden logits" in [check["name"] for check in content["checks"] if not check["ok"]]
    table = here("verify", str(DATA / "bitnet-packed"), "--golden", str(wrong))
    assert table.code == 1
    assert "FAIL  golden logits" in table.out


def test_info_of_a_gguf_file_and_of_one_that_is_refused(here: Here, tmp_path: Path) -> None:
    good = GGUF / "TQ1_0.gguf"
    outcome = here("info", str(good), "--json")
    assert outcome.code == 0, outcome
    facts = json.loads(outcome.out)["model"]
    assert facts["file"]["container"] == "GGUF v3"
    assert "TQ1_0" in facts["format"]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(good.read_bytes().replace(b"\6\0\0\0\0\0\0\0bitnet", b"\6\0\0\0\0\0\0\0mamba2"))
    outcome = here("info", str(bad))
    assert outcome.code == 1, outcome
    assert "'mamba2'; supported: bitnet" in outcome.err
    assert outcome.err.count("\n") == 1
    for words in ("GGUF v3", "mamba2", "TQ1_0"):
        assert words in outcome.out, outcome
    outcome = here("info", str(bad), "--json")
    assert "mamba2" in json.loads(outcome.out)["model"]["refused"]


def test_bench_of_float_activations(here: Here) -> None:
    arguments = ["--prompt-tokens", "8", "--new-tokens", "2", "--repetitions", "1", "--json"]
    outcome = here("bench", "--synthetic", "tiny", "--activations", "float", *arguments)
    assert outcome.code == 0, outcome
    report = json.loads(outcome.out)
    assert report["model"] == "synthetic tiny, float activations"
    assert report["kernel"].endswith("-i2g-float")


def test_bench_json_has_what_scripts_read(here: Here) -> None:
    outcome = here(
        *("bench", "--synthetic", "tiny", "--json", "--threads", "1"),
        *("--prompt-tokens", "20", "--new-tokens", "3", "--repetitions", "1"),
    )
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    content = json.loads(outcome.out)
    assert content["model"] == "synthetic tiny"
    assert content["prompt_tokens"] == 20
    assert content["new_tokens"] == 3
    assert content["threads"] == 1
    assert content["kernel"] in _core.kernels()
    for key in (
        "prefill_tokens_per_s",
        "decode_tokens_per_s",
        "bytes_per_token",
        "kv_bytes_per_token",
        "rescored_per_token",
        "read_gb_per_s",
        "memory_read_gb_per_s",
        "peak_rss_bytes",
    ):
        assert content[key] > 0, key


def test_bench_profile_is_a_table(here: Here) -> None:
    arguments = ("bench", "--synthetic", "tiny", "-p", "4", "-n", "2", "-r", "1", "--threads", "2")
    plain, profiled = here(*arguments), here(*arguments, "--profile")
    assert plain.code == profiled.code == 0, profiled
    assert re.search(
        r"^head +int8 rows read, [\d.]+ rows a token rescored", plain.out, re.MULTILINE
    )
    assert re.search(
        r"^waiting +for each other [\d.]+ % of a decoding step", plain.out, re.MULTILINE
    )
    assert "attention" not in plain.out
    for part in ("q, k, v", "attention", "gate, up", "down", "head: scan"):
        assert re.search(rf"^{part} +\d+ ", profiled.out, re.MULTILINE), profiled.out


def test_bench_without_memory_for_the_bandwidth(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_bandwidth(threads: int, n_bytes: int = 0) -> float:
        raise RuntimeError("no memory")

    monkeypatch.setattr(_core, "read_bandwidth", read_bandwidth)
    arguments = ("bench", "--synthetic", "tiny", "-p", "4", "-n", "2", "-r", "1")
    table = here(*arguments)
    assert table.code == 0, table
    assert re.search(r"reading .* MB of keys and values a token\): not compared", table.out)
    content = json.loads(here(*arguments, "--json").out)
    assert content["memory_read_gb_per_s"] is None
    assert content["read_percent"] is None


def test_bench_of_the_bundled_model(here: Here) -> None:
    outcome = here("bench", "-p", "30", "-n", "3", "-r", "1", "--kernel", _core.kernels()[-1])
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    assert re.search(
        r"prefill +[\d,.]+ tokens/s +\(30 tokens; ternary matrices [\d,]+ GMAC/s a thread\)",
        outcome.out,
    )
    assert _core.kernels()[-1] in outcome.out


# chat


def test_chat_answers_piped_lines(here: Here) -> None:
    outcome = here(
        *("chat", "--temperature", "0", "--max-tokens", "8", "--system", "Be brief."),
        stdin="Hello!\n\n/history\n//slash\n/reset\n/history\n/nonsense\n/quit\nnot read\n",
    )
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    with bitnet_rs.load() as model:
        chat = model.chat("Be brief.")
        replies = [chat.send(text, temperature=0, max_tokens=8) for text in ("Hello!", "/slash")]
    before, _, after = outcome.out.partition(f"user: Hello!\nassistant: {replies[0]}\n")
    assert before == f"{replies[0]}\nsystem: Be brief.\n"
    assert after.startswith(f"{replies[1]}\nsystem: Be brief.\nunknown command /nonsense\n")
    assert "not read" not in outcome.out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_refused(errors: str) -> None:
    for arguments, name in ((["generate"], "the prompt"), (["chat", "-n", "2"], "a message")):
        outcome = process(
            *arguments, stdin=b"Hello \xff\xfe\n", env={"PYTHONIOENCODING": f"utf-8:{errors}"}
        )
        assert failure(outcome) == f"error: {name} on stdin is not UTF-8 text; convert it first\n"


def test_chat_changes_the_system_message(here: Here) -> None:
    outcome = here("chat", stdin="/system Talk like a pirate.\n/history\n/system\n/history\n")
    assert outcome.code == 0, outcome
    assert outcome.out == "system: Talk like a pirate.\n"


def test_chat_with_a_model_that_cannot(here: Here, tmp_path: Path) -> None:
    for file in DEMO.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "chat template" in failure(here("chat", str(tmp_path), stdin="Hello\n"))


class Pty:
    """A program on a terminal of its own."""

    # The child makes the terminal its controlling one, so that Ctrl-C becomes a signal to it.
    _START = (
        "import fcntl, os, sys, termios\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'bitnet_rs', *sys.argv[1:]])\n"
    )

    def __init__(self, arguments: Sequence[str], env: dict[str, str]) -> None:
        self._master, slave = os.openpty()
        self._child = subprocess.Popen(
            [sys.executable, "-c", self._START, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**ENVIRONMENT, "TERM": "dumb", **env},
            start_new_session=True,
        )
        os.close(slave)
        self._pending = ""

    def write(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, *wanted: str, seconds: float = 60) -> str:
        """What is written until one of some strings appears, with it."""
        deadline = time.monotonic() + seconds
        while True:
            ends = [
                self._pending.find(text) + len(text) for text in wanted if text in self._pending
            ]
            if ends:
                seen, self._pending = self._pending[: min(ends)], self._pending[min(ends) :]
                return seen
            left = deadline - time.monotonic()
            assert left > 0, f"no {wanted} in {self._pending!r}"
            if select.select([self._master], [], [], left)[0]:
                self._pending += os.read(self._master, 4096).decode(errors="replace")

    def interrupt_input(self) -> None:
        """Presses Ctrl-C at a prompt."""
        # readline shows the prompt a moment before it waits; an interrupt in between would be
        # noticed with the next key only.
        time.sleep(0.5)
        self.write(CTRL_C)

    def wait(self) -> int:
        return self._child.wait(timeout=60)

    def close(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        os.close(self._master)


@pytest.fixture
def chat_terminal(tmp_path: Path) -> Iterator[Pty]:
    if not hasattr(os, "openpty"):
        pytest.skip("this system has no pseudo-terminals")
    # Slow enough to be interrupted: the scalar kernel, one thread, no end before the context's.
    slow = ["--kernel", _core.kernels()[-1], "--threads", "1", "--ignore-eos"]
    terminal = Pty(["chat", *slow], {"XDG_STATE_HOME": str(tmp_path)})
    try:
        yield terminal
    finally:
        terminal.close()


CTRL_C, CTRL_D = "\x03", "\x04"


def test_ctrl_c_stops_a_reply_and_not_the_program(chat_terminal: Pty, tmp_path: Path) -> None:
    terminal = chat_terminal
    terminal.read_until("> ")
    terminal.write("Hello there!\r")
    terminal.read_until("Hello there!\r\n")
    terminal.read_until(" ")  # the reply has begun
    terminal.write(CTRL_C)
    terminal.read_until("[stopped]")
    terminal.read_until("> ")

    terminal.write("/history\r")
    history = terminal.read_until("> ")
    assert "user: Hello there!" in history
    assert re.search(r"assistant: .*\w", history)

    terminal.write("How are you?\r")  # it still answers
    terminal.read_until("How are you?\r\n")
    terminal.read_until(" ")
    terminal.write(CTRL_C)
    terminal.read_until("[stopped]")
    terminal.read_until("> ")

    terminal.interrupt_input()
    terminal.read_until("Ctrl-C again")
    terminal.read_until("> ")
    terminal.interrupt_input()
    assert terminal.wait() == 0
    remembered = (tmp_path / "bitnet-rs" / "chat_history").read_text().splitlines()
    assert remembered[-3:] == ["Hello there!", "/history", "How are you?"]


def test_ctrl_d_leaves(chat_terminal: Pty) -> None:
    chat_terminal.read_until("> ")
    chat_terminal.write(CTRL_D)
    assert chat_terminal.wait() == 0
