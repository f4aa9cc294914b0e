"""Defaults <- YAML <- `key=value`: the merge, its explanations, and where a configuration named by a word is found."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dinov2.configs.errors import ConfigError, nearest
from dinov2.configs.schema import Config, OnlineTaskConfig, StudentConfig
from dinov2.errors import BadInput
from dinov2.files import MOST_FACTS_BYTES, read_text, user_path

_HERE = Path(__file__).resolve().parent  # dinov2/configs


def recipe_folders() -> list[Path]:
    """Folders in which a name is looked up: the package's own, then the recipes (installed, or beside the package)."""
    installed, checkout = _HERE.parent / "recipes", _HERE.parent.parent / "configs"
    return [_HERE, *(p for p in (installed, checkout) if p.is_dir())]


def find_config(name_or_path: str | Path) -> Path:
    """The YAML file for a path, or for a name relative to the package's configurations or recipes, without `.yaml`.

    Raises:
        ConfigError: Neither a file nor a known name; the message lists the nearest name.
    """
    try:
        given = Path(user_path(name_or_path))
        if given.is_file():
            return given
    except (BadInput, OSError) as err:  # OSError: longer than a name may be
        reason = err.strerror if isinstance(err, OSError) else err
        raise ConfigError(f"{str(name_or_path)[:80]!r}: no name of a file or a configuration: {reason}") from err
    known = {p.relative_to(folder).with_suffix("").as_posix(): p for folder in recipe_folders() for p in folder.rglob("*.yaml")}
    name = str(name_or_path).removeprefix("configs/").removesuffix(".yaml")
    if name not in known:
        raise ConfigError(f"{name_or_path}: no such file, and no configuration of that name{nearest(name, known)}")
    return known[name]


