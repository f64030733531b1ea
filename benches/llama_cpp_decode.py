"""Speed of llama.cpp on the shape of microsoft/bitnet-b1.58-2B-4T.

    python benches/llama_cpp_decode.py make 2b-tq2_0.gguf
    python benches/llama_cpp_decode.py measure 2b-tq2_0.gguf --threads 1 2

For numbers beside those of `bitnet-rs bench`, taken the same way: a prompt of random ids, then
new tokens one at a time, each the argmax of the logits before. Needs the packages gguf and
llama-cpp-python (written for 0.3.36), the latter built for the processor it runs on. Not a test.

`make` writes random ternary weights as TQ2_0 and a random f16 embedding, which is the head too,
as in the model. The file's architecture is `llama`, so llama.cpp does slightly less work than
the model takes: no norms before the attention's output and the feed-forward's down product, and
SiLU in place of the squared ReLU. The matrices are the same.
"""

import argparse
import contextlib
import ctypes
import importlib
import importlib.metadata
import itertools
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

HIDDEN: Final = 2560
FEED_FORWARD: Final = 6912
LAYERS: Final = 30
HEADS: Final = 20
KV_HEADS: Final = 5
HEAD_DIM: Final = 128
VOCAB: Final = 128256
CONTEXT: Final = 4096
ROPE_THETA: Final = 500000.0
RMS_EPS: Final = 1e-5

# A block of TQ2_0: 256 weights as two bits each (the weight + 1), then their scale as f16.
BLOCK: Final = 256
BLOCK_BYTES: Final = BLOCK // 4 + 2
# The bytes of four weights that are each 0, 1 or 2: two bits have no meaning as 3.
TRIT_BYTES: Final = np.array(
    [a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product(range(3), repeat=4)],
    np.uint8,
)
# Rows of the embedding drawn at once, in float32.
CHUNK_ROWS: Final = 4096
WARM_UP_PROMPT: Final = 16
WARM_UP_NEW: Final = 2


