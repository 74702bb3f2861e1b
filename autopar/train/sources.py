"""Where settings come from: YAML files, command-line words, references between values and to environment variables.
Must not know which settings there are (fill.py checks them), nor import torch.

A later source wins: files in the order given, then words. Every value remembers where it was set.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autopar.errors import ConfigError, suggest
from autopar.train.fill import located

COMMAND_LINE = "command line"
_REFERENCE = re.compile(r"\$\$|\$\(([^()]*)\)|\$\{([^{}]*)\}")


@dataclass
class Config:
    """A tree of plain values, and where they were set: dotted key -> 'config.yaml:12' or 'command line'."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)


def read_words(words: Sequence[str], defaults: Mapping[str, Any]) -> Config:
    """`-f config.yaml` (any number of files) and `--key value`, `--key` (true), `--key!` (removed), with references resolved.

    defaults: what references to settings that nobody has set find. Raises ConfigError.
    """
    config, rest = Config(), []
    words = list(words)
    while words:
        word = words.pop(0)
        if word in ("-f", "--file"):
            if not words:
                raise ConfigError(f"{word} needs the path of a YAML file")
            _merge_file(config, Path(words.pop(0)))
        else:
            rest.append(word)
    for key, value in _overrides(rest):
        _set(config, key, value)
    return Config(_References(config, defaults).resolve(), config.origins)


# ---- files ----------------------------------------------------------------------------------------------------


def _merge_file(config: Config, path: Path) -> None:
    """A file over what is there: dicts are merged, everything else is replaced. Its folder is searched for modules, as a script's is."""
    try:
        text = path.read_text()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.safe_load(text)
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is no text file: {e}") from e
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        said = ", ".join(str(x) for x in (getattr(e, "context", None), getattr(e, "problem", None)) if x) or str(e)
        raise ConfigError(f"{path}{where}: this is no valid YAML: {said}") from e
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; a configuration is a dict of settings")
    lines = dict(_lines(node, "", path)) if node is not None else {}
    config.tree = _merge(config, config.tree, tree or {}, "", lines)
    for folder in (str(path.resolve().parent), os.getcwd()):
        if folder not in sys.path:
            sys.path.insert(0, folder)


def _lines(node: Any, key: str, path: Path) -> Iterator[tuple[str, str]]:
    """Dotted key -> file:line, of every value. Raises ConfigError for a key that is there twice."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for k, v in node.value:
            line, name = k.start_mark.line + 1, str(k.value)
            if name in seen and name != "<<":
                raise ConfigError(f"{path}:{line}: the key {name!r} is in line {seen[name]} already")
            seen[name] = line
            inner = f"{key}.{name}".lstrip(".")
            yield inner, f"{path}:{line}"
            yield from _lines(v, inner, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, v in enumerate(node.value):
            inner = f"{key}.{i}"
            yield inner, f"{path}:{v.start_mark.line + 1}"
            yield from _lines(v, inner, path)


def _merge(config: Config, old: Any, new: Any, key: str, lines: Mapping[str, str]) -> Any:
    if isinstance(old, dict) and isinstance(new, dict):
        out = dict(old)
        for k, v in new.items():
            inner = f"{key}.{k}".lstrip(".")
            out[k] = _merge(config, old.get(k), v, inner, lines)
            config.origins[inner] = lines.get(inner, lines.get(key, ""))
        return out
    _forget(config, key)
    config.origins.update({k: v for k, v in lines.items() if _below(k, key)})
    return _fresh(new)


def _fresh(x: Any) -> Any:
    """A copy that shares nothing: what YAML's aliases share may be overridden in one place."""
    if isinstance(x, dict):
        return {k: _fresh(v) for k, v in x.items()}
    return [_fresh(v) for v in x] if isinstance(x, list) else x


# ---- words ----------------------------------------------------------------------------------------------------