def _default(f: dataclasses.Field[Any]) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def config_keys(node: Any = Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """All (dotted key, dataclass field) pairs of the schema, leaves only, in order."""
    for f in dataclasses.fields(node):
        default = _default(f)
        if dataclasses.is_dataclass(default):
            yield from config_keys(default, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f


def _explain(err: OmegaConfBaseException, source: str, schema: type) -> ConfigError:
    """One line from OmegaConf's several, with the nearest valid key where the key is what is wrong."""
    problem = str(err).splitlines()[0].rstrip(".")
    full_key = getattr(err, "full_key", "") or ""
    if err.object_type is OnlineTaskConfig:  # of an entry of a list OmegaConf says neither the list nor the place in it
        names = [f.name for f in dataclasses.fields(OnlineTaskConfig)]
        if full_key not in names:
            return ConfigError(f"{source}: evaluation.tasks: unknown key {full_key!r}{nearest(full_key, names)}")
        return ConfigError(f"{source}: evaluation.tasks: {full_key}: {problem}")
    leaves = [k for k, _ in config_keys(schema)]
    known = leaves + list(dict.fromkeys(k[:i] for k in leaves for i, c in enumerate(k) if c == "."))
    if full_key and full_key not in known and not full_key.startswith(tuple(k + c for k in leaves for c in ".[")):
        return ConfigError(f"{source}: unknown key {full_key!r}{nearest(full_key, known)}")
    if "Merge error" in problem:
        return ConfigError(f"{source}: a section was given a plain value where it needs keys ({problem})")
    return ConfigError(f"{source}: {full_key}: {problem}")


def read_yaml(path: Path, load: Callable[[IO[str]], Any] = yaml.safe_load) -> Any:
    """What a user's YAML file holds.

    Args:
        path: The file.
        load: The reader of its text.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        text = read_text(path, most_bytes=MOST_FACTS_BYTES)
    except BadInput as err:
        raise ConfigError(str(err)) from err
    try:
        return load(io.StringIO(text))
    except (ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as err:
        reason = "nested too deeply" if isinstance(err, RecursionError) else " ".join(str(err).split())
        raise ConfigError(f"{path}: not a readable YAML file: {reason}") from err


def _read_yaml(path: Path) -> DictConfig:
    node = read_yaml(path, OmegaConf.load)
    if isinstance(node, ListConfig):
        raise ConfigError(f"{path}: holds a list, expected `key: value` pairs")
    return node


def _file_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """(source, content) of a file after those of the file or name it is based on (`base: NAME`)."""
    if path in seen:
        raise ConfigError(f"{path}: `base` leads back to the file itself")
    content = _read_yaml(path)
    plain: Any = OmegaConf.to_container(content)  # in which `${...}` is text
    base = plain.get("base")
    if "base" in content:
        del content["base"]
    if base is None:
        return [(str(path), content)]
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: {str(base)[:80]!r} is no name of a configuration")
    try:
        found = find_config(base)
    except ConfigError as err:
        raise ConfigError(f"{path}: base: {err}") from err
    return [*_file_layers(found, (*seen, path)), (str(path), content)]


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for word in overrides:
        key, is_pair, _ = word.partition("=")
        if not is_pair:
            raise ConfigError(f"override {word!r} is not of the form key=value")
        if set(key) & set("[]\\"):  # OmegaConf's other spellings of a path, half of which it reads as another key
            raise ConfigError(f"override {word!r}: {key!r} is no key: keys are names joined by dots, as optim.base_lr")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (yaml.YAMLError, OmegaConfBaseException) as err:
        raise ConfigError(f"overrides {list(overrides)}: {' '.join(str(err).split())}") from err


def _refuse_truth_for_words(content: Any, schema: type, source: str) -> None:
    """Raise `ConfigError` where YAML took a word for a truth value: `classes: {0: no, 1: yes}` has no names in it."""
    for f in dataclasses.fields(schema) if isinstance(content, dict) else ():
        value, default = content.get(f.name), _default(f)
        if dataclasses.is_dataclass(default):
            _refuse_truth_for_words(value, type(default), source)
            continue
        words = [value] if f.type == "str" else []
        if isinstance(value, dict):
            words = [*value, *(value.values() if ", str]" in str(f.type) else ())]
        if any(isinstance(word, bool) for word in words):
            raise ConfigError(f"{source}: {f.name}: yes, no, on, off, true and false are no words in YAML: quote them ('no')")


def _without_nothing(content: Any, schema: type) -> Any:
    """A layer's content with null as the key's default, where the key cannot be null itself; an empty section is left out.

    Null is written `key=` or `key: null`; Python's `None` means it too, where it cannot be a word of the key's own.
    """
    if not isinstance(content, dict):
        return content
    fields = {f.name: f for f in dataclasses.fields(schema)}
    kept = {}
    for name, value in content.items():
        f = fields.get(name)
        default = _default(f) if f else None
        if f and value == "None" and (f.type != "str" or default == "" or f.metadata.get("is_path")):
            value = None
        if dataclasses.is_dataclass(default):
            if value is None:
                continue
            value = _without_nothing(value, type(default))
        elif f and value is None and "None" not in str(f.type) and default is not dataclasses.MISSING:
            value = default
        kept[name] = user_path(value) if f and f.metadata.get("is_path") and isinstance(value, str) else value
    return kept


def _refuse_other_containers(cfg: DictConfig, content: Any, source: str, prefix: str = "") -> None:
    """Raise `ConfigError` where a list would be merged into keys, or keys into a list."""
    for name, value in content.items() if isinstance(content, dict) else ():
        before = cfg.get(name) if name in cfg else None
        if isinstance(before, DictConfig) and isinstance(value, dict):
            _refuse_other_containers(before, value, source, f"{prefix}{name}.")
        elif isinstance(before, DictConfig) and isinstance(value, list):
            raise ConfigError(f"{source}: {prefix}{name}: a list where it needs keys and values")
        elif isinstance(before, ListConfig) and isinstance(value, dict):
            raise ConfigError(f"{source}: {prefix}{name}: keys {list(value)} where it needs a list")


def _merge(schema: type, layers: Sequence[tuple[str, DictConfig]]) -> DictConfig:
    """A schema's defaults, and over them each (source, content) in turn; a mistake is named with its source."""
    cfg = OmegaConf.structured(schema)
    for source, layer in layers:
        try:
            plain = OmegaConf.to_container(layer)
            _refuse_truth_for_words(plain, schema, source)
            content = _without_nothing(plain, schema)
            _refuse_other_containers(cfg, content, source)
            cfg = OmegaConf.merge(cfg, OmegaConf.create(content))
            OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # finds bad interpolations
        except OmegaConfBaseException as err:
            raise _explain(err, source, schema) from err
    return cfg


def _build(cfg: DictConfig, layers: Sequence[tuple[str, DictConfig]]) -> Any:
    """The dataclasses of a merged configuration, whose `__post_init__` hold the rules."""
    try:
        return OmegaConf.to_object(cfg)
    except ConfigError as err:
        raise ConfigError(f"{err} ({' + '.join(s for s, _ in layers) or 'defaults'})") from err


def load_typed(schema: type, path: Path, overrides: Sequence[str] = ()) -> Any:
    """A YAML file as an object of another dataclass schema, as strict as the configuration.

    Args:
        schema: The dataclass.
        path: The file.
        overrides: ``key=value`` words, applied last.

    Raises:
        ConfigError: As `load_and_merge_config_3d`.
    """
    layers = [*_file_layers(path), *([("command line", _read_overrides(overrides))] if overrides else [])]
    return _build(_merge(schema, layers), layers)


def typed_from(schema: type, content: dict[Any, Any], source: str) -> Any:
    """A plain dictionary, such as weights carry, as an object of a dataclass schema, as strict as a file; `${...}` is text.

    Raises:
        ConfigError: As `load_typed`.
    """
    layers = [(source, OmegaConf.create(_as_text(content)))]
    return _build(_merge(schema, layers), layers)


def _as_text(content: Any) -> Any:
    """Foreign content in which `${...}` is text: what a resolver would fill in is none of its business."""
    if isinstance(content, dict):
        return {key: _as_text(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_as_text(value) for value in content]
    return content.replace("${", "\\${") if isinstance(content, str) else content


def saved_config(content: Any, source: str, overrides: Sequence[str] = ()) -> DictConfig:
    """As `load_and_merge_config_3d`, from plain types that weights or a run carry; `${...}` in them is text.

    Raises:
        ConfigError: It is no configuration.
    """
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: its configuration is a {type(content).__name__}, expected keys and values")
    return _checked([(source, OmegaConf.create(_as_text(content)))], overrides)


def without_path_keys(config: DictConfig | dict[Any, Any]) -> dict[Any, Any]:
    """A configuration in plain types as weights carry it: the keys that are paths, or lists of what holds some, are empty."""
    plain: Any = OmegaConf.to_container(config) if isinstance(config, DictConfig) else config
    sections = {name: dict(part) if isinstance(part, dict) else part for name, part in plain.items()}
    for name, f in config_keys():
        section, _, leaf = name.partition(".")
        if f.metadata.get("is_path") and isinstance(sections.get(section), dict) and sections[section].get(leaf):
            sections[section][leaf] = type(_default(f))()
    return sections


def read_saved_config(path: Path) -> DictConfig:
    """The `config.yaml` of a run, as `saved_config`.

    Raises:
        ConfigError: As `saved_config`, or no readable YAML.
    """
    return saved_config(OmegaConf.to_container(_read_yaml(path)), str(path))


def load_and_merge_config_3d(name_or_path: str | Path | None = None, overrides: Sequence[str] | None = None) -> DictConfig:
    """The merged configuration, typed, checked and read-only.

    Args:
        name_or_path: YAML file, or a name such as ``train/vit3d_highres`` or ``pretrain/tiny_cpu``; None: the defaults.
            A file may begin from another one by ``base: NAME``.
        overrides: ``key=value`` words, applied last.

    Raises:
        ConfigError: Unknown file, key or value, wrong type, or keys that do not go together; one line.
    """
    return _checked([] if name_or_path is None else _file_layers(find_config(name_or_path)), overrides or ())


def _checked(layers: list[tuple[str, DictConfig]], overrides: Sequence[str]) -> DictConfig:
    """The configuration of some layers and of what the command line adds, read-only."""
    if overrides:
        layers = [*layers, ("command line", _read_overrides(overrides))]
    cfg = _merge(Config, layers)
    _build(cfg, layers)
    OmegaConf.set_readonly(cfg, True)
    return cfg


def network_shape(cfg: DictConfig) -> tuple[int, int, int]:
    """(embed_dim, depth, num_heads) of a merged configuration's student."""
    student = OmegaConf.to_object(cfg.student)
    assert isinstance(student, StudentConfig)  # of a merged configuration it is
    return student.shape()


def _yaml_value(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, (bool, list, str)) else repr(value)


def default_yaml(cfg: DictConfig | None = None) -> str:
    """The schema (with a configuration's values) as YAML, every key with its meaning as a comment."""
    lines: list[str] = []

    def write(node: Any, values: Any, depth: int) -> None:
        for f in dataclasses.fields(node):
            default = _default(f)
            value, meaning = values[f.name], f.metadata.get("meaning", "")
            comment = f"  # {meaning}" if meaning else ""
            if dataclasses.is_dataclass(default):
                lines.append(f"{'  ' * depth}{f.name}:{comment}")
                write(default, value, depth + 1)
            else:
                lines.append(f"{'  ' * depth}{f.name}: {_yaml_value(value)}{comment}")

    values = OmegaConf.to_container(OmegaConf.structured(Config) if cfg is None else cfg)
    write(Config(), values, 0)
    return "\n".join(lines) + "\n"
