"""From the command line and recipe files to the option dataclasses, with jsonargparse.

Later values override earlier ones: the model's preset, the recipe files in order, single options.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

from stat_video.errors import UserError
from stat_video.files import read_yaml
from stat_video.model.config import PRESETS, STATConfig
from stat_video.model.image_config import ImageModelConfig

RECIPE_GROUPS = ("base", "preset", "data", "model", "optim", "run", "clips", "ablate")
# Options of former versions, with the value that asks for what is done now in any case.
RETIRED = {"data": {"decoder": "pyav"}}


def read_options(
    command: str,
    description: str | None,
    groups: Mapping[str, type],
    argv: Sequence[str],
    *,
    arguments: Mapping[str, dict[str, Any]] | None = None,
    base: dict[str, Any] | None = None,
    skip: dict[str, set[str]] | None = None,
) -> Any:
    """Parse `argv` for `stat-video COMMAND` and build the dataclasses.

    groups: a dataclass for each group of options, for example {"data": DataOptions}; its fields
        become --data.root and so on. "model" brings --preset, "model" and "data" bring --config,
        which accepts a whole recipe and ignores the groups that the command does not use.
    arguments: the command's own, by name, as `add_argument` takes them.
    base: values by group, as in a recipe, overridden by the recipes on the command line.
    skip: fields, by group, that are not options of this command.
    Returns a namespace with an attribute for each group and argument. --help exits with 0.
    Raises UserError with one sentence for any error.
    """
    parser = _make_parser(command, description, groups, skip or {})
    for name, details in (arguments or {}).items():
        parser.add_argument(name, **details)
    try:
        if {"data", "model"} & groups.keys():
            argv = _with_recipes(argv, groups, base or {})
        return parser.instantiate(parser.parse_args(argv))
    except argparse.ArgumentError as error:
        raise UserError(_one_sentence(str(error), groups, arguments or {})) from error
    except (ValueError, TypeError, OSError) as error:
        raise UserError(str(error)) from error


def model_options(argv: Sequence[str]) -> type:
    """The options of the group "model": an image model's where `argv` or its recipes name one."""
    found, _ = _take(argv, "--config", "--model.image_model")
    recipes = [recipe for _, recipe in _read_recipes(found.get("--config", []))]
    named = any("image_model" in recipe.get("model", {}) for recipe in recipes)
    return ImageModelConfig if named or "--model.image_model" in found else STATConfig


def _make_parser(
    command: str, description: str | None, groups: Mapping[str, type], skip: dict[str, set[str]]
):
    import yaml
    from jsonargparse import ArgumentParser, get_loader, set_loader

    plain = get_loader("yaml")

    def load(text: str) -> Any:
        """As YAML, but "3,3" is [3, 3]."""
        value = plain(text)
        return plain(f"[{value}]") if isinstance(value, str) and "," in value else value

    set_loader("options", load, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog=f"stat-video {command}",
        description=description,
        parser_mode="options",
        exit_on_error=False,
        allow_abbrev=False,
    )
    if {"data", "model"} & groups.keys():
        known = ", ".join(recipe_names())
        parser.add_argument(
            "--config",
            action="config",
            help=f"recipe: a YAML file, or the name of a bundled one: {known}",
        )
    if groups.get("model") is STATConfig:
        known = ", ".join(PRESETS)
        parser.add_argument(
            "--preset", type=str | None, default=None, help=f"model to start from: {known}"
        )
    for name, options in groups.items():
        parser.add_class_arguments(options, name or None, skip=skip.get(name))
    return parser


