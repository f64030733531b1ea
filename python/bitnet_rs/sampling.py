"""From logits to one token: what the parameters mean, and functions over one row of numbers.

For the engine, which takes the token from here (`greedy`) or from the core (`_core.sample`), and
for whoever wants to know what a parameter does exactly. Apart because it knows neither models
nor text: a row of logits and the ids so far come in.

The definition, in this order (that of transformers):

1. Repetition penalty: logits of ids seen so far (prompt included) are divided by it where
   positive and multiplied where negative (`penalize`).
2. Temperature 0: the highest logit, the lowest id among equals (`greedy`). Otherwise a token has
   the integer weight floor(2^40 * e^((logit - highest) / temperature)), so that the best has 2^40,
   and one below 2^-40 of it is never drawn.
3. `top_k` keeps the k highest logits, lower ids first among equals.
4. `top_p` keeps the shortest run of the largest weights that are left, lower ids first among
   equals, whose sum reaches ceil(top_p * sum of all that are left).
5. `min_p` keeps weights of at least ceil(min_p * 2^40).
6. One uniform number in [0, 1) draws among the kept tokens, laid out by id: the first at which
   the running sum of weights exceeds floor(number * sum).

Sums of integers do not depend on order, and the exponential is the core's own float32 one, so a
seed draws the same tokens on every machine; the products in 4 and 6 are taken in float64. The
core does steps 2 to 6 (`rust/ops/sample.rs`), `_reference.py` spells them out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_rs.checks import check_integer


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
    """A copy of `logits` with the repetition penalty on the ids in `seen` (any order, repeats).

    Raises:
        RuntimeError: As `greedy`.
    """
    greedy(logits)  # refuses bad logits before clipping could hide them
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
