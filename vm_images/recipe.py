"""A recipe: what goes into a guest image, read from a TOML file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9+._-]{0,63}")


@attrs.frozen
class Recipe:
    """Every field is a key of the TOML file of the same name."""

    name: str
    architecture: str  # as in `uname -m`
    release: str  # Debian release, by code name
    python: str  # that release's Python, as in "3.11": the agent's libraries are chosen for it
    packages: tuple[str, ...]
    exclude: tuple[str, ...]  # dpkg path patterns left out
    include: tuple[str, ...]  # patterns kept although `exclude` matches them
    kernel: str  # Debian package of the kernel, or of the meta-package that depends on it
    modules: tuple[str, ...]  # loaded by the initrd in this order; what they need comes by itself
    disk_modules: tuple[str, ...]  # those besides, of a machine that starts from the disk
    cmdline: str
    memory_mb: int
    disk_gb: int

    @property
    def debian_architecture(self) -> str:
        return {"x86_64": "amd64"}[self.architecture]


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by name (`recipes/NAME.toml`) or by the path of a TOML file; ConfigError says what is wrong."""
    path = Path(name_or_path)
    if not name_or_path.endswith(".toml"):
        path = RECIPES / f"{name_or_path}.toml"
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ConfigError(f"there is no image recipe {name_or_path}", f"known recipes: {known}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe ({error})") from None
    return _parse(path, data)


def _parse(path: Path, data: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {}
    for field in attrs.fields(Recipe):
        if field.name not in data:
            raise ConfigError(f"{path}: the key {field.name!r} is missing")
        value = data.pop(field.name)
        kind = str(field.type)  # a string, because of `from __future__ import annotations`
        if kind == "int":
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{path}: {field.name} must be a positive whole number")
        elif kind == "str":
            if not isinstance(value, str) or "\n" in value:
                raise ConfigError(f"{path}: {field.name} must be one line of text")
        else:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise ConfigError(f"{path}: {field.name} must be a list of strings")
            value = tuple(value)
        values[field.name] = value
    if data:
        raise ConfigError(f"{path}: unknown key {sorted(data)[0]!r}")
    recipe = Recipe(**values)
    for text in (recipe.name, recipe.release, recipe.kernel, *recipe.packages):
        if not _PLAIN_NAME.fullmatch(text):
            raise ConfigError(f"{path}: {text!r} is not a plain name")
    for module in (*recipe.modules, *recipe.disk_modules):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", module):
            raise ConfigError(f"{path}: {module!r} is not a module's name")
    if not re.fullmatch(r"3\.\d{1,2}", recipe.python):
        raise ConfigError(f"{path}: python must be like 3.11, not {recipe.python!r}")
    if recipe.architecture != "x86_64":
        raise ConfigError(f"{path}: images for {recipe.architecture} cannot be built yet, only x86_64")
    return recipe
