"""`load` and `Model`: a checkpoint, its tokenizer and the core under one roof.

For users, through `bitnet_rs`. This is where the parts meet: text becomes ids,
defaults come from the checkpoint, arguments are checked before anything is
computed. It computes nothing itself.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from bitnet_rs import _core
from bitnet_rs.chat import Chat
from bitnet_rs.checks import check_integer, check_iterable
from bitnet_rs.completion import Completion, Reply, Stream, run, stream
from bitnet_rs.engine import (
    MAX_SEQUENCES,
    PREFILL_TOKENS,
    Constraint,
    Engine,
    Request,
    Running,
    check_ids,
)
from bitnet_rs.kernel_choice import KernelChoice, choose_kernels, describe
from bitnet_rs.loaders import Checkpoint, FileOptions, open_checkpoint
from bitnet_rs.loaders.families import Activations
from bitnet_rs.loaders.options import I2sLayout, Tile
from bitnet_rs.loaders.progress import show_progress
from bitnet_rs.machine import choose_kernel, choose_kv_memory, choose_threads
from bitnet_rs.options import Defaults, Options, Settings, check_options, choose_context
from bitnet_rs.runner import Runner
from bitnet_rs.tokenizer import Tokenizer

if TYPE_CHECKING:
    from bitnet_rs.bench import BenchReport
    from bitnet_rs.verify import VerifyReport

KvDtype = Literal["f16", "f32"]

# Where neither the caller nor the checkpoint says how much to write.
DEFAULT_MAX_TOKENS: Final = 128


def load(
    source: str | os.PathLike[str] = "demo",
    *,
    threads: int | None = None,
    kernel: str = "auto",
    kv_dtype: KvDtype = "f16",
    context: int | None = None,
    max_sequences: int | None = None,
    kv_memory: int | None = None,
    revision: str | None = None,
    activations: Activations | None = None,
    masters: bool = False,
    i2s_layout: I2sLayout = "x86",
    tl_tiles: Mapping[tuple[int, int], Tile] | None = None,
) -> Model:
    """Loads a ternary model.

    The token embedding and the head stay mapped from the checkpoint's file, so that they take
    memory only as they are read: deleting or replacing the file is fine while the model is in use,
    overwriting it in place is not.

    Args:
        source: `demo` (a small model that comes with the package), a folder with the
            checkpoint's files, a GGUF file, or a Hugging Face hub id (of a GGUF repository perhaps
            with the file's name behind it), which is downloaded once and cached.
        threads: Threads that compute. None: the environment variable BITNET_RS_THREADS, else one
            per physical core.
        kernel: A name from `info().kernels`. `auto`: BITNET_RS_KERNEL, else the fastest, measured
            on this model's shapes in a fifth of a second and remembered in the user's cache
            folder. All kernels compute the same bits.
        kv_dtype: Precision of cached keys and values, `f16` or `f32`.
        context: Most tokens of prompt and answer together. None: what the model was trained for.
        max_sequences: Most sequences computed at once; more wait their turn. None: 16.
        kv_memory: Most bytes of keys and values: those of running sequences, and in what is left
            those of finished ones, so that prompts that begin alike need not be computed again.
            None: a quarter of the machine's memory, at least one full context.
        revision: Branch, tag or commit of a hub id.
        activations: What projections multiply. None: what the model was trained with; `int8`
            rounds the activations of a model that was trained with floats (`print(model)` says
            so), or says how a model was trained whose files do not.
        masters: Float weights are the masters of a ternary model, to be quantized by their
            absolute mean, though config.json does not say so.
        i2s_layout: Order of weights in I2_S files: `x86` (all published ones), `arm`, `rows4`.
        tl_tiles: For TL1 and TL2 files, (BM, BK, bm) by (rows, columns) of a matrix.

    Raises:
        FileNotFoundError: The checkpoint or one of its files does not exist.
        KeyError: A tensor is missing.
        ValueError: An argument, an environment variable, a file or a field is wrong or not
            supported. The message names it, what was found and what was wanted.

    Warns:
        UserWarning: The weights look as if they were to be read otherwise (`i2s_layout`).
    """
    n_threads = choose_threads(threads)
    choose_kernel(kernel)  # refuses an unknown name before anything is downloaded
    if kv_dtype not in ("f16", "f32"):
        raise ValueError(f"kv_dtype is {kv_dtype!r}; wanted 'f16' or 'f32'")
    if max_sequences is not None:
        max_sequences = check_integer("max_sequences", max_sequences, 1)
    if kv_memory is not None:
        kv_memory = check_integer("kv_memory", kv_memory, 1, wanted="a number of bytes, or None")
    options = FileOptions.of(
        activations=activations, masters=masters, i2s_layout=i2s_layout, tl_tiles=tl_tiles
    )
    checkpoint = open_checkpoint(source, revision=revision, options=options)
    for warning in checkpoint.warnings:
        warnings.warn(warning, stacklevel=2)
    # A checkpoint without a tokenizer is of use for ids, speed and checks; what needs text says so.
    tokenizer: Tokenizer | FileNotFoundError
    try:
        tokenizer = Tokenizer.of(checkpoint)
    except FileNotFoundError as error:
        tokenizer = error.with_traceback(None)
    defaults = Defaults.of(checkpoint, tokenizer if isinstance(tokenizer, Tokenizer) else None)
    choice = choose_kernels(kernel, checkpoint.core_config, n_threads, grouped=checkpoint.grouped)
    with show_progress(checkpoint) as weights:
        core = _core.Model(
            checkpoint.core_config,
            weights,
            kernel=choice.kernel,
            batch_kernels=choice.batch_kernels,
            threads=n_threads,
        )
    return Model(
        checkpoint,
        core,
        tokenizer,
        defaults,
        choice=choice,
        kv_dtype=kv_dtype,
        context=context,
        max_sequences=max_sequences or MAX_SEQUENCES,
        kv_memory=kv_memory,
    )


class Model:
    """A loaded model. Safe to share between threads: one engine runs whatever they ask, together.

    Made by `load`. In a `with` statement it is closed at the end.

    Attributes:
        name: What was loaded, as it was named.
        config: The checkpoint's config.json.
        kernel: Kernel that multiplies the ternary matrices.
        batch_kernels: Those for steps of several tokens, see `KernelChoice`.
        prefill_kernel: The last of them, for many tokens at a time.
        kernel_choice: Why these kernels, and what was measured.
        threads: Threads that compute.
        kv_dtype: Precision of cached keys and values.
        context_length: Most tokens of prompt and answer together.
        max_sequences: Most sequences computed at once.
        kv_memory: Most bytes of keys and values of running and finished sequences.
        vocab_size: Rows of the embedding; valid token ids are below it.
        stop_ids: Token ids that end a text.
        facts: Facts about the model in numbers, see `_core.Model.facts`.
        format: How the weights are stored on disk.
        lossless: Whether the computation is exactly the one the model was trained for.
        lossless_reason: Why.
        notes: What was not taken as the files have it, or is to be known.
        checkpoint: The files it came from.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        core: _core.Model,
        tokenizer: Tokenizer | FileNotFoundError,
        defaults: Defaults,
        *,
        choice: KernelChoice,
        kv_dtype: KvDtype,
        context: int | None,
        max_sequences: int,
        kv_memory: int | None,
    ) -> None:
        self._core: _core.Model | None = core
        self._runner: Runner | None = None
        self._lock = threading.Lock()
        self._tokenizer = tokenizer
        self._defaults = defaults
        self.checkpoint: Final = checkpoint
        self.name: Final = checkpoint.name
        self.config: Final = checkpoint.config
        self.format: Final = checkpoint.format
        self.lossless: Final = checkpoint.lossless
        self.lossless_reason: Final = checkpoint.lossless_reason
        self.notes: Final = (*checkpoint.warnings, *checkpoint.notes) + (
            tokenizer.notes if isinstance(tokenizer, Tokenizer) else ()
        )
        self.facts: Final = core.facts
        self.kernel: Final = core.kernel
        self.batch_kernels: Final = tuple(core.batch_kernels)
        self.prefill_kernel: Final = self.batch_kernels[-1]
        self.kernel_choice: Final = choice
        self.threads: Final = core.threads
        self.kv_dtype: Final[KvDtype] = kv_dtype
        self.vocab_size: Final = int(self.facts["vocab_size"])
        self.context_length: Final = choose_context(context, int(self.facts["max_positions"]))
        self.max_sequences: Final = max_sequences
        self.kv_memory: Final = choose_kv_memory(
            kv_memory, core.new_cache(self.context_length, kv_dtype).n_bytes
        )
        self.stop_ids: Final = frozenset(i for i in defaults.stop_ids if i < self.vocab_size)

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            FileNotFoundError: It has none.
        """
        if isinstance(self._tokenizer, Tokenizer):
            return self._tokenizer
        raise FileNotFoundError(
            f"{self._tokenizer}. Without one, only logits() and core.forward() work, on token ids"
        )

    @property
    def core(self) -> _core.Model:
        """The model below the text: `forward` over ids and caches.

        Raises:
            RuntimeError: The model was closed.
        """
        if self._core is None:
            raise RuntimeError(f"the model {self.name!r} was closed; load it again to use it")
        return self._core

    @property
    def runner(self) -> Runner:
        """What runs the sequences of this model, for all who use it.

        Raises:
            RuntimeError: The model was closed.
        """
        core = self.core
        with self._lock:
            if self._runner is None:
                engine = Engine(
                    core,
                    kv_dtype=self.kv_dtype,
                    max_sequences=self.max_sequences,
                    kv_limit=self.kv_memory,
                )
                self._runner = Runner(engine)
            return self._runner

    def close(self) -> None:
        """Gives the weights back, once calls that still run have finished. Closing twice is fine."""
        with self._lock:
            self._core, runner, self._runner = None, self._runner, None
        if runner is not None:
            runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = self.facts
        lossless = "yes" if self.lossless else "no"
        params, ternary = (_count(int(facts[key])) for key in ("params", "ternary_params"))
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        rows = (
            f"{self.name}: {facts['architecture']}, {params} parameters, {ternary} of them ternary",
            f"  format    {self.format}",
            f"  kernel    {describe(self.kernel, self.batch_kernels)}, {threads}",
            f"  memory    {int(facts['packed_bytes']) / 1e6:,.1f} MB of weights",
            f"  context   {self.context_length} tokens, keys and values in {self.kv_dtype}",
            f"  lossless  {lossless}: {self.lossless_reason}",
            *(f"  note      {note}" for note in self.notes),
        )
        return "\n".join(rows)

    # Text in, text out.

    @overload
    def generate(self, prompt: str, **options: Unpack[Options]) -> str: ...
    @overload
    def generate(self, prompt: list[str], **options: Unpack[Options]) -> list[str]: ...
    def generate(self, prompt: str | list[str], **options: Unpack[Options]) -> str | list[str]:
        """Continues a prompt, or several at once.

        Args:
            prompt: Text, or a list of texts. Each text of a list gets what it would get alone;
                together they are faster.
            **options: As `complete`. With a seed, every prompt of a list uses the same.

        Returns:
            The text that follows: a string for a string, a list for a list.

        Raises:
            TypeError: `prompt` is neither.
            ValueError: As `complete`.
        """
        if isinstance(prompt, str):
            return self._run([self._prompt(prompt)], [self.settings(**options)])[0].text
        prompts = []
        for i, text in enumerate(check_iterable("prompt", prompt, "a str, or a list of them")):
            if not isinstance(text, str):
                raise TypeError(
                    f"prompt[{i}] is a {type(text).__name__}; wanted a str. For token ids, use "
                    "complete()"
                )
            prompts.append(self._prompt(text, f"prompt[{i}]"))
        settings = self.settings(**options)
        return [c.text for c in self._run(prompts, [settings] * len(prompts))]

    @overload
    def complete(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        n: Literal[1] = 1,
        **options: Unpack[Options],
    ) -> Completion: ...
    @overload
    def complete(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        n: int,
        **options: Unpack[Options],
    ) -> Completion | list[Completion]: ...
    def complete(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        logprobs: int | None = None,
        n: int = 1,
        ignore_eos: bool = False,
    ) -> Completion | list[Completion]:
        """Continues a prompt, and tells everything about it.

        What is None comes from the checkpoint's generation_config.json; where that asks for no
        sampling, decoding is greedy. A `temperature` alone switches sampling on.

        Args:
            prompt: Text, or token ids, which are used as they are (no BOS is added).
            max_tokens: Most tokens to generate; less where the context ends. None: what the
                checkpoint says, else 128.
            temperature: 0 is greedy.
            top_k: Sample among the k most probable tokens; 0 is off.
            top_p: Sample among the most probable tokens that together reach this; 1 is off.
            min_p: Leave out tokens less probable than this share of the best one's; 0 is off.
            repetition_penalty: Above 1 makes tokens that occurred already less probable.
            seed: The same seed gives the same text.
            stop: A string, or several, before which the text ends.
            logprobs: Report log-probabilities, with that many of the most probable tokens.
            n: How many completions. With a seed, the others use seed + 1, seed + 2, ...
            ignore_eos: Go on after stop tokens. They are then among `tokens`, but not in `text`.

        Returns:
            The completion; a list of them where `n` is above 1.

        Raises:
            FileNotFoundError: The checkpoint has no tokenizer, which makes the text.
            TypeError: The prompt is neither text nor a sequence.
            ValueError: An argument is out of range, the prompt is empty or too long, or a token
                id is not in the vocabulary.
        """
        n = check_integer("n", n, 1)
        settings = self.settings(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
            ignore_eos=ignore_eos,
        )
        completions = self._run([self._prompt(prompt)] * n, settings.repeated(n))
        return completions[0] if n == 1 else completions

    def stream(
        self,
        prompt: str | Sequence[int] | NDArray[np.integer[Any]],
        **options: Unpack[Options],
    ) -> Stream:
        """Continues a prompt, giving pieces of text as they are generated.

        Args:
            prompt: Text or token ids, as for `complete`.
            **options: As `complete`, without `n`.

        Returns:
            An iterator of non-empty strings. Closing it cancels the generation.

        Raises:
            ValueError: As `complete`; raised here, not at the first piece.
        """
        settings = self.settings(**options)
        request = self.request(self._prompt(prompt), settings)
        runner = self.runner
        runner.check(request)
        reply = Reply(Running(request), self.tokenizer, settings.stop)
        return Stream(stream(runner, reply), reply)

    def chat(self, system: str | None = None) -> Chat:
        """Starts a conversation.

        Args:
            system: An instruction to put first, as the system message.

        Raises:
            ValueError: The checkpoint has no chat template, or a broken one.
        """
        return Chat(self, system)

    # Tokens and logits.

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with `add_special_tokens`, BOS where the checkpoint wants it."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(
        self, ids: Sequence[int] | NDArray[np.integer[Any]], *, skip_special_tokens: bool = True
    ) -> str:
        """Text of token ids."""
        plain = ids.tolist() if isinstance(ids, np.ndarray) else ids
        listed = check_iterable("ids", plain, "a sequence of token ids")
        return self.tokenizer.decode(list(listed), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Iterable[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """Writes messages (dicts with `role` and `content`) as the prompt the model expects.

        Raises:
            ValueError: There is no chat template, it is broken, or it refuses these messages.
        """
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, **variables
        )

    def logits(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Logits of the next token after each prefix of `ids`.

        Args:
            ids: Token ids, 1 to `context_length` of them.

        Returns:
            float32, shape (n, vocab_size). 4 bytes times both: 0.5 MB a token for a vocabulary
            of 128,256.

        Raises:
            ValueError: `ids` is empty, too long, or has an id that is not in the vocabulary.
        """
        core = self.core
        tokens = check_ids(ids, self.vocab_size, "ids")
        if len(tokens) > self.context_length:
            raise ValueError(
                f"ids has {len(tokens)} tokens; the context holds {self.context_length}"
            )
        cache = core.new_cache(len(tokens), self.kv_dtype)
        rows = np.empty((len(tokens), self.vocab_size), np.float32)
        for at in range(0, len(tokens), PREFILL_TOKENS):
            chunk = tokens[at : at + PREFILL_TOKENS]
            rows[at : at + len(chunk)] = core.forward([(chunk, cache)], logits="all")
        return rows

    @overload
    def embed(self, text: str) -> NDArray[np.float32]: ...
    @overload
    def embed(self, text: list[str]) -> NDArray[np.float32]: ...
    def embed(self, text: str | list[str]) -> NDArray[np.float32]:
        """Embeddings of texts: the last token's hidden state, scaled to length 1.

        For the embedding models, whose tokenizers end a text with the token that is taken. Their
        dot products are cosines. A text gets the same embedding alone and in a list.

        Args:
            text: A text, or several, which are computed together.

        Returns:
            float32, shape (hidden_size,) for a text, (n, hidden_size) for a list of n.

        Raises:
            FileNotFoundError: The checkpoint has no tokenizer.
            TypeError: `text` is neither.
            ValueError: The model is none for embeddings, or a text is empty or too long.
        """
        if not self.checkpoint.embedding:
            raise ValueError(
                f"{self.name} is a model that writes text, not one for embeddings, such as "
                "microsoft/bitnet-embedding-0.6b; use generate() or logits()"
            )
        if isinstance(text, str):
            one: NDArray[np.float32] = self.embed_ids([self._prompt(text, "text")])[0]
            return one
        ids = []
        for i, each in enumerate(check_iterable("text", text, "a str, or a list of them")):
            if not isinstance(each, str):
                raise TypeError(f"text[{i}] is a {type(each).__name__}; wanted a str")
            ids.append(self._prompt(each, f"text[{i}]"))
        return self.embed_ids(ids)

    def embed_ids(self, texts: Sequence[NDArray[np.uint32]]) -> NDArray[np.float32]:
        """As `embed`, for texts that are token ids already, from `check_encoded` or `check_ids`."""
        # Passes of so many tokens as a prompt's chunks have.
        core = self.core
        out: NDArray[np.float32]
        out = np.empty((len(texts), int(self.facts["hidden_size"])), np.float32)
        for i, ids in enumerate(texts):
            if len(ids) > self.context_length:
                raise ValueError(
                    f"text[{i}] has {len(ids)} tokens; the context holds {self.context_length}: "
                    "embed it in pieces"
                )
        batch: list[tuple[NDArray[np.uint32], _core.KvCache]] = []
        order: list[int] = []

        def run_batch() -> None:
            if batch:
                out[order] = core.forward_hidden(batch)
            batch.clear()
            order.clear()

        for i, ids in enumerate(texts):
            cache = core.new_cache(len(ids), self.kv_dtype)
            while len(ids) > PREFILL_TOKENS:
                core.forward_top([(ids[:PREFILL_TOKENS], cache)], [0])
                ids = ids[PREFILL_TOKENS:]
            if sum(len(part) for part, _ in batch) + len(ids) > PREFILL_TOKENS:
                run_batch()
            batch.append((ids, cache))
            order.append(i)
        run_batch()
        out /= np.sqrt(np.square(out).sum(axis=1, keepdims=True))
        return out

    def new_cache(self, capacity: int | None = None) -> _core.KvCache:
        """An empty KV cache for `core.forward`; for the whole context when None.

        Raises:
            ValueError: `capacity` is below 1, or above the model's max_position_embeddings.
        """
        if capacity is None:
            capacity = self.context_length
        capacity = check_integer("capacity", capacity, 1, int(self.facts["max_positions"]))
        return self.core.new_cache(capacity, self.kv_dtype)

    # Reports.

    def verify(self) -> VerifyReport:
        """Checks on this machine that every kernel and every way to compute gives the same bits."""
        from bitnet_rs import verify

        return verify.run(self)

    def bench(
        self,
        *,
        prompt_tokens: int | None = None,
        new_tokens: int | None = None,
        repetitions: int = 3,
    ) -> BenchReport:
        """Measures prefill and decode speed, next to the memory's; `bench.run` tells more."""
        from bitnet_rs import bench

        return bench.run(
            self.core,
            name=self.name,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repetitions=repetitions,
            kv_dtype=self.kv_dtype,
            context_length=self.context_length,
        )

    # What `Chat` and the server build on.

    def settings(self, **options: Unpack[Options]) -> Settings:
        """Checks the options of a call and fills in the checkpoint's defaults."""
        return check_options(
            options,
            self._defaults,
            stop_ids=self.stop_ids,
            vocab_size=self.vocab_size,
            special_id=lambda text: self.tokenizer.special_id(text),
        )

    def check_encoded(self, ids: list[int], name: str) -> NDArray[np.uint32]:
        """Token ids that the tokenizer made, checked: not all are rows of the embedding.

        Raises:
            ValueError: There are none, or the tokenizer has more tokens than the model.
        """
        highest = max(ids, default=0)
        if highest >= self.vocab_size:
            path = self.checkpoint.path
            raise ValueError(
                f"{name} has the token id {highest}: {path / 'tokenizer.json'} has more tokens "
                f"than the vocab_size of {self.vocab_size} in config.json. The two are of "
                "different models; fetch both from the same place"
            )
        return check_ids(ids, self.vocab_size, name)

    def request(
        self,
        prompt: NDArray[np.uint32],
        settings: Settings,
        *,
        name: str = "prompt",
        cure: str = "shorten it",
        default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
        constraint: Constraint | None = None,
        prompt_logprobs: bool = False,
    ) -> Request:
        """What the engine is to do, within the context.

        Args:
            prompt: Token ids, from `engine.check_ids`.
            settings: From `settings`.
            name: What the prompt is called in the message, should it be too long.
            cure: What to do then.
            default_max_tokens: Where neither the caller nor the checkpoint says; None: what fits.
            constraint: What may be generated.
            prompt_logprobs: As `Request`.

        Raises:
            ValueError: The prompt does not fit the context, or the model does not write.
        """
        if self.checkpoint.embedding:
            raise ValueError(
                f"{self.name} is a model for embeddings, which was not trained to write; use embed()"
            )
        room = self.context_length - len(prompt)
        if room < 1:
            most = int(self.facts["max_positions"])
            if self.context_length < most:
                cure += f", or load the model with a larger context (up to {most})"
            raise ValueError(
                f"{name} has {len(prompt)} tokens; the context holds {self.context_length}, with "
                f"at least one for the answer: {cure}"
            )
        wanted = settings.max_tokens or default_max_tokens or room
        return Request(
            prompt,
            min(wanted, room),
            settings.params,
            settings.stop_ids,
            settings.logprobs,
            constraint,
            prompt_logprobs=prompt_logprobs,
        )

    def _prompt(
        self, prompt: str | Sequence[int] | NDArray[np.integer[Any]], name: str = "prompt"
    ) -> NDArray[np.uint32]:
        """A prompt as checked token ids."""
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError(f"{name} is empty; wanted some text")
            return self.check_encoded(self.tokenizer.encode_prompt(prompt), name)
        if not isinstance(prompt, Iterable):
            kind = type(prompt).__name__
            raise TypeError(f"{name} is of type {kind}; wanted a str, or a sequence of token ids")
        return check_ids(prompt, self.vocab_size, name)

    def _run(
        self, prompts: Sequence[NDArray[np.uint32]], settings: Sequence[Settings]
    ) -> list[Completion]:
        """Runs prompts together, to their ends."""
        tokenizer = self.tokenizer
        replies = [
            Reply(Running(self.request(prompt, each)), tokenizer, each.stop)
            for prompt, each in zip(prompts, settings, strict=True)
        ]
        for _ in run(self.runner, replies):
            pass
        return [reply.completion() for reply in replies]


def _count(n: int) -> str:
    """A number of parameters in words: 5.8 M, 2.41 B."""
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.1f} M"
