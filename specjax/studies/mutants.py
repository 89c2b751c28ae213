"""Mutants of files: changes of bytes, and of what JSON, tensor headers, archives and templates say."""

import copy
import io
import json
import zipfile
import zlib
from typing import Any

import numpy as np

_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 10**12, 1e308, -0.5, float("nan"), float("inf"), "", "x",
    "../../etc/passwd", "/dev/zero", "\ud800", "é" * 300, [], {}, [None], [[1]], {"a": {}}, "1", [1, "a"],
)  # fmt: skip
_NUMBERS = (0, 1, 2, 127, 128, 255, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1)
_SNIPPETS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'x' * 9999999999 }}",
    "{{ 1/0 }}", "{% include 'x' %}", "{{ messages.x.y }}", "{% set x = 3 %}", "{{ raise_exception(3) }}", "{{",
    "{% endfor %}", "{% if %}", "{{ messages[0].content * 1000000 }}", "{% generation %}", "{{ none.x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
)  # fmt: skip


def mutant(content: bytes, name: str, rng: np.random.Generator) -> bytes:
    """`content` with one to four changes: of its bytes, or, where it is JSON or a template, of what they mean."""
    for _ in range(int(rng.integers(1, 5))):
        if b"[[[[[[" in content:  # nested as deep as a parser goes: no further
            content = _byte_mutant(content, rng)
        elif name.endswith((".json", ".jsonl")) and rng.random() < 0.8:
            content = _json_mutant(content, rng)
        elif name.endswith(".jinja") and rng.random() < 0.5:
            at = int(rng.integers(0, len(content) + 1))
            content = content[:at] + _SNIPPETS[rng.integers(len(_SNIPPETS))].encode() + content[at:]
        elif name.endswith(".safetensors") and rng.random() < 0.5:
            content = _header_mutant(content, rng)
        elif name.endswith((".npz", ".pt")) and rng.random() < 0.6:
            content = _zip_mutant(content, rng)
        else:
            content = _byte_mutant(content, rng)
    return content


def _byte_mutant(content: bytes, rng: np.random.Generator) -> bytes:
    data, kind = bytearray(content), int(rng.integers(7))
    # The beginning says what the rest is: half of the changes fall there.
    reach = max(1, len(data) if rng.random() < 0.5 else min(len(data), 400))
    a, b = sorted(int(x) for x in rng.integers(0, reach, 2))
    if kind == 0 and data:
        data[a % len(data)] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        number = _NUMBERS[rng.integers(len(_NUMBERS))]
        width = int(rng.choice([1, 2, 4, 8]))
        data[a : a + width] = (number % 256**width).to_bytes(width, "little")
    elif kind == 2:
        del data[a:]
    elif kind == 3:
        del data[a:b]
    elif kind == 4:
        data[a:a] = data[a:b]
    elif kind == 5:
        data[a:b] = rng.integers(0, 256, b - a, dtype=np.uint8).tobytes()
    else:
        data += rng.integers(0, 256, int(rng.integers(1, 64)), dtype=np.uint8).tobytes()
    return bytes(data)


def _json_mutant(content: bytes, rng: np.random.Generator) -> bytes:
    lines = content.split(b"\n") if b"\n{" in content and content.startswith(b'{"') else [content]
    number = int(rng.integers(len(lines)))
    try:
        record = json.loads(lines[number])
    except (ValueError, RecursionError):
        return _byte_mutant(content, rng)
    lines[number] = json.dumps(changed(record, rng)).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)


def changed(record: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one of its nodes replaced, removed, renamed or put in twice."""
    record = copy.deepcopy(record)
    places = [(box, key) for box in _boxes(record) for key in (box if isinstance(box, dict) else range(len(box)))]
    value = copy.deepcopy(_VALUES[rng.integers(len(_VALUES))])
    if rng.random() < 0.02:
        value = json.loads("[" * 900 + "]" * 900)
    if not places:
        return value
    box, key = places[rng.integers(len(places))]
    kind = int(rng.integers(4))
    if kind == 0 and isinstance(box, dict):
        box[str(value)[:20]] = box.pop(key)
    elif kind == 1:
        del box[key]
    elif kind == 2 and isinstance(box[key], int | float) and not isinstance(box[key], bool):
        box[key] = box[key] * int(rng.choice([-1, 0, 2, 10**6]))
    else:
        box[key] = value
    return record


def _boxes(record: Any) -> list[Any]:
    if not isinstance(record, dict | list) or not record:
        return []
    inner = record.values() if isinstance(record, dict) else record
    return [record, *(box for value in inner for box in _boxes(value))]


def _header_mutant(content: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file whose header says something else, its length told rightly."""
    size = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + size])
    except (ValueError, RecursionError):
        return _byte_mutant(content, rng)
    made = json.dumps(changed(header, rng)).encode("utf-8", "surrogatepass")
    return len(made).to_bytes(8, "little") + made + content[8 + size :]


def _zip_mutant(content: bytes, rng: np.random.Generator) -> bytes:
    """An archive with one entry mutated, its checksum right again."""
    made = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(made, "w") as other:
            names = archive.namelist()
            chosen = names[rng.integers(len(names))] if names else ""
            for name in names:
                data = archive.read(name)
                if name == chosen:
                    if rng.random() < 0.1:
                        continue
                    data = _byte_mutant(data, rng)
                other.writestr(name, data)
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, NotImplementedError, RuntimeError):
        return _byte_mutant(content, rng)
    return made.getvalue()
