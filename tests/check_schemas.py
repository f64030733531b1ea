"""Random JSON schemas by the hundred, through a real server: every reply parses and validates.

    python tests/check_schemas.py [SCHEMAS] [SEED]

Each schema is asked for four times: greedy and sampled, with the fewest tokens in which a text is
known to fit, and with some hundred more. Exits with 1 and shows the first reply that is not valid,
or did not end by itself. Not part of the suite, which has a short one of its kind: `make
test-schemas`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings

import bitnet_rs
import json_schemas
from bitnet_rs.server.grammar import Grammars
from serving import Served, serving


def requests(schema: dict[str, Any], fewest: int) -> Iterator[dict[str, Any]]:
    """The bodies for one schema."""
    wanted = {"name": "reply", "schema": schema, "strict": True}
    for temperature in (0, 1):
        for more in (0, 150):
            yield {
                "model": "demo",
                "messages": [{"role": "user", "content": "Describe yourself."}],
                "response_format": {"type": "json_schema", "json_schema": wanted},
                "temperature": temperature,
                "seed": fewest,
                "max_tokens": fewest + more,
            }


def problem(served: Served, body: dict[str, Any], schema: dict[str, Any]) -> str | None:
    """What is wrong with the reply to a request; None where it is as it should be."""
    answer = served.post("/v1/chat/completions", **body)
    if answer.status_code != 200:
        return f"status {answer.status_code}: {answer.text}"
    choice = answer.json()["choices"][0]
    text = choice["message"]["content"]
    try:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{text!r}: {error}"
    reason = choice["finish_reason"]
    return None if reason == "stop" else f"{text!r}: finish_reason {reason!r}"


def main(count: int, number: int) -> int:
    """Asks for so many schemas; the number of requests that went wrong, which is 0 or 1."""
    asked = 0
    with bitnet_rs.load("demo") as model, serving(model) as served:
        grammars = Grammars(model.tokenizer, model.vocab_size, model.stop_ids)

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(json_schemas.schemas())
        def check(schema: dict[str, Any]) -> None:
            nonlocal asked
            for body in requests(schema, grammars.json_schema(schema).shortest):
                asked += 1
                found = problem(served, body, schema)
                assert found is None, f"{json.dumps(body)}\n{found}"

        start = time.perf_counter()
        try:
            check()
        except AssertionError as error:
            print(f"request {asked}: {error}")
            return 1
        seconds = time.perf_counter() - start
    print(f"{count} schemas, {asked} replies, all of them valid: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*(numbers + [200, 1][len(numbers) :])))
