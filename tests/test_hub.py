"""Where checkpoints come from: the bundled model, folders, and a hub served on this machine."""

import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from bitnet_rs.loaders import open_checkpoint
from checkpoints import DATA, write

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves folders as model repositories, as far as downloads need it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Path] = {}
        self.fetched: list[str] = []
        self.broken = False


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self, *, body: bool) -> None:
        path = self.path.partition("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        assert match, path
        repo, revision = match[1], match[3] if api else match[2]
        if "gated" in repo:
            return self._reply(403, b"", {"X-Error-Code": "GatedRepo"}, body=body)
        if repo not in self.server.repos:
            return self._reply(401, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            return self._reply(404, b"", {"X-Error-Code": "RevisionNotFound"}, body=body)
        root = self.server.repos[repo]
        if not api:
            if body:
                self.server.fetched.append(match[3])
            if self.server.broken and body:
                return self._reply(400, b"", {}, body=body)
            content = (root / match[3]).read_bytes()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            return self._reply(200, content, headers, body=body)
        if match[2] == "revision":
            info: object = {"id": repo, "sha": commit, "siblings": []}
        else:
            info = [
                {
                    "type": "file",
                    "path": str(p.relative_to(root)),
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in sorted(root.rglob("*"))
                if p.is_file()
            ]
        self._reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body=body)

    def _reply(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        files = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_only_the_files_that_are_read_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    folder = hub.repos["some/model"] = tmp_path / "repo"
    written = write(folder)
    for name in ("pytorch_model.bin", "ggml-model-i2_s.gguf", "consolidated.safetensors"):
        (folder / name).write_bytes(b"large")
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"large")
    checkpoint = open_checkpoint("some/model")
    assert checkpoint.name == "some/model"
    assert checkpoint.config == written.config
    assert set(checkpoint.weights) == set(written.canonical)
    assert sorted(hub.fetched) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_shards_are_those_that_the_index_names(hub: Hub, tmp_path: Path) -> None:
    folder = hub.repos["some/model"] = tmp_path / "repo"
    write(folder, shards=3)
    (folder / "model-fp32-00001-of-00001.safetensors").write_bytes(b"large")
    open_checkpoint("some/model")
    assert sorted(name for name in hub.fetched if name.endswith(".safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]


def test_what_is_cached_is_not_fetched_again_and_works_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["some/model"] = tmp_path / "repo"
    write(tmp_path / "repo", shards=2)
    first = open_checkpoint("some/model")
    hub.fetched.clear()
    assert open_checkpoint("some/model").path == first.path
    offline(monkeypatch)
    assert open_checkpoint("some/model").path == first.path
    assert hub.fetched == []


def test_a_shard_that_is_not_cached_is_an_error_offline(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["some/model"] = tmp_path / "repo"
    write(tmp_path / "repo", shards=2)
    checkpoint = open_checkpoint("some/model")
    (checkpoint.path / "model-00002-of-00002.safetensors").unlink()
    offline(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"some/model.*not wholly in the local cache"):
        open_checkpoint("some/model")


def test_nothing_cached_is_an_error_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    with pytest.raises(FileNotFoundError, match=r"some/model .*HF_HUB_OFFLINE"):
        open_checkpoint("some/model")


def test_a_revision_is_honoured(hub: Hub, tmp_path: Path) -> None:
    hub.repos["some/model"] = tmp_path / "repo"
    write(tmp_path / "repo")
    assert open_checkpoint("some/model", revision="v2").path.name == COMMITS["v2"]
    with pytest.raises(FileNotFoundError, match="at revision v3 does not exist"):
        open_checkpoint("some/model", revision="v3")


def test_repositories_that_cannot_be_had(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/such does not exist or is private"):
        open_checkpoint("no/such")
    with pytest.raises(RuntimeError, match=r"some/gated is gated: accept its terms"):
        open_checkpoint("some/gated")
    hub.repos["some/gguf"] = hub.repos["some/bin"] = hub.repos["some/data"] = tmp_path / "repo"
    (tmp_path / "repo").mkdir()
    with pytest.raises(FileNotFoundError, match=r"some/data has no model.safetensors with a conf"):
        open_checkpoint("some/data")
    with pytest.raises(FileNotFoundError, match=r"some/gguf has no file q4.gguf; see https"):
        open_checkpoint("some/gguf/q4.gguf")
    write(tmp_path / "repo")
    (tmp_path / "repo" / "model.safetensors").unlink()
    (tmp_path / "repo" / "pytorch_model.bin").write_bytes(b"large")
    with pytest.raises(FileNotFoundError, match=r"some/bin has no model.safetensors"):
        open_checkpoint("some/bin", revision="v2")


def test_a_download_that_breaks_says_so(hub: Hub, tmp_path: Path) -> None:
    hub.repos["some/model"] = tmp_path / "repo"
    write(tmp_path / "repo")
    hub.broken = True
    with pytest.raises(
        RuntimeError, match=r"downloading hub repository some/model failed.*resumes"
    ):
        open_checkpoint("some/model")


def test_demo_is_bundled_and_a_folder_wins_over_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "demo")
    write(tmp_path / "some" / "model")
    assert (open_checkpoint("demo").path / "README.md").is_file()
    assert open_checkpoint("./demo").path == Path("demo")
    assert open_checkpoint(tmp_path / "demo").path == tmp_path / "demo"
    assert open_checkpoint("some/model").path == Path("some/model")
    assert hub.fetched == []


@pytest.mark.parametrize("source", ["no_such_folder", "./some/model", "a/b/c", "/no/model"])
def test_neither_folder_nor_hub_id(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no folder or file on this disk and no hub id"):
        open_checkpoint(source)


def test_sources_that_name_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path)  # the current folder is a checkpoint, but "" does not name it
    with pytest.raises(ValueError, match=r"source is empty; wanted 'demo', the folder"):
        open_checkpoint("")
    with pytest.raises(FileNotFoundError, match=r"'~no-such-user/x' starts in the home folder"):
        open_checkpoint("~no-such-user/x")
    for source, kind in ((None, "NoneType"), (b"demo", "bytes"), (3, "int")):
        with pytest.raises(TypeError, match=f"source is a {kind}; wanted a str or a path: 'demo'"):
            open_checkpoint(source)  # type: ignore[arg-type]
    assert open_checkpoint(".").path == Path()


def test_files_and_revisions_of_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=r"is a file, but no .gguf; name the folder"):
        open_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="revision='main' is for hub ids only"):
        open_checkpoint(tmp_path, revision="main")


# --- GGUF ------------------------------------------------------------------------------------------

I2_S = DATA / "gguf" / "I2_S.gguf"


def test_a_gguf_file_and_a_folder_with_one(tmp_path: Path) -> None:
    assert open_checkpoint(I2_S).path == I2_S
    shutil.copy(I2_S, tmp_path / "model.GGUF")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path / "model.GGUF"
    assert checkpoint.config_file == checkpoint.path
    # A config.json is often beside it.
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).path == tmp_path / "model.GGUF"
    shutil.copy(I2_S, tmp_path / "second.gguf")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files; name one .*model.GGUF, second.gguf"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="revision='main' is for hub ids only"):
        open_checkpoint(tmp_path / "second.gguf", revision="main")
    with pytest.raises(FileNotFoundError, match="is no folder or file on this disk"):
        open_checkpoint(tmp_path / "third.gguf")


def test_a_hub_repository_with_one_gguf_file(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos["some/model-gguf"] = tmp_path / "repo"
    (tmp_path / "repo" / "old").mkdir(parents=True)
    shutil.copy(I2_S, tmp_path / "repo" / "ggml-model-i2_s.gguf")
    shutil.copy(I2_S, tmp_path / "repo" / "old" / "other.gguf")
    checkpoint = open_checkpoint("some/model-gguf")
    assert checkpoint.path.name == "ggml-model-i2_s.gguf"
    assert checkpoint.path.read_bytes() == I2_S.read_bytes()
    hub.fetched.clear()
    assert open_checkpoint("some/model-gguf/ggml-model-i2_s.gguf").path == checkpoint.path
    assert hub.fetched == []
    offline(monkeypatch)
    assert open_checkpoint("some/model-gguf").path == checkpoint.path


def test_a_hub_repository_with_several_gguf_files(hub: Hub, tmp_path: Path) -> None:
    hub.repos["some/model-gguf"] = tmp_path / "repo"
    (tmp_path / "repo").mkdir()
    for name in ("a.gguf", "b.gguf", "c-00001-of-00002.gguf", "c-00002-of-00002.gguf"):
        shutil.copy(I2_S, tmp_path / "repo" / name)
    with pytest.raises(ValueError, match=r"holds 3 GGUF files; name one .*a.gguf, b.gguf, c-00001"):
        open_checkpoint("some/model-gguf")
    assert hub.fetched == []
    assert open_checkpoint("some/model-gguf/b.gguf").path.name == "b.gguf"
    assert hub.fetched == ["b.gguf"]


def test_safetensors_go_before_gguf_in_one_repository(hub: Hub, tmp_path: Path) -> None:
    hub.repos["some/model"] = tmp_path / "repo"
    write(tmp_path / "repo")
    shutil.copy(I2_S, tmp_path / "repo" / "model.gguf")
    assert open_checkpoint("some/model").path.is_dir()
    assert "model.gguf" not in hub.fetched
