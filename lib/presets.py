"""Presets: ``presets/default.yaml`` is a complete parameter file, the others hold only what differs from it.

Keys are merged one by one; a list or a single value takes the place of the default's. The complete file has the comments of default.yaml;
a comment in a preset, the source of a value in parentheses, takes the place of the one in parentheses that ends the default's.
"""

import io
import re
from itertools import takewhile
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import CommentMark
from ruamel.yaml.tokens import CommentToken

from lib.params import ParamsError, parse_params, read_params, read_yaml
from lib.problems import suggest
from lib.schema import PipelineParams

PRESETS_FOLDER = Path("presets")
DEFAULT = "default"
COMMENT_COLUMN = 33
SOURCE = re.compile(r" \([^()]*\)$")


def list_presets(folder: Path = PRESETS_FOLDER) -> dict[str, Path]:
    """Name -> file, sorted by name."""
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def describe_preset(path: Path) -> list[str]:
    """Lines of the comment at the top, up to an empty one: what the preset is, what it needs, how it is run."""
    return [line.removeprefix("# ") for line in takewhile(lambda line: line.startswith("# "), _head(path).splitlines())]


def read_preset(name: str, folder: Path = PRESETS_FOLDER) -> dict[str, Any]:
    """All parameters of a preset as plain data, those of `DEFAULT` included.

    Args:
        name: name of a file in the folder, without its suffix.
        folder: where the presets are.

    Raises:
        ParamsError: no such preset, a file that cannot be read, or keys or values that parameters cannot have.
    """
    presets = list_presets(folder)
    if name not in presets:
        raise ParamsError(f"NAME: expected a preset, found {name!r}; {suggest(name, presets) or '`make preset` lists them'}")
    values = read_params(presets[DEFAULT])
    _merge(values, read_yaml(presets[name]))
    parse_params(values, PipelineParams, f"{presets[name]}: ")
    return values


def compose_preset(name: str, folder: Path = PRESETS_FOLDER) -> str:
    """The complete parameter file of a preset, with comments, in the form in which ``dvc exp run --set-param`` writes it.

    Arguments and errors are those of `read_preset`.
    """
    read_preset(name, folder)
    default, path = (list_presets(folder)[each] for each in (DEFAULT, name))
    values, changes = (YAML().load(each.read_text(encoding="utf-8")) for each in (default, path))
    if path != default:
        _merge(values, changes)
        _explain(values, changes)
    YAML().dump(values, stream := io.StringIO())
    return _head(path) + stream.getvalue().removeprefix(_head(default))


def load_settings(source: str, folder: Path = PRESETS_FOLDER) -> PipelineParams:
    """All parameters of a preset, or of a complete parameter file.

    Args:
        source: name of a preset, or the path of a file, which ends in ``.yaml``.
        folder: where the presets are.

    Raises:
        ParamsError: as `read_preset`.
    """
    values = read_params(Path(source)) if source.endswith(".yaml") else read_preset(source, folder)
    return parse_params(values, PipelineParams, f"{source}: ")


def _head(path: Path) -> str:
    """The comment at the top of a file, up to the first line that is none."""
    return "".join(takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines(keepends=True)))


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    """Put `changes` into `values`; what no parameter class knows is put there, too, to be refused by it."""
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(before := values.get(key), dict) and before:
            _merge(values[key], value)
        else:
            values[key] = _plain(value)


def _plain(value: Any) -> Any:
    """Data without a style of its own, as dvc puts it into a file."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _explain(values: CommentedMap, changes: CommentedMap) -> None:
    """Take the comments of `changes` over, to the values of the same keys."""
    for key, value in changes.items():
        if source := _lines_behind(changes, key)[0]:
            meaning, *rest = _lines_behind(values, key)
            text = "\n".join([f"{SOURCE.sub('', meaning or '#')} {source.removeprefix('# ')}", *(rest or [""])])
            token = values.ca.items[key][2] if meaning else CommentToken(text, CommentMark(COMMENT_COLUMN), None)
            token.value = text  # of the same token, which a mapping behind the key has, too
            values.ca.items[key] = [None, None, token, None]
        if isinstance(values[key], CommentedMap):
            _explain(values[key], value)


def _lines_behind(values: CommentedMap, key: str) -> list[str]:
    """What stands behind a key, or behind its value: a comment, which may be empty, and the lines that follow, up to the next key."""
    token = (values.ca.items.get(key) or [None] * 3)[2]
    return token.value.split("\n") if token else [""]
