"""A recipe: what goes into a guest image, read from a TOML file."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import attrs

from common.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
OURS, DISTRIBUTION = "vmwrapper", "distribution"
_MOST_PARENTS = 8
_ADDED = ("packages", "exclude", "include", "modules", "disk_modules", "files")  # to what the parent has
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
    disk_kernel: str  # the same for a machine that starts from the disk, whose hardware may be of any kind
    modules: tuple[str, ...]  # loaded by the initrd in this order; what they need comes by itself
    disk_modules: tuple[str, ...]  # those besides, of a machine that starts from the disk
    cmdline: str
    memory_mb: int
    disk_gb: int
    files: tuple[str, ...] = ()  # "SOURCE:/place/in/the/guest", a file or a directory; relative to the recipe
    init: str = OURS  # "vmwrapper", ours, or "distribution": the one that the packages bring
    agent: bool = True  # whether the guest agent is in it; with the distribution's init, as a service

    @property
    def debian_architecture(self) -> str:
        return {"x86_64": "amd64"}[self.architecture]


def load_recipe(name_or_path: str) -> Recipe:
    """A recipe by name (`recipes/NAME.toml`) or by the path of a TOML file; ConfigError says what is wrong."""
    path = Path(name_or_path)
    if not name_or_path.endswith(".toml"):
        path = RECIPES / f"{name_or_path}.toml"
    return _parse(path, _read(path, name_or_path, ()))


def _read(path: Path, name: str, children: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a recipe, with those of the one that it extends."""
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise ConfigError(f"there is no image recipe {name}", f"known recipes: {known}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a recipe ({error})") from None
    if isinstance(files := data.get("files"), list) and all(isinstance(each, str) for each in files):
        data["files"] = [str(path.absolute().parent / each) for each in files]
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str) or path in children or len(children) >= _MOST_PARENTS:
        raise ConfigError(f"{path}: extends must name one other recipe, and not in a circle")
    at = path.parent / parent if parent.endswith(".toml") else RECIPES / f"{parent}.toml"
    base = _read(at, parent, (*children, path))
    for key in _ADDED:
        if isinstance(data.get(key), list) and isinstance(base.get(key), list):
            data[key] = list(dict.fromkeys([*base[key], *data[key]]))
    return {**base, **data}


def extended(recipe: Recipe, packages: list[str], files: list[str]) -> Recipe:
    """A recipe with more packages and files, as `--add-package` and `--copy` ask for."""
    copies = [str(Path.cwd() / each) for each in files]
    bigger = attrs.evolve(
        recipe,
        packages=tuple(dict.fromkeys([*recipe.packages, *packages])),
        files=(*recipe.files, *copies),
    )
    return _checked(bigger, "the command line")


def _parse(path: Path, data: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {}
    for field in attrs.fields(Recipe):
        if field.name not in data:
            if field.default is not attrs.NOTHING:
                continue
            raise ConfigError(f"{path}: the key {field.name!r} is missing")
        value = data.pop(field.name)
        kind = str(field.type)  # a string, because of `from __future__ import annotations`
        if kind == "int":
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{path}: {field.name} must be a positive whole number")
        elif kind == "bool":
            if not isinstance(value, bool):
                raise ConfigError(f"{path}: {field.name} must be true or false")
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
    return _checked(Recipe(**values), str(path))


def _checked(recipe: Recipe, path: str) -> Recipe:
    for text in (recipe.name, recipe.release, recipe.kernel, recipe.disk_kernel, *recipe.packages):
        if not _PLAIN_NAME.fullmatch(text):
            raise ConfigError(f"{path}: {text!r} is not a plain name")
    for module in (*recipe.modules, *recipe.disk_modules):
        if not re.fullmatch(r"[A-Za-z0-9_-]+", module):
            raise ConfigError(f"{path}: {module!r} is not a module's name")
    if not re.fullmatch(r"3\.\d{1,2}", recipe.python):
        raise ConfigError(f"{path}: python must be like 3.11, not {recipe.python!r}")
    if recipe.architecture != "x86_64":
        raise ConfigError(f"{path}: images for {recipe.architecture} cannot be built yet, only x86_64")
    if recipe.init not in (OURS, DISTRIBUTION):
        raise ConfigError(f"{path}: init must be {OURS!r} or {DISTRIBUTION!r}, not {recipe.init!r}")
    for each in recipe.files:
        source, colon, target = each.rpartition(":")
        if not colon or not source or not target.startswith("/") or ".." in Path(target).parts:
            raise ConfigError(f"{path}: {each!r} is not like FILE:/place/in/the/guest")
    return recipe