def ternary(rng: np.random.Generator, rows: int, cols: int) -> NDArray[np.uint8]:
    """A random matrix as TQ2_0, scaled to keep the variance of what it multiplies."""
    blocks = np.empty((rows, cols // BLOCK, BLOCK_BYTES), np.uint8)
    picks = rng.integers(len(TRIT_BYTES), size=(rows, cols // BLOCK, BLOCK // 4), dtype=np.uint8)
    blocks[..., :-2] = TRIT_BYTES[picks]
    blocks[..., -2:] = np.array([math.sqrt(1.5 / cols)], "<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def embedding(rng: np.random.Generator) -> NDArray[np.float16]:
    """A random embedding whose logits have a variance of about 1."""
    table = np.empty((VOCAB, HIDDEN), np.float16)
    for begin in range(0, VOCAB, CHUNK_ROWS):
        part = table[begin : begin + CHUNK_ROWS]
        part[:] = rng.standard_normal(part.shape, np.float32) / math.sqrt(HIDDEN)
    return table


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor's shape by its name; vectors are norms."""
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (FEED_FORWARD, HIDDEN),
            "ffn_up": (FEED_FORWARD, HIDDEN),
            "ffn_down": (HIDDEN, FEED_FORWARD),
        }.items():
            tensors[f"blk.{layer}.{name}.weight"] = shape
    tensors["output_norm.weight"] = (HIDDEN,)
    return tensors


def make(path: Path, seed: int) -> dict[str, int]:
    """Writes the model, one tensor in memory at a time; returns its bytes by type."""
    gguf: Any = importlib.import_module("gguf")
    kinds = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random weights in the shape of bitnet-b1.58-2B-4T")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_TQ2_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_THETA)
    writer.add_layer_norm_rms_eps(RMS_EPS)
    # No tokenizer: ids go in and come out.
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("no_vocab")

    sizes: Counter[str] = Counter()
    for name, shape in shapes().items():
        kind = kind_of(name, shape)
        stored, dtype = layout(kind, shape)
        n_bytes = math.prod(stored) * dtype.itemsize
        writer.add_tensor_info(name, stored, dtype, n_bytes, raw_dtype=kinds[kind])
        sizes[kind] += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    rng = np.random.default_rng(seed)
    for name, shape in shapes().items():
        kind = kind_of(name, shape)
        if kind == "TQ2_0":
            writer.write_tensor_data(ternary(rng, *shape))
        elif kind == "F16":
            writer.write_tensor_data(embedding(rng))
        else:
            writer.write_tensor_data(np.ones(shape, np.float32))
    writer.close()
    return dict(sizes)


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """A tensor's type in the file, by ggml's name for it."""
    if len(shape) == 1:
        return "F32"
    return "F16" if name.startswith("token_embd") else "TQ2_0"


def layout(kind: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """The shape and the type of the array that holds a tensor of that kind."""
    if kind == "TQ2_0":
        return (shape[0], shape[1] // BLOCK * BLOCK_BYTES), np.dtype(np.uint8)
    return shape, np.dtype(np.float16 if kind == "F16" else np.float32)


class Engine:
    """A model in llama.cpp, by its C functions: the Python class around them costs time."""

    def __init__(self, llama: Any, path: Path, *, mmap: bool) -> None:
        self.llama = llama
        parameters = llama.llama_model_default_params()
        mode = llama.LLAMA_LOAD_MODE_MMAP if mmap else llama.LLAMA_LOAD_MODE_NONE
        parameters.load_mode = mode
        self.model = llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise SystemExit(f"llama.cpp could not load {path}; --verbose shows why")
        self.vocab_size = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model)))
        self.weight_bytes = int(llama.llama_model_size(self.model))

    @contextlib.contextmanager
    def context(self, threads: int, prompt_tokens: int, new_tokens: int) -> Iterator[Any]:
        """Room for one sequence; flash attention and an f16 cache, llama.cpp's defaults."""
        parameters = self.llama.llama_context_default_params()
        parameters.n_ctx = prompt_tokens + new_tokens
        parameters.n_batch = prompt_tokens
        parameters.n_threads = parameters.n_threads_batch = threads
        context = self.llama.llama_init_from_model(self.model, parameters)
        if not context:
            raise SystemExit("llama.cpp could not make a context; --verbose shows why")
        try:
            yield context
        finally:
            self.llama.llama_free(context)

    def run(
        self, context: Any, prompt: NDArray[np.int32], new_tokens: int
    ) -> tuple[float, float, NDArray[np.int32]]:
        """Seconds for the prompt and for the new tokens, and these tokens."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(context), True)
        new = np.zeros(new_tokens, np.int32)
        start = time.perf_counter()
        logits = self._forward(context, prompt)
        prefilled = time.perf_counter()
        for n in range(new_tokens):
            new[n] = np.argmax(logits)
            logits = self._forward(context, new[n : n + 1])
        return prefilled - start, time.perf_counter() - prefilled, new

    def _forward(self, context: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """The logits after the last of `tokens`, as a view of llama.cpp's memory."""
        ids = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        status = self.llama.llama_decode(context, self.llama.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise SystemExit(f"llama_decode failed with status {status}")
        logits = self.llama.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab_size,))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Loads the model once and measures it with each count of threads."""
    llama: Any = importlib.import_module("llama_cpp")
    silent = llama.llama_log_callback(lambda level, text, data: None)
    if not options.verbose:
        llama.llama_log_set(silent, ctypes.c_void_p(0))
    llama.llama_backend_init()
    engine = Engine(llama, options.file, mmap=options.mmap)
    rng = np.random.default_rng(0)
    prompt = rng.integers(engine.vocab_size, size=options.prompt_tokens, dtype=np.int32)
    results = []
    for threads in options.threads:
        with engine.context(threads, options.prompt_tokens, options.new_tokens) as context:
            warm_up = min(WARM_UP_NEW, options.new_tokens)
            engine.run(context, prompt[:WARM_UP_PROMPT], warm_up)
            runs = [
                engine.run(context, prompt, options.new_tokens) for _ in range(options.repetitions)
            ]
        prefill = statistics.median(prefill_s for prefill_s, _, _ in runs)
        decode = statistics.median(decode_s for _, decode_s, _ in runs)
        results.append(
            {
                "threads": threads,
                "prefill_tokens_per_s": options.prompt_tokens / prefill,
                "decode_tokens_per_s": options.new_tokens / decode,
                "read_gb_per_s": engine.weight_bytes * options.new_tokens / decode / 1e9,
                "new_tokens": runs[-1][2].tolist(),
                "runs": [{"prefill_s": p, "decode_s": d} for p, d, _ in runs],
            }
        )
    return {
        "file": options.file.name,
        "file_bytes": options.file.stat().st_size,
        "weight_bytes": engine.weight_bytes,
        "llama_cpp_python": importlib.metadata.version("llama_cpp_python"),
        "system_info": llama.llama_print_system_info().decode(),
        "mmap": options.mmap,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repetitions": options.repetitions,
        "results": results,
    }


def show(report: dict[str, Any]) -> None:
    """Prints a report as a table."""
    print(f"llama-cpp-python {report['llama_cpp_python']}: {report['system_info']}")
    print(f"{report['prompt_tokens']} prompt tokens, {report['new_tokens']} new ones\n")
    print("| threads | prefill tok/s | decode tok/s | reading GB/s |")
    print("|---|---|---|---|")
    keys = ("prefill_tokens_per_s", "decode_tokens_per_s", "read_gb_per_s")
    for result in report["results"]:
        speeds = " | ".join(f"{result[key]:.1f}" for key in keys)
        print(f"| {result['threads']} | {speeds} |")


def count(text: str) -> int:
    """An argument that is at least 1."""
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def main() -> None:
    """Makes the model or measures it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the model")
    making.add_argument("file", type=Path)
    making.add_argument("--seed", type=int, default=0)
    measuring = commands.add_parser("measure", help="measure the model")
    measuring.add_argument("file", type=Path)
    measuring.add_argument("--threads", type=count, nargs="+", required=True)
    measuring.add_argument("--prompt-tokens", type=count, default=16)
    measuring.add_argument("--new-tokens", type=count, default=64)
    measuring.add_argument("--repetitions", type=count, default=3)
    measuring.add_argument(
        "--no-mmap", dest="mmap", action="store_false", help="read the file into memory first"
    )
    measuring.add_argument("--json", action="store_true", help="print every run, as JSON")
    measuring.add_argument("--verbose", action="store_true", help="leave llama.cpp's log on")
    options = parser.parse_args()
    if options.command == "make":
        for kind, n_bytes in make(options.file, options.seed).items():
            print(f"{kind}: {n_bytes:,} bytes")
        print(f"{options.file}: {options.file.stat().st_size:,} bytes")
        return
    report = measure(options)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)


if __name__ == "__main__":
    main()
