"""A configuration from a file and overrides; what is wrong with it is said line by line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.resources import Resources
from pipeline.config.run import Config
from pipeline.errors import ConfigError


def load_config(
    path: str | Path, overrides: list[str] | None = None, resources: dict[str, str] | None = None
) -> Config:
    """Read a YAML file, apply `a.b=value` overrides (values are YAML), validate. `resources` holds values for that
    section where neither sets them. Raises ConfigError with one line for each thing that is wrong."""
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"The configuration {path} cannot be read: there is no such file, seen from {Path.cwd()}. Give its path, "
            "or change into the checkout, whose folder configs/ has some."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"The configuration {path} is not a mapping of sections such as name, model, data.")
    return load_fields(fields, overrides, resources, str(path))


def load_fields(
    fields: dict[str, Any], overrides: list[str] | None, resources: dict[str, str] | None, origin: str
) -> Config:
    """Read a configuration as `load_config` does, from the fields of a file; `origin` says in errors where they come
    from."""
    for override in overrides or []:
        _apply(fields, override)
    if isinstance(fields.setdefault("resources", {}), dict):
        fields["resources"] = {**(resources or {}), **fields["resources"]}
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise ConfigError("\n".join([f"The configuration {origin} is not valid.", *explain(error)])) from error


def load_resources(**values: str | None) -> Resources:
    """Return resources of what a command's options say. Raises ConfigError with one line for each that is wrong."""
    try:
        return Resources.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(["Where this command finds things is not valid.", *explain(error)])) from error


def _apply(fields: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r} is not of the form section.key=value, such as distill.steps=200")
    *sections, key = path.split(".")
    section: Any = fields
    for name in sections:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override!r}: {name} is a value, not a section")
    try:
        section[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error


def explain(error: ValidationError) -> list[str]:
    """Return a line for each thing that is wrong."""
    lines = []
    for problem in error.errors():
        parts = map(str, problem["loc"])
        path = ".".join(part for part in parts if not part.startswith("<"))  # which is a kind of value, and no key
        if problem["type"] == "extra_forbidden":
            valid = ", ".join(_valid_keys(problem["loc"][:-1]))
            lines.append(f"  {path}: unknown key. Valid keys: {valid}")
        elif problem["type"] == "value_error":
            lines.append(f"  {path + ': ' if path else ''}{problem['ctx']['error']}")
        else:
            given = "" if problem["type"] == "missing" else f" (given: {problem['input']!r})"
            lines.append(f"  {path}: {problem['msg']}{given}")
    return lines


def _valid_keys(loc: tuple[int | str, ...]) -> list[str]:
    section: type[BaseModel] = Config
    for part in loc:
        for name, field in section.model_fields.items():
            if part in (name, field.alias):
                section = next(_sections(field.annotation), section)
    return sorted(field.alias or name for name, field in section.model_fields.items())


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the sections among what an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)