def recipe_names() -> list[str]:
    """Names of the bundled recipes."""
    folder = files("stat_video") / "recipes"
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name[-5:] == ".yaml")


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of a bundled one. Raises UserError."""
    if Path(name).is_file():
        return Path(name)
    if name in recipe_names():
        return Path(str(files("stat_video") / "recipes" / f"{name}.yaml"))
    raise UserError(f"{name} is neither a file nor a bundled recipe ({', '.join(recipe_names())})")


def last_value(argv: Sequence[str], option: str) -> str | None:
    """The value of `option` on a command line that is not parsed yet."""
    return _take(argv, option)[0].get(option, [None])[-1]


def _take(argv: Sequence[str], *options: str) -> tuple[dict[str, list[str]], list[str]]:
    """The values of some options in order, by option, and the rest of the command line."""
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, exit_on_error=False, argument_default=argparse.SUPPRESS
    )
    for option in options:
        parser.add_argument(option, dest=option, action="append")
    found, rest = parser.parse_known_args(argv)
    return vars(found), rest


def _with_recipes(
    argv: Sequence[str], groups: Mapping[str, type], base: dict[str, Any]
) -> list[str]:
    """The command line with the preset and the content of the recipes first, as JSON."""
    known = {*groups, *(["preset"] if groups.get("model") is STATConfig else [])}
    found, rest = _take(argv, "--config", *(known & {"preset"} and ["--preset"]))
    layers = [base]
    for path, recipe in _read_recipes(found.get("--config", [])):
        for group in recipe.keys() & groups.keys():
            for unknown in recipe[group].keys() - {field.name for field in fields(groups[group])}:
                raise UserError(f"{path}: there is no option {group}.{unknown}")
        layers.append(recipe)
    layers += [{"preset": name} for name in found.get("--preset", [])]
    named = [layer["preset"] for layer in layers if "preset" in layer]
    if named and "preset" in known:
        layers.insert(0, {"model": asdict(STATConfig.preset(named[-1]))})
    kept = [{group: layer[group] for group in layer if group in known} for layer in layers]
    contents = [json.dumps(layer, default=str) for layer in kept]
    return [*(word for content in contents for word in ("--config", content)), *rest]


def _read_recipes(names: Sequence[str]) -> list[tuple[Path, dict[str, Any]]]:
    """Files and contents of these recipes, each after the one that its `base` names."""
    recipes: list[tuple[Path, dict[str, Any]]] = []
    for each in names:
        name: str | None = each
        place = len(recipes)
        while name is not None:
            path = recipe_path(name)
            if path in (earlier for earlier, _ in recipes[place:]):
                raise UserError(f"{path} is its own base")
            recipe = _read_recipe(path)
            name = recipe.pop("base", None)
            recipes.insert(place, (path, recipe))
    return recipes


def _read_recipe(path: Path) -> dict[str, Any]:
    recipe = {group: values for group, values in read_yaml(path).items() if values is not None}
    for group, values in recipe.items():
        if group not in RECIPE_GROUPS:
            raise UserError(f"{path}: {group!r} is not one of {', '.join(RECIPE_GROUPS)}")
        wanted: Any = str if group in ("base", "preset") else dict
        kind = "a name" if wanted is str else "a mapping of options"
        if not isinstance(values, wanted):
            raise UserError(f"{path}: {group} must be {kind}, got {values!r}")
        for option, value in RETIRED.get(group, {}).items():
            if values.get(option) == value:
                del values[option]
    return recipe


def _one_sentence(
    text: str, groups: Mapping[str, type], arguments: Mapping[str, dict[str, Any]]
) -> str:
    """jsonargparse explains over several lines; the first ones name the option and the fault."""
    lines = [line.strip(" -") for line in text.splitlines() if line.strip()]
    sentence = " ".join(lines[:3])
    pattern = r'Parser key "(?P<key>.+?)": Expected an? (?P<type>.+?)\. Got value: '
    wrong_type = re.match(pattern, sentence)
    if wrong_type is None:
        return sentence
    group, _, name = wrong_type["key"].rpartition(".")
    known = {f.name: (f.type, f.default) for f in fields(groups[group])} if group in groups else {}
    known |= {n.lstrip("-"): (d.get("type"), d.get("default")) for n, d in arguments.items()}
    kind, default = known.get(name, (None, None))
    wanted = re.sub(r"typing\.|<class '(\w+)'>", r"\1", str(kind or wrong_type["type"]))
    if isinstance(default, tuple):
        wanted += f" (as {json.dumps(default)})"
    return f"--{wrong_type['key']} must be of type {wanted}, got {sentence[wrong_type.end() :]}"