def _overrides(words: list[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, text, True or _REMOVE) of `--a.b text`, `--a.b=text`, `--a.b` and `--a.b!`."""
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"unexpected word {word!r} on the command line; settings are `--key value`, files `-f config.yaml`")
        key, equals, value = word[2:].partition("=")
        if equals:
            yield key, value
        elif key.endswith("!"):
            yield key[:-1], _REMOVE
        elif i < len(words) and not words[i].startswith("--"):
            yield key, words[i]
            i += 1
        else:
            yield key, True


_REMOVE = object()


def _set(config: Config, key: str, value: Any) -> None:
    """Set or remove one key, in dicts and in lists by index; what is missing on the way is made (a list where the index is 0)."""
    names = key.split(".")
    if not all(names):
        raise ConfigError(f"--{key} (command line) has an empty part; keys are of the form a.b.0.c")
    here: Any = config.tree
    for n, name in enumerate(names):
        at, last = ".".join(names[:n]), n + 1 == len(names)
        if isinstance(here, list):
            if not name.isdigit() or int(name) > len(here) or (int(name) == len(here) and value is _REMOVE):
                raise ConfigError(f"--{key}: {located(at, config.origins)} is a list of {len(here)}; {name!r} is no index of it")
            if int(name) == len(here):
                here.append(None)
            index: Any = int(name)
        elif isinstance(here, dict):
            index = name
        else:
            raise ConfigError(f"--{key}: {located(at, config.origins)} is {here!r:.60}, so it has no {name!r}")
        inside = here[index] if isinstance(here, list) else here.get(index)
        if not last:
            if inside is None and value is _REMOVE:
                raise ConfigError(f"--{key}!: there is no {'.'.join(names[: n + 1])} to remove")
            if inside is None:
                here[index] = inside = [] if names[n + 1] == "0" else {}
                config.origins[".".join(names[: n + 1])] = COMMAND_LINE
            here = inside
            continue
        _forget(config, key)
        if value is _REMOVE:
            if isinstance(here, dict) and index not in here:
                raise ConfigError(f"--{key}!: there is no {key} to remove" + (f"; {suggest(name, here)}" if here else ""))
            del here[index]
            if isinstance(here, list):  # NB: those behind it move
                _forget(config, at)
                config.origins[at] = COMMAND_LINE
        else:
            here[index] = value
            config.origins[key] = COMMAND_LINE


def _below(key: str, of: str) -> bool:
    return not of or key == of or key.startswith(of + ".")


def _forget(config: Config, key: str) -> None:
    for k in [k for k in config.origins if _below(k, key)]:
        del config.origins[k]


# ---- references -----------------------------------------------------------------------------------------------


class _References:
    """$(a.b) is the value of another setting, ${NAME} an environment variable, $$ a dollar sign."""

    def __init__(self, config: Config, defaults: Mapping[str, Any]):
        self.config, self.defaults = config, defaults
        self._open: list[str] = []

    def resolve(self) -> dict[str, Any]:
        return self._value(self.config.tree, "")

    def _value(self, value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {k: self._value(v, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
        if isinstance(value, list):
            return [self._value(v, f"{key}.{i}".lstrip(".")) for i, v in enumerate(value)]
        if not isinstance(value, str) or "$" not in value:
            return value
        if key in self._open:
            around = " -> ".join([*self._open[self._open.index(key) :], key])
            raise ConfigError(f"{located(key, self.config.origins)}: values refer to each other in a circle: {around}")
        self._open.append(key)
        whole = _REFERENCE.fullmatch(value)
        out = self._one(whole, key) if whole else _REFERENCE.sub(lambda m: str(self._one(m, key)), value)
        self._open.pop()
        return out

    def _one(self, match: re.Match[str], key: str) -> Any:
        other, variable = match[1], match[2]
        if other is None and variable is None:
            return "$"
        if variable is not None:
            if variable not in os.environ:
                raise ConfigError(f"{located(key, self.config.origins)}: the environment variable {variable!r} is not set")
            return os.environ[variable]
        return self._find(other.strip(), key)

    def _find(self, other: str, key: str) -> Any:
        here: Any = self.config.tree
        names = other.split(".")
        for n, name in enumerate(names):
            known = here if isinstance(here, Mapping) else dict(enumerate(here)) if isinstance(here, list) else {}
            index: Any = int(name) if isinstance(here, list) and name.isdigit() else name
            if index not in known:
                default = self._default(names)
                if default is not _REMOVE:
                    return default
                at = ".".join(names[:n]) or "the configuration"
                hint = suggest(name, known) if known else "it has no settings"
                raise ConfigError(f"{located(key, self.config.origins)} refers to $({other}), but {at} has no {name!r}: {hint}")
            here = known[index]
        return self._value(here, other)

    def _default(self, names: list[str]) -> Any:
        here: Any = self.defaults
        for name in names:
            if not isinstance(here, Mapping) or name not in here:
                return _REMOVE
            here = here[name]
        return here
