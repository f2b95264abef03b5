"""From the command line and recipe files to the option dataclasses, with jsonargparse.

Later beats earlier: the model's preset, the recipe files in their order, the single options.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

from stat_video.errors import UserError
from stat_video.model.config import PRESETS, STATConfig

RECIPE_GROUPS = {"preset", "data", "model", "optim", "run"}
# Options of former versions, with the value that asks for what is done now in any case.
RETIRED = {"data": {"decoder": "pyav"}}


def read_options(
    command: str,
    description: str,
    groups: dict[str, type],
    argv: list[str],
    *,
    add: Callable[[Any], None] | None = None,
    defaults: dict[str, Any] | None = None,
    skip: dict[str, set[str]] | None = None,
) -> Any:
    """Parse `argv` for `stat-video COMMAND` and build the dataclasses.

    groups: a dataclass for each group of options, for example {"data": DataOptions}; its fields
        become --data.root and so on. "model" brings --preset, "model" and "data" bring --config,
        which takes a whole recipe and leaves aside the groups that the command has no use for.
    add: adds the command's own arguments to the parser.
    defaults: values by dotted name that beat the dataclasses' own.
    skip: fields, by group, that are no options of this command.
    Returns a namespace with an attribute for each group and argument. --help exits with 0.
    Raises UserError with one sentence for whatever is wrong.
    """
    from jsonargparse import ArgumentError

    parser = _make_parser(command, description, groups, skip or {})
    if add is not None:
        add(parser)
    argv = _resolve_recipes(argv)
    preset = _find_preset(argv) if "model" in groups else None
    try:
        if preset is not None:
            values = asdict(STATConfig.preset(preset)).items()
            parser.set_defaults({f"model.{name}": value for name, value in values})
        if defaults:
            parser.set_defaults(defaults)
        return parser.instantiate(parser.parse_args(_without_others(argv, groups)))
    except ArgumentError as error:
        raise UserError(_one_sentence(str(error))) from error
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error


def _make_parser(
    command: str, description: str, groups: dict[str, type], skip: dict[str, set[str]]
):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog=f"stat-video {command}", description=description, exit_on_error=False
    )
    if "model" in groups or "data" in groups:
        known = ", ".join(recipe_names())
        parser.add_argument(
            "--config",
            action="config",
            help=f"recipe: a YAML file, or the name of one that comes along: {known}",
        )
    if "model" in groups:
        known = ", ".join(PRESETS)
        parser.add_argument(
            "--preset", type=str | None, default=None, help=f"model to start from: {known}"
        )
    for name, options in groups.items():
        parser.add_class_arguments(options, name, skip=skip.get(name))
    return parser


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = files("stat_video") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the bare name of one that comes along. Raises UserError."""
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return Path(str(files("stat_video") / "recipes" / f"{name}.yaml"))
    raise UserError(
        f"{name} is neither a file nor a recipe that comes along ({', '.join(recipe_names())})"
    )


def last_value(argv: list[str], option: str) -> str | None:
    """What `option` is set to on a command line that is not parsed yet."""
    return (_values(argv, option) or [None])[-1]


def _resolve_recipes(argv: list[str]) -> list[str]:
    """Put paths in the place of recipes' bare names."""
    resolved, is_recipe = [], False
    for word in argv:
        if is_recipe:
            word, is_recipe = str(recipe_path(word)), False
        elif word == "--config":
            is_recipe = True
        elif word.startswith("--config="):
            word = f"--config={recipe_path(word.removeprefix('--config='))}"
        resolved.append(word)
    return resolved


def _without_others(argv: list[str], groups: dict[str, type]) -> list[str]:
    """Put the content of a recipe in its place where it holds more than the command takes: other
    commands' groups, and retired options."""
    others = RECIPE_GROUPS - {*groups, "preset" if "model" in groups else ""}
    for path in _values(argv, "--config"):
        content = _read_yaml(Path(path))
        wanted = {name: content[name] for name in content.keys() - others}
        for group, retired in RETIRED.items():
            if isinstance(wanted.get(group), dict):
                wanted[group] = {k: v for k, v in wanted[group].items() if retired.get(k) != v}
        if wanted != content:
            kept = json.dumps(wanted)
            argv = [w.replace(path, kept) if w in (path, f"--config={path}") else w for w in argv]
    return argv


def _find_preset(argv: list[str]) -> str | None:
    """The preset that the command line or else the last recipe names."""
    named = last_value(argv, "--preset")
    if named is None:
        for path in _values(argv, "--config"):
            named = _read_yaml(Path(path)).get("preset", named)
    return named


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the groups data, model, optim and run")
    return content


def _values(argv: list[str], option: str) -> list[str]:
    """All that `option` is set to, in order, whether after a space or an equals sign."""
    values = []
    for word, after in pairwise([*argv, ""]):
        if word == option:
            values.append(after)
        elif word.startswith(option + "="):
            values.append(word.partition("=")[2])
    return values


def _one_sentence(text: str) -> str:
    """jsonargparse explains over several lines; the first ones name the option and the fault."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    sentence = " ".join(lines[:3])
    pattern = r'Parser key "(?P<key>.+?)": Expected an? (?P<type>.+?)\. Got value: '
    wrong_type = re.match(pattern, sentence)
    if wrong_type is None:
        return sentence
    wanted = re.sub(r"typing\.|<class '(\w+)'>", r"\1", wrong_type["type"])
    return f"--{wrong_type['key']} must be of type {wanted}, got {sentence[wrong_type.end() :]}"
