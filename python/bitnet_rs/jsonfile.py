"""The small text files of a checkpoint: read whole, and refused by name where they are damaged.

For `loaders` and `tokenizer.py`, which both read JSON. Apart so that every such file, whoever
wrote it, fails in one way: a ValueError that names it.
"""

import json
from pathlib import Path
from typing import Any, Final

_CURE: Final = "download or copy the file again"
# Files of real checkpoints are a handful of levels deep. What is deeper is damage or malice, and
# would overflow the stack of whatever walks or prints it later.
_DEEPEST: Final = 64


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); {_CURE}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is not UTF-8, not JSON, no object, or nested absurdly deep.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); {_CURE}") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply); {_CURE}") from None
    except ValueError:  # the only other one that the parser raises: Python's limit for integers
        raise ValueError(
            f"{path}: holds an integer of thousands of digits, which no field can mean; {_CURE}"
        ) from None
    if type(content) is not dict:
        raise ValueError(f"{path}: holds a {type(content).__name__}; wanted a JSON object")
    _refuse_deep(content, path)
    return content


def _refuse_deep(content: dict[str, Any], path: Path) -> None:
    level: list[Any] = [content]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in (dict, list)
        ]
        if not level:
            return
    raise ValueError(f"{path}: nested more than {_DEEPEST} levels deep; {_CURE}")
