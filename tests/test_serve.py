"""`bitnet-rs serve` as a process: the line it prints, signals, exit codes, addresses in use."""

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from bitnet_rs.cli import main

ENVIRONMENT = {
    **{key: value for key, value in os.environ.items() if not key.startswith("BITNET_RS_")},
    "HF_HUB_OFFLINE": "1",
    "PYTHONIOENCODING": "utf-8",
    "PYTHONWARNINGS": "error",
}
LONG = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True, "n": 4, "stream": True}


class Process:
    """A server, and what it printed."""

    def __init__(self, child: "subprocess.Popen[str]") -> None:
        self.child = child
        self.printed = ""
        assert child.stderr is not None
        end = time.monotonic() + 60
        while not (
            found := re.search(r"^serving (\S+) at (http://\S+)$", self.printed, re.MULTILINE)
        ):
            assert select.select([child.stderr], [], [], end - time.monotonic())[0], self.printed
            line = child.stderr.readline()
            assert line, f"it ended: {self.printed}"
            self.printed += line
        self.model, self.url = found.groups()

    def end(self, seconds: float = 20) -> int:
        """Waits for its end; what else it printed is in `printed` then."""
        _, err = self.child.communicate(timeout=seconds)
        self.printed += err
        return self.child.returncode


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "bitnet_rs", "serve", "--port", "0", *arguments]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=0,
        env={**ENVIRONMENT, **environment},
    ) as child:
        try:
            yield Process(child)
        finally:
            child.kill()


def run(*arguments: str) -> int:
    """The exit code of a command that does not come to serve, in this process."""
    with pytest.raises(SystemExit) as exit_:
        main(["serve", *arguments])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def test_running_requests_finish_and_no_more_are_taken() -> None:
    with process("--log-requests") as server, httpx.Client(base_url=server.url) as client:
        assert server.model == "demo"
        # Its own connection, kept open.
        assert client.get("/health").json() == {"status": "ok"}
        with client.stream("POST", "/v1/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: {")
            server.child.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while (health := httpx.get(f"{server.url}/health")).status_code == 200:
                assert time.monotonic() < deadline
            assert health.status_code == 503
            assert health.json()["error"]["code"] == "shutting_down"
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            rest = [line for line in lines if line]
        reasons = [
            choice["finish_reason"]
            for line in rest[:-1]
            for choice in json.loads(line.removeprefix("data: "))["choices"]
        ]
        assert reasons.count("length") == 4
        assert rest[-1] == "data: [DONE]"
        assert server.end() == 0
    assert re.search(r"POST '/v1/completions' 200 ", server.printed)
    assert "Traceback" not in server.printed


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_what_takes_too_long_is_cancelled(sent: signal.Signals) -> None:
    with (
        process("--drain-timeout", "0.1") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        server.child.send_signal(sent)
        rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert server.end() == 0
    assert server.printed == f"serving demo at {server.url}\n"


def test_a_second_signal_ends_it_at_once() -> None:
    with (
        process(BITNET_RS_THREADS="1") as server,
        httpx.stream("POST", f"{server.url}/v1/completions", json=LONG) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        server.child.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        assert server.child.poll() is None
        server.child.send_signal(signal.SIGTERM)
        assert server.end() == 128 + signal.SIGTERM


def test_the_key_comes_from_the_environment() -> None:
    with process("--alias", "*", BITNET_RS_API_KEY="k") as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        headers = {"Authorization": "Bearer k"}
        body = {"model": "whatever", "prompt": "a", "max_tokens": 1}
        found = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        assert found.json()["model"] == "demo"
        server.child.send_signal(signal.SIGINT)
        assert server.end() == 0


def test_an_address_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run("--port", str(port)) == 1
    assert capsys.readouterr().err == (
        f"error: cannot listen at 127.0.0.1:{port}: Address already in use; another program has "
        "this port; choose one with --port\n"
    )


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--port", "70000") == 2
    assert run("--max-queue", "-1") == 2
    capsys.readouterr()
    assert run("--port", "0", "--cors-origin", "example.com") == 1
    assert "https://example.com" in capsys.readouterr().err
    assert run("--host", "no.such.host.invalid", "--port", "0") == 1
    assert "cannot listen at no.such.host.invalid:0" in capsys.readouterr().err
    assert run("no/such/folder", "--port", "0", "--host", "0.0.0.0") == 1
    assert capsys.readouterr().err.startswith(
        "warning: anyone who can reach 0.0.0.0 can use this server"
    )


def test_without_the_extra() -> None:
    """Says what to install. Python is told that there is no such module."""
    code = (
        "import sys; sys.modules['uvicorn'] = None\nfrom bitnet_rs.cli import main; main(['serve'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=ENVIRONMENT,
    )
    assert done.returncode == 1
    assert "pip install 'bitnet-rs[server]'" in done.stderr
