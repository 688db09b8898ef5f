"""The recipes that come with this project: YAML files of flags, commented; `finetune recipes` lists and copies them."""

from pathlib import Path
from typing import Any

from finetune.utils.errors import ConfigError, did_you_mean, first_line, raise_faults
from finetune.utils.proc import shipped_folder
from finetune.utils.user_files import read_json, read_text, unique_keys

RECIPE_ENDINGS = (".yaml", ".yml", ".json")
RECIPE_LINE = "write a key, an ASCII colon, a space and its value on each line, such as `learning_rate: 2e-4`"
# What the YAML parser says -> the remedy, where it is not that line alone.
YAML_REMEDIES = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values": f"{RECIPE_LINE}; a value that has a colon stands in quotes",
    "another document": "a recipe is one document: leave the line --- out",
}
NEVER_FROM_A_RUN = ("trust_remote_code",)  # a run.json may come from anyone


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
        remedy = did_you_mean(name, recipes, "`finetune recipes` lists them")
        raise ConfigError(f"{name}: there is no such recipe: {remedy}")
    return recipes[name]


def read_mapping(path: Path, shown: str) -> dict[str, Any]:
    """Read a mapping of a YAML or JSON file; `shown` names it in errors."""
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            text = read_text(path, shown)
            node, values = yaml.compose(text, yaml.SafeLoader), yaml.safe_load(text)
        except yaml.MarkedYAMLError as error:
            mark, reason = error.problem_mark or error.context_mark, error.problem or error.context
            place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            hint = next((remedy for sign, remedy in YAML_REMEDIES.items() if sign in str(reason)), RECIPE_LINE)
            raise ConfigError(f"{shown}{place}: not YAML: {reason}: {hint}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"{shown}: not YAML: {first_line(error)}: {RECIPE_LINE}") from None
        keys = [str(key.value) for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        twice = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        raise_faults(f"{shown}: {key} is given twice: keep one of them" for key in twice)
    else:
        values = read_json(path, shown, object_pairs_hook=unique_keys)
    if isinstance(values, dict) and isinstance(values.get("arguments"), dict):
        values = {name: value for name, value in values["arguments"].items() if name not in NEVER_FROM_A_RUN}
    if not isinstance(values, dict):
        hint = "a file of conversations stands behind --data_path" if isinstance(values, list) else RECIPE_LINE
        raise ConfigError(f"{shown}: expected a mapping of flags to values: {hint}")
    return values
