"""Reads mesh.yaml, and says what is wrong with it: file, line, key, nearest valid key, what to do."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config.contradictions import contradictions
from cluster.config.mesh import MeshConfig
from experts.errors import ConfigError

Location = Sequence[int | str]
_SHORT = reprlib.Repr()
_SHORT.maxstring, _SHORT.maxlevel = 100, 2


def load_mesh(path: Path) -> MeshConfig:
    """Read and validate a mesh.yaml; a relative `model.source` is made absolute where it exists.

    It is looked for beside the working directory first, then beside the file.
    Raises ConfigError naming the file, the line and the key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a mesh.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_where(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply; mesh.yaml has sections with keys, no more") from None
    if repeated := _repeated_key(root, set()):
        line = repeated.start_mark.line + 1
        raise ConfigError(f"{path}:{line}: `{repeated.value}` is given twice; keep one of them")
    config = parse_mesh(document, origin=str(path), root=root)
    for base in (Path.cwd(), path.parent):
        source = (base / config.model.source).resolve()
        if source.is_dir():
            model = config.model.model_copy(update={"source": str(source)})
            return config.model_copy(update={"model": model})
    return config


def parse_mesh(document: Any, *, origin: str, root: yaml.Node | None = None) -> MeshConfig:
    """Validate a mesh.yaml that is already a mapping (a Serve config's `args`, say).

    origin: what to call it in messages. root: its YAML node, for line numbers.
    Raises ConfigError with one line per mistake.
    """
    if not isinstance(document, Mapping):
        raise ConfigError(f"{origin}: expected a mapping with at least `model: {{source: ...}}`")
    try:
        config = MeshConfig.model_validate(document)
    except ValidationError as error:
        problems = [
            f"{origin}{_line(root, item['loc'])}: {_describe(item['type'], item['loc'], item['msg'], item['input'])}"
            for item in error.errors()
        ]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None
    if found := contradictions(config):
        problems = [f"{origin}{_line(root, key)}: `{'.'.join(key)}`: {problem}" for key, problem in found]
        raise ConfigError("\n".join(problems))
    return config


def _describe(kind: str, location: Location, message: str, given: Any) -> str:
    key = ".".join(str(part) for part in location if not _is_union_arm(part))
    if kind == "extra_forbidden":
        valid = _keys_of(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else f"valid keys here: {', '.join(valid)}"
        return f"unknown key `{key}`; {hint}"
    if kind == "missing":
        return f"`{key}` is missing; it has no default"
    if kind == "model_type":
        return f"`{key}` is a section: give keys below it, or leave it out (given: {_SHORT.repr(given)})"
    return f"`{key}`: {message[0].lower()}{message[1:]} (given: {_SHORT.repr(given)})"


def _where(error: yaml.YAMLError) -> str:
    """The line of what is no YAML, and what is wrong there."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f": not valid YAML: {' '.join(str(error).split())}"
    words = ", ".join(filter(None, (error.context, error.problem)))
    return f":{error.problem_mark.line + 1}: not valid YAML: {words}"


def _repeated_key(node: yaml.Node | None, seen: set[int]) -> yaml.ScalarNode | None:
    """The first key that stands a second time in one mapping: YAML's readers would take the last, silently."""
    if node is None or id(node) in seen:
        return None
    seen.add(id(node))
    below = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    return key
                keys.add(key.value)
            below = [*below, value]
    return next((found for each in below if (found := _repeated_key(each, seen))), None)


def _is_union_arm(part: int | str) -> bool:
    """Pydantic names the arm of a union in the location, such as `constrained-int` or `literal['auto']`."""
    return isinstance(part, str) and ("[" in part or part in ("int", "float", "constrained-int", "constrained-float"))


def _keys_of(location: Location) -> list[str]:
    model: type[BaseModel] = MeshConfig
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        arms = [arm for arm in (annotation, *get_args(annotation)) if isinstance(arm, type)]
        model = next(arm for arm in arms if issubclass(arm, BaseModel))
    return list(model.model_fields)


def _line(root: yaml.Node | None, location: Location) -> str:
    """`:12`, the line of the deepest key of `location` that the text has; empty without text."""
    if root is None:
        return ""
    node, line = root, root.start_mark.line
    for part in location:
        if not isinstance(node, yaml.MappingNode):
            break
        entry = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        if entry is None:
            break
        line, node = entry[0].start_mark.line, entry[1]
    return f":{line + 1}"
