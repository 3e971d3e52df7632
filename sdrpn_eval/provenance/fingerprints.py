"""Fingerprints of what a score depends on: data content, rendered prompts, scorer source.

Datasets, prompts and graders change under the same task version, so a run records these. The
fingerprints of data and prompts are sums over documents, in any order, so the sum over the shares
of all processes is the fingerprint of the whole task.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from PIL import Image

from sdrpn.io.images import image_key

if TYPE_CHECKING:
    from sdrpn_eval.requests import Request

BITS = 128
SCORING = ("metric_list", "filter_list", "output_type", "score_key", "repeats")
"""Parts of a task's configuration that are data and affect the score."""

Constant = str | int | float | tuple | frozenset | re.Pattern


def digest(*parts: str | bytes) -> int:
    """Hashes texts to a number of BITS bits; the borders between them matter."""
    whole = hashlib.blake2b(digest_size=BITS // 8)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "big") + data)
    return int.from_bytes(whole.digest(), "big")


def total(digests: Iterable[int]) -> str:
    """The fingerprint of a multiset of documents, in hex; independent of their order."""
    return f"{sum(digests) % 2**BITS:0{BITS // 4}x}"


def combined(fingerprints: Iterable[str]) -> str:
    """The fingerprint of the union of multisets."""
    return total(int(one, 16) for one in fingerprints)


def document_digests(rows: Any, doc_ids: Iterable[int]) -> dict[int, int]:
    """Digest of each document: all its columns, images as they are stored."""
    # Imported here: takes seconds, which commands that only read a fingerprint do not need.
    from sdrpn_eval.requests import undecoded

    stored = undecoded(rows)
    return {i: _document_digest(stored, i) for i in sorted(set(doc_ids))}


def _document_digest(stored: Any, i: int) -> int:
    try:
        return digest(str(i), *_canonical(stored[i]))
    except Exception as error:  # reported when the document is asked
        return digest(str(i), "unreadable", without_addresses(error))


def data_fingerprint(rows: Any, doc_ids: Iterable[int]) -> str:
    """Fingerprint of the given documents."""
    return total(document_digests(rows, doc_ids).values())


def _canonical(value: Any) -> Iterator[str | bytes]:
    """Yields the content of a document, without file names and memory addresses."""
    if isinstance(value, Mapping) and set(value) == {"bytes", "path"}:
        yield Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield str(key)
            yield from _canonical(value[key])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}]"
        for item in value:
            yield from _canonical(item)
    elif isinstance(value, Image.Image):
        yield image_key(value)
    else:
        yield value if isinstance(value, bytes) else repr(value)


def prompts_fingerprint(requests: Sequence[Request]) -> str:
    """Fingerprint of the rendered prompts, with the continuations of a multiple choice."""
    return total(
        digest(str(r.doc_id), r.prompt, r.extra if isinstance(r.extra, str) else "")
        for r in requests
    )


def generation_fingerprint(requests: Sequence[Request]) -> str:
    """Fingerprint of the generation arguments, usually the same for all documents of a task."""
    texts = {json.dumps(r.extra, sort_keys=True, default=str) for r in requests}
    return total(digest(text) for text in texts)


def scorer_fingerprint(task: Any) -> str:
    """Fingerprint of the code and settings that turn answers into scores, of an lmms-eval task.

    Covers the code without comments, docstrings and layout, and the functions and constants that it
    uses from the task's own folder and from lmms-eval's task helpers.
    """
    settings = [f"{name}={without_addresses(getattr(task.config, name, None))}" for name in SCORING]
    return _code_fingerprint(_scoring_functions(task), settings)


def scorer_source_fingerprint(task: Any) -> str:
    """As `scorer_fingerprint`, of the code alone: tells a changed grader from a changed setting."""
    return _code_fingerprint(_scoring_functions(task), [])


