"""`import bitnet_rs` must be light: heavy packages come in when they are first needed."""

import subprocess
import sys

HEAVY = [
    "fastapi",
    "hf_xet",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "requests",
    "rich",
    "safetensors",
    "tokenizers",
    "tqdm",
    "typer",
]


def loaded_after(code: str) -> list[str]:
    script = f"import sys\n{code}\nprint(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split()


def test_import_brings_in_nothing_heavy() -> None:
    assert loaded_after("import bitnet_rs") == []


def test_the_bundled_model_needs_no_network_packages() -> None:
    loaded = loaded_after("import bitnet_rs; bitnet_rs.load().generate('a', max_tokens=1)")
    assert "tokenizers" in loaded
    assert not {"huggingface_hub", "httpx", "requests", "rich", "typer"} & set(loaded)
