"""Rows that `python -m lorakernels tune` measured on this card, in the place of the tables' own. A file in the user's cache, read once."""

import functools
import json
import os
import warnings
from pathlib import Path

import torch

TYPES = {}  # {table: what makes one of its rows of a file's values}
rows = {}  # {(table, sizes): Tile or bool}; tune.py puts candidates here
_loaded = False


def place(device_name):
    """Where a card's rows are kept: LORAKERNELS_TUNED (a file, or "off": none), else the user's cache."""
    asked = os.environ.get("LORAKERNELS_TUNED")
    if asked:
        return None if asked == "off" else Path(asked)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lorakernels" / f"tiles-{device_name.lower().replace(' ', '-')}.json"


def versions():
    """What a measurement holds for."""
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def key(table, arguments):
    """Sizes of the same power of two share a row."""
    return table, *(1 << max(0, a - 1).bit_length() if type(a) is int else a if isinstance(a, bool) else str(a) for a in arguments)


def load(path):
    """Take a file's rows. One for other versions, or a damaged one, is left with a warning."""
    try:
        data = json.loads(Path(path).read_text())
        if data["versions"] != versions():
            return warnings.warn(f"{path} was measured with {data['versions']}, this is {versions()}: run `python -m lorakernels tune` again", stacklevel=2)
        found = {tuple(sizes): TYPES[sizes[0]](*values) for sizes, values in data["rows"]}
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        return warnings.warn(f"{path} is no table of measured tiles: {type(error).__name__}: {error}", stacklevel=2)
    rows.update(found)


def table(kind):
    """A table's function with this card's own rows before it. The function stays a pure one: `row.plain`."""

    def decorate(function):
        @functools.wraps(function)
        def row(*arguments):
            if not _loaded:
                _load_once()
            found = rows.get(key(function.__name__, arguments)) if rows else None
            return function(*arguments) if found is None else found

        row.plain = function
        TYPES[function.__name__] = kind
        return row

    return decorate


def _load_once():
    global _loaded
    _loaded = True
    if torch.cuda.is_available():
        path = place(torch.cuda.get_device_name())
        if path is not None and path.exists():
            load(path)