def _scoring_functions(task: Any) -> list[Any]:
    config = task.config
    functions = [getattr(config, n) for n in ("process_results", "doc_to_target", "doc_to_choice")]
    functions += [*task.aggregation().values(), *getattr(task, "_metric_fn_list", {}).values()]
    return functions


def visuals_fingerprint(doc_to_visual: Any) -> str:
    """Fingerprint of the code that reads a document's images, as for a scorer.

    Args:
        doc_to_visual: A function; or the method of an lmms-eval task, in whose configuration the
            function is looked up.
    """
    config = getattr(getattr(doc_to_visual, "__self__", None), "config", None)
    return _code_fingerprint([getattr(config, "doc_to_visual", None) or doc_to_visual], [])


def _code_fingerprint(functions: Sequence[Any], settings: list[str]) -> str:
    """Fingerprint of functions and what they use nearby; names of columns count as settings."""
    seen: dict[str, str] = {}
    for function in functions:
        if callable(function):
            _collect(function, seen)
        elif function is not None:
            settings.append(str(function))
    code = [f"{name}\n{seen[name]}" for name in sorted(seen)]
    return f"{digest(*settings, *code):0{BITS // 4}x}"


def without_addresses(value: Any) -> str:
    """A value as text, without the address in "<function f at 0x7f..>"."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _collect(thing: Any, seen: dict[str, str]) -> None:
    """Adds the source of a function or class, and of what it uses nearby, by qualified name."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    if inspect.isclass(thing):
        seen[f"{thing.__module__}.{thing.__qualname__}"] = _tables(thing)
    for function in _functions(inspect.unwrap(thing)):
        name = f"{function.__module__}.{function.__qualname__}"
        if name in seen:
            continue
        tree = _parsed(function)
        if tree is None:
            seen[name] = ""  # built in: only its name is known
            continue
        seen[name] = ast.unparse(tree)
        for used_name, used in _used(tree, function):
            if isinstance(used, Constant):
                seen[f"{function.__module__}.{used_name}"] = without_addresses(repr(used))
            elif _is_near(used, function):
                _collect(used, seen)


def _tables(kind: type) -> str:
    """The assignments in the body of a class, from its source file.

    Not from the class object: VQA's answer processor adds every word it meets to its own table.
    """
    file = _file(kind)
    if file is None or not Path(file).is_file():
        return ""
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    written = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == kind.__name__]
    return "\n".join(
        ast.unparse(line)
        for one in written
        for line in one.body
        if isinstance(line, ast.Assign | ast.AnnAssign)
    )


def _functions(thing: Any) -> list[Callable[..., Any]]:
    if inspect.isclass(thing):
        # Python finds no source for a class in a module loaded by path, but for its methods.
        members = [getattr(m, "__func__", m) for m in vars(thing).values()]
        return [m for m in members if inspect.isfunction(m)]
    if inspect.ismethod(thing):
        return [thing.__func__]
    return [thing] if hasattr(thing, "__qualname__") else []


def _parsed(function: Any) -> ast.AST | None:
    """Parses a function without its docstrings; None if it has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) and body:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _used(tree: ast.AST, function: Any) -> Iterator[tuple[str, Any]]:
    """Yields the globals and the attributes of modules that the code uses."""
    known = getattr(function, "__globals__", {})
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in known:
            if not isinstance(known[node.id], ModuleType):
                yield node.id, known[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = known.get(node.value.id)
            if isinstance(module, ModuleType):
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)


def _is_near(used: Any, function: Any) -> bool:
    """Whether code belongs to the task: its folder, or the task helpers of lmms-eval or ours."""
    if not (inspect.isfunction(used) or inspect.isclass(used)):
        return False
    if used.__module__.startswith(("lmms_eval.tasks", "sdrpn_eval.scoring")):
        return True
    files = [_file(one) for one in (used, function)]
    return None not in files and Path(files[0]).parent == Path(files[1]).parent  # type: ignore[arg-type]


def _file(thing: Any) -> str | None:
    functions = _functions(thing)
    return functions[0].__code__.co_filename if functions else None
