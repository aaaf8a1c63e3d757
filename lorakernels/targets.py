"""Which modules an adapter goes to: PEFT's matching rules over module names. A leaf."""

import re
from typing import NamedTuple


def check_pattern(name, pattern):
    """A regular expression, or ValueError naming the argument."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression: {error}") from None


def check_names(argument, value, none_allowed=True):
    """A str (a regular expression) or a collection of str; TypeError or ValueError naming the argument."""
    if value is None and none_allowed:
        return None
    if isinstance(value, str):
        check_pattern(argument, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{argument}: expected a regular expression or a list of module names, got {value!r}")
    if not value:
        raise ValueError(f"{argument}: expected at least one module name, got an empty list")
    return list(value)


def matches(names, key):
    """A str matches the whole name; a list's entries match the name or its end at a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


def layer_index(key, layers_pattern):
    """The first numbered segment of a module's name ("...layers.3.attn.q" -> 3), or None."""
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    found = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", key) for p in patterns] if patterns else [re.match(r".*?\.[^.]*\.(\d+)\.", key)]
    return next((int(match[1]) for match in found if match), None)


def by_pattern(patterns, key, default):
    """The value of the first entry of rank_pattern / alpha_pattern that matches the name's end, else the default."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", key)), default)


class Targets(NamedTuple):
    """target_modules (list or regex), exclude_modules, layers_to_transform (indices), layers_pattern."""

    modules: object
    exclude: object = None
    layers: object = None
    layers_pattern: object = None

    def __contains__(self, key):
        if self.exclude and matches(self.exclude, key):
            return False
        if not matches(self.modules, key):
            return False
        if self.layers is None or isinstance(self.modules, str):  # PEFT reads indices only beside a list
            return True
        wanted = [self.layers] if isinstance(self.layers, int) else self.layers
        return layer_index(key, self.layers_pattern) in wanted


def describe_exactly(chosen, candidates):
    """target_modules that select `chosen` and no other of `candidates`: a list of last names, as PEFT users write, where
    that is exact, else one regular expression."""
    last = sorted({name.rpartition(".")[2] for name in chosen})
    if {name for name in candidates if matches(last, name)} == set(chosen):
        return last
    return "|".join(re.escape(name) for name in sorted(chosen))
