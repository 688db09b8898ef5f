"""The recipes that come with this project: YAML files of flags, commented; `finetune recipes` lists and copies them."""

from difflib import get_close_matches
from pathlib import Path

from finetune.utils.errors import ConfigError
from finetune.utils.proc import shipped_folder

RECIPE_ENDINGS = (".yaml", ".yml", ".json")


def shipped_recipes() -> dict[str, Path]:
    """Return the files of the shipped recipes by name."""
    return {path.stem: path for path in sorted(shipped_folder("recipes").glob("*.yaml"))}


def recipe_path(word: str) -> str | None:
    """Return the path of a recipe: a file as given, a shipped one by its name; None for a word that is neither."""
    shipped = shipped_recipes().get(word.removesuffix(".yaml"))
    if shipped is not None and not Path(word).is_file():
        return str(shipped)
    return word if word.endswith(RECIPE_ENDINGS) else None


def with_shipped_data(recipe: Path, names: list[str]) -> list[str]:
    """Return the data that a recipe names; where it is shipped, so is the file that the working directory lacks."""
    if recipe.parent != shipped_folder("recipes"):
        return names
    folder = shipped_folder("data").parent
    return [str(folder / name) if (folder / name).is_file() and not Path(name).exists() else name for name in names]


def find_recipe(name: str) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        ConfigError: There is none of that name.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        close = get_close_matches(name, recipes, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(f"{name}: there is no such recipe; {hint}`finetune recipes` lists them")
    return recipes[name]
