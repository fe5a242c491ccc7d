"""Input that is wrong by construction, and what must become of it: a message, soon, and nothing else."""

import json
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

DEEP = 20_000  # brackets in each other: far beyond Python's recursion limit


class Hang(BaseException):
    """No Exception: nothing on the way may take it for a fault of the input."""


@contextmanager
def refused() -> Iterator[None]:
    """The body ends in a ValueError or OSError with a message, before a minute is over."""

    def give_up(number: int, frame: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        yield
    except (ValueError, OSError) as err:
        message = str(err)
    else:
        raise AssertionError("accepted")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert message.strip()


def fuzz_file(n: int, path: Path, texts: st.SearchStrategy, read: Callable[[Path], Any]) -> None:
    """`fuzz` of what reads a file."""

    def attempt(content: bytes) -> None:
        path.write_bytes(content)
        read(path)

    fuzz(n, texts, attempt)


def fuzz(n: int, case: st.SearchStrategy, attempt: Callable[[Any], None]) -> None:
    """`attempt`, which must be refused, with `n` cases, the same ones every time; what was not is told at the end."""
    done, wrong = 0, {}

    @settings(
        max_examples=n,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case)
    def run(one: Any) -> None:
        nonlocal done
        done += 1
        try:
            with refused():
                attempt(one)
        except Exception as err:  # noqa: BLE001  whatever is no refusal
            line = traceback.extract_tb(err.__traceback__)[-1]
            wrong.setdefault(f"{type(err).__name__}: {err!s:.100} ({line.filename}:{line.lineno})", f"{one!r:.600}")

    run()
    assert not wrong, "\n".join(f"{err}\n    by {one}" for err, one in wrong.items())
    assert done >= n


# -- pieces

words = st.text(max_size=12) | st.sampled_from(["", ".", "..", "../../etc/passwd", "\0", "\ud800", "e\u0301", "\u202e"])
odd_numbers = st.sampled_from([float("nan"), float("inf"), -float("inf"), 10**400, -(10**400)])
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


class Trap:
    """Pickled, it leaves a folder behind when somebody loads it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


# -- JSON documents


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a JSON tree, the root apart."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from places(value, (*at, key))


def put(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value there."""
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    return tree


def get(tree: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        tree = tree[key]
    return tree


def nested(depth: int, inner: str = "1") -> str:
    return "[" * depth + inner + "]" * depth


def of_wrong_type(value: Any) -> st.SearchStrategy:
    """No field of a configuration that may hold `value` may hold one of these."""
    unknown = st.builds(lambda word, inner: {f"no such {word}": inner}, words, junk)
    if isinstance(value, bool):
        return unknown | st.integers() | st.sampled_from(["yes", "", [], 0.5])
    if isinstance(value, int | float):
        return unknown | odd_numbers | st.sampled_from([True, "", "12", "1e400", [], [1], [[]]])
    if isinstance(value, str):
        return unknown | st.sampled_from([0, -1, 2.5, True, [[]], [{}]])
    if isinstance(value, list):
        return unknown | st.sampled_from([0, -1, 2.5, True, [[[[[]]]]], [{"a": 1}], [None]])
    if value is None:
        return unknown
    return odd_numbers | st.sampled_from([0, True, "", "x", [], [[]]])


def malformed_trees(
    trees: list[dict], required: Callable[[dict, tuple[Any, ...]], bool], unknown: bool = True
) -> st.SearchStrategy:
    """JSON objects with one thing wrong: an unknown key, a lost one, a value of a wrong type.

    `required` tells of a path in a tree whether the key must be there, `unknown` whether another one is wrong.
    """

    @st.composite
    def draw_tree(draw):
        tree = draw(st.sampled_from(trees))
        objects = [(), *(at for at in places(tree) if isinstance(get(tree, at), dict))]
        needed = [at for at in places(tree) if required(tree, at)]
        how = draw(st.sampled_from([*["type"] * 3, *["unknown"] * unknown, *["lost"] * bool(needed)]))
        if how == "unknown":
            at = draw(st.sampled_from(objects))
            return put(tree, (*at, f"{draw(words)}?"), draw(junk))
        if how == "lost":
            at = draw(st.sampled_from(needed))
            parent = {k: v for k, v in get(tree, at[:-1]).items() if k != at[-1]}
            return put(tree, at[:-1], parent) if at[:-1] else parent
        at = draw(st.sampled_from(list(places(tree))))
        return put(tree, at, draw(of_wrong_type(get(tree, at))))

    return draw_tree()


def malformed_texts(trees: list[dict], wrong: st.SearchStrategy) -> st.SearchStrategy:
    """Bytes of JSON files: such trees; and what is no JSON, or not in UTF-8, or repeats a key, or never ends."""
    whole = [json.dumps(tree) for tree in trees]
    of_tree = wrong.map(lambda tree: json.dumps(tree).encode())

    @st.composite
    def draw_text(draw):
        text = draw(st.sampled_from(whole))
        how = draw(st.sampled_from(["cut", "twice", "utf-16", "latin", "deep", "deep field", "more", "bytes", "root"]))
        if how == "cut":
            return text[: draw(st.integers(0, len(text) - 1))].encode()
        if how == "twice":
            key = draw(st.sampled_from(list(json.loads(text))))
            return f"{{{json.dumps(key)}: {json.dumps(json.loads(text)[key])}, {text[1:]}".encode()
        if how == "utf-16":
            return text.encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"])))
        if how == "latin":
            at = text.index('"', draw(st.integers(0, len(text) // 2))) + 1
            return text[:at].encode() + bytes([draw(st.integers(0x80, 0xFF))]) + text[at:].encode()
        if how == "deep":
            depth = draw(st.integers(2_000, DEEP))
            return draw(st.sampled_from([nested(depth), "[" * depth, '{"a":' * depth, nested(depth, text)])).encode()
        if how == "deep field":
            at = draw(st.sampled_from(list(json.loads(text))))
            return json.dumps(put(json.loads(text), (at,), "@")).replace('"@"', nested(DEEP)).encode()
        if how == "more":
            return text.encode() + draw(st.sampled_from([b"}", b" 1", b"\0", text.encode()]))
        if how == "bytes":
            return draw(st.binary(max_size=60) | st.sampled_from([b"\x80\x04N.", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04"]))
        return json.dumps(draw(st.none() | st.booleans() | st.integers() | words | st.lists(junk, max_size=3))).encode()

    return of_tree | draw_text()
