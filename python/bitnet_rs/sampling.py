"""From logits to one token: functions over one row of numbers.

For the engine, which calls `sample` once for each sequence and step, and for
whoever wants to know what a parameter does exactly. Apart because it knows
neither models nor text: a row of logits, the ids so far and a random generator
come in, a token id goes out.

The definition, in this order (that of transformers):

1. Repetition penalty: logits of ids seen so far (prompt included) are divided by
   it where positive and multiplied where negative.
2. Temperature 0: the highest logit, the lowest id among equals. Otherwise logits
   are divided by the temperature.
3. `top_k` keeps the k highest, lower ids first among equals.
4. `top_p` keeps the shortest run of the most probable tokens that are left whose
   probabilities, as shares of what is left, reach it.
5. `min_p` keeps what is at least that fraction of the most probable one.
6. One uniform number picks among the kept tokens, laid out by id.

A vocabulary has 128,256 entries in the larger models, so nothing here sorts it:
`np.partition` finds the few candidates first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.checks import check_integer

# Candidates looked at first for top_p, and by how much they grow when they do not reach it. At
# temperature 1 a language model's 0.95 nucleus is mostly below 100 tokens; each further round
# costs one more partition of the vocabulary.
_NUCLEUS_FIRST = 128
_NUCLEUS_GROWTH = 16


def _number(name: str, value: object, low: float, high: float, wanted: str) -> float:
    """Checks a real number in [low, high] and gives it back as a float."""
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond all floats
            number = math.inf
        if math.isfinite(number) and low <= number <= high:
            return number
    raise ValueError(f"{name} is {value!r}; wanted {wanted}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding.

    Attributes:
        temperature: 0 always takes the most probable token (greedy); higher is more random.
        top_k: Keep only the k most probable tokens; 0 keeps all.
        top_p: Keep the most probable tokens that together reach this probability; 1 keeps all.
        min_p: Drop tokens below this fraction of the most probable one; 0 drops none.
        repetition_penalty: Above 1 makes tokens that occurred already less probable; 1 is off.
        seed: The same seed gives the same tokens, whatever else runs; None differs each time.

    Raises:
        ValueError: A value is out of its range; the message names the field.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "temperature": _number(
                "temperature", self.temperature, 0.0, math.inf, "a number >= 0 (0 is greedy)"
            ),
            "top_k": check_integer("top_k", self.top_k, 0, wanted="an integer >= 0 (0 keeps all)"),
            "top_p": _number("top_p", self.top_p, 5e-324, 1.0, "a number above 0, up to 1"),
            "min_p": _number("min_p", self.min_p, 0.0, 1.0, "a number from 0 to 1"),
            "repetition_penalty": _number(
                "repetition_penalty",
                self.repetition_penalty,
                5e-324,
                math.inf,
                "a number above 0 (1 is off)",
            ),
        }
        if self.seed is not None:
            checked["seed"] = check_integer("seed", self.seed, 0, wanted="an integer >= 0, or None")
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def rng(self) -> np.random.Generator:
        """A fresh random generator for one sequence, seeded by `seed`."""
        return np.random.Generator(np.random.PCG64(self.seed))


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities at one step, of the model's own (unmodified) distribution.

    Attributes:
        logprob: That of the token that was taken.
        top: The most probable tokens as (id, log-probability), most probable first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def greedy(logits: NDArray[np.float32]) -> int:
    """The id of the highest logit, the lowest id among equals; logits have shape (vocab_size,).

    Raises:
        RuntimeError: The logits hold NaN or +inf, or nothing above -inf.
    """
    # argmax stops at the first NaN, so looking at the winner checks the whole row for free.
    best = int(logits.argmax())
    if not math.isfinite(logits[best]):
        raise RuntimeError(
            f"the model computed a logit of {float(logits[best])} for token id {best}; wanted "
            "finite logits. The weights are damaged, or do not fit this architecture: "
            "`bitnet-rs verify` checks the computation, a fresh download the file"
        )
    return best


def penalize(
    logits: NDArray[np.float32], seen: NDArray[np.integer[Any]], penalty: float
) -> NDArray[np.float32]:
    """A copy of `logits` with the repetition penalty on the ids in `seen` (any order, repeats)."""
    out = logits.copy()
    # Gathered before it is scattered: an id that stands twice in `seen` is penalized once. In
    # float64, where every penalty is a finite number above 0; in float32 it may round to neither.
    values = logits[seen].astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        changed = np.where(values > 0, values / penalty, values * penalty)
    # The result may overflow; the largest float keeps the order, infinity would not be a logit.
    limit = float(np.finfo(np.float32).max)
    out[seen] = np.clip(changed, -limit, limit)
    return out


def top_k_ids(logits: NDArray[np.floating[Any]], k: int) -> NDArray[np.intp]:
    """Ids of the k highest logits, in order of id; lower ids are taken first among equals."""
    n = len(logits)
    if k >= n:
        return np.arange(n)
    if k < 1:
        return np.arange(0)
    # The k-th highest value, then everything above it and as many of its equals as still fit.
    kth = np.partition(logits, n - k)[n - k]
    at_least = np.flatnonzero(logits >= kth)
    surplus = len(at_least) - k
    if surplus:
        equal = np.flatnonzero(logits[at_least] == kth)
        at_least = np.delete(at_least, equal[len(equal) - surplus :])
    return at_least


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.intp]:
    """Positions (ascending) of the shortest run of the highest weights that reaches `top_p`."""
    n = len(weights)
    wanted = top_p * float(weights.sum())
    k = _NUCLEUS_FIRST
    while True:
        candidates = top_k_ids(weights, k)
        # Stable on the negated weights: equals stay in order of id.
        order = candidates[np.argsort(-weights[candidates], kind="stable")]
        reached = np.cumsum(weights[order])
        if reached[-1] >= wanted or len(order) == n:
            # Rounding can leave the last sum short of the total: then everything is kept.
            length = int(np.searchsorted(reached, wanted, side="left")) + 1
            return np.sort(order[:length])
        k *= _NUCLEUS_GROWTH


def candidates(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.intp] | None, NDArray[np.float64]]:
    """What temperature, top_k, top_p and min_p leave of a row of logits.

    Args:
        logits: float32, shape (vocab_size,), penalized already where that is asked for.
        params: With a temperature above 0.

    Returns:
        The kept ids in ascending order (None: all of them), and their weights: float64,
        proportional to their probabilities, 1 for the most probable token.

    Raises:
        RuntimeError: As `greedy`.
    """
    highest = float(logits[greedy(logits)])
    ids = None
    if 0 < params.top_k < len(logits):
        ids = top_k_ids(logits, params.top_k)
        logits = logits[ids]
    weights = logits.astype(np.float64)
    weights -= highest
    # A tiny temperature sends all but the best to -inf, whose weight is rightly 0.
    with np.errstate(over="ignore", under="ignore"):
        weights /= params.temperature
        np.exp(weights, out=weights)
    if params.top_p < 1.0:
        kept = _nucleus(weights, params.top_p)
        weights = weights[kept]
        ids = kept if ids is None else ids[kept]
    if params.min_p > 0.0:
        kept = np.flatnonzero(weights >= params.min_p)
        weights = weights[kept]
        ids = kept if ids is None else ids[kept]
    return ids, weights


def sample(
    logits: NDArray[np.float32],
    params: SamplingParams,
    rng: np.random.Generator,
    seen: NDArray[np.integer[Any]] | None = None,
) -> int:
    """Chooses the next token. The row of logits is not changed.

    Args:
        logits: float32, shape (vocab_size,).
        params: How to choose.
        rng: This sequence's own generator; one number is drawn unless decoding is greedy.
        seen: Ids of the prompt and of what was generated so far, for the repetition penalty.

    Returns:
        A token id.

    Raises:
        RuntimeError: The logits hold NaN or +inf, or nothing above -inf.
    """
    if params.repetition_penalty != 1.0 and seen is not None and len(seen):
        greedy(logits)  # refuses bad logits before clipping could hide them
        logits = penalize(logits, seen, params.repetition_penalty)
    if params.temperature == 0.0:
        return greedy(logits)
    ids, weights = candidates(logits, params)
    reached = np.cumsum(weights)
    drawn = rng.random() * reached[-1]
    # The first token whose sum exceeds the draw: one of weight 0 never does. Where rounding puts
    # the draw on the total itself, the last token that adds to it is taken.
    place = int(np.searchsorted(reached, drawn, side="right"))
    if place == len(reached):
        place = int(np.searchsorted(reached, reached[-1], side="left"))
    return place if ids is None else int(ids[place])


def logprobs(logits: NDArray[np.float32], token: int, top: int = 0) -> Logprobs:
    """Log-probabilities under the softmax of the raw logits, in float64.

    Args:
        logits: float32, shape (vocab_size,).
        token: The id that was taken.
        top: How many of the most probable tokens to list.
    """
    highest = float(logits[greedy(logits)])
    shifted = logits.astype(np.float64)
    shifted -= highest
    log_total = highest + math.log(float(np.exp(shifted).sum()))
    listed: list[tuple[int, float]] = []
    if top > 0:
        ids = top_k_ids(logits, top)
        order = ids[np.argsort(-logits[ids], kind="stable")]
        listed = [(int(i), float(logits[i]) - log_total) for i in order]
    return Logprobs(float(logits[token]) - log_total, tuple(listed))
