"""A run as a value: frozen dataclasses, typed overrides, JSON, and the signature that names a run folder."""

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from medtrain.errors import UserError
from medtrain.files import parse_json_text
from medtrain.wording import listed, shown

# Above every sensible number, below what arithmetic on whole numbers of 64 bits and floats can not do.
MOST = 2**53
# Fields marked with this do not change the result, so two runs that differ only there share a signature.
NO_EFFECT: dict[str, Any] = {"signature": False}


def within(
    default: Any, least: float, below: float = float("inf"), *, most: float = float("inf"), **metadata: Any
) -> Any:
    """A field whose numbers must be at least `least`, below `below`, at most `most`; others are refused.

    With `ordered=True` its first number may not be larger than its second.
    """
    return field(default=default, metadata={"least": least, "below": below, "most": most, **metadata})


def place(default: str, *words: str, **metadata: Any) -> Any:
    """A field that names a file or folder: `--set` makes it absolute, since jobs run in folders of their own. "" and
    `words` are no paths and stay.
    """
    return field(default=default, metadata={"words": ("", *words), **metadata})


@dataclass(frozen=True, kw_only=True)
class Optim:
    """Optimiser and learning-rate schedule; `clip_norm`, `ema` and `warmup_steps` are off at 0.

    `factor`, `patience` (in validations: `train.validate_every` epochs each) and `min_lr` are `plateau`'s, which as
    torch's lowers the rate once `patience` + 1 in a row are no better (Keras: `patience`).
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    library: Literal["torch", "apex"] = field(default="torch", metadata=NO_EFFECT)  # whose fused optimiser
    lr: float = within(1e-4, 0)
    weight_decay: float = within(1e-5, 0)
    schedule: Literal["poly_epoch", "poly", "cosine", "constant", "plateau"] = "poly_epoch"
    power: float = within(0.9, 0)
    factor: float = within(0.5, 0, below=1)
    patience: int = within(5, 0)
    min_lr: float = within(0.0, 0)
    warmup_steps: int = within(0, 0)
    clip_norm: float = within(0.0, 0)
    ema: float = within(0.0, 0, below=1)


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long and how: `batch` is the global batch of one optimiser step, whatever the number of ranks; `zero`,
    `offload` and `deepspeed` belong to the strategy `deepspeed`.
    """

    epochs: int = within(1, 1)
    batch: int = within(1, 1, most=65536)
    accumulate: int = within(1, 1, most=65536)
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    # auto on several processes: ddp, or, where steps are replayed, gradients averaged in one piece
    strategy: Literal["auto", "single", "ddp", "deepspeed"] = "auto"
    zero: int = within(2, 0, most=3)  # DeepSpeed's stage: what ranks share (1 optimiser, 2 gradients, 3 parameters)
    offload: bool = False  # DeepSpeed: optimiser states in the host's memory
    deepspeed: str = place("")  # a JSON file with more of DeepSpeed's settings
    # try: on, but without where it fails; graphs: on, with CUDA graphs; replay: CUDA graphs without a compiler, which
    # auto takes where it can for networks that were tried so
    compile: Literal["auto", "off", "on", "try", "graphs", "replay"] = field(default="auto", metadata=NO_EFFECT)
    # auto: where kernels for it run, on a GPU in mixed precision
    channels_last: Literal["auto", "on", "off"] = field(default="auto", metadata=NO_EFFECT)
    recompute: bool = field(default=False, metadata=NO_EFFECT)  # blocks' activations in the backward pass: less memory
    seed: int = within(0, 0)
    deterministic: bool = False
    validate_every: int = within(1, 1)  # epochs
    save_every_s: float = within(600.0, 0, **NO_EFFECT)
    log_every: int = within(10, 1, **NO_EFFECT)  # steps
    max_skipped: int = within(10, 1, **NO_EFFECT)  # steps in a row without finite gradients, then training ends
    timeout_s: float = within(1800.0, 1, **NO_EFFECT)  # how long a rank waits for the others
    workers: int = within(1, 0, most=1024, **NO_EFFECT)  # loader processes of one rank; 0 loads in the main process


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What every task's recipe has; a task adds its own parts (data, model, augmentation) in a subclass."""

    name: str
    task: str
    optim: Optim = Optim()
    train: Train = Train()

    def to_json(self) -> str:
        """The whole recipe as JSON text, for `recipe.json`."""
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, origin: str = "recipe.json") -> Self:
        """Read `to_json`'s text back; a missing, unknown or ill-typed field is a UserError that names `origin`."""
        try:
            value = parse_json_text(text)
        except ValueError as error:
            words = shown(error, 80)
            raise UserError(f"{origin} is not JSON ({words}): take it from an intact run folder.") from None
        made = build(cls, value, origin)
        task = next(f.default for f in dataclasses.fields(cls) if f.name == "task")
        if task not in (dataclasses.MISSING, made.task):
            raise UserError(f"{origin}, field task: {shown(made.task, 40)!r} is no recipe of {task}: name another one.")
        if not re.fullmatch(r"\w[\w.-]{0,99}", made.name):  # it becomes a folder's name
            raise UserError(f"{origin}, field name: {shown(made.name, 40)!r} is no recipe's name: take an intact copy.")
        return made

    def override(self, assignments: list[str]) -> Self:
        """Apply `section.key=value` texts, typed from the annotations; raises UserError with near names."""
        recipe = self
        for assignment in assignments:
            path, equals, text = assignment.partition("=")
            if not equals:
                raise UserError(
                    f"--set {shown(assignment, 60)!r} has no '=': write section.key=value, such as optim.lr=3e-4."
                )
            recipe = _replace(recipe, path.strip().split("."), text.strip(), path.strip())
        return recipe

    @property
    def unfreezes_later(self) -> bool:
        """Whether some weights do not move at first."""
        return False

    @property
    def signature(self) -> str:
        """SHA-256 over every field that changes the result; the first eight digits name the run folder."""
        text = json.dumps(_essential(self), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def _essential(value: Any, hint: Any = None) -> Any:
    """What changes the result, with numbers of the annotated type: 25 in a field of floats is the 25.0 that JSON brings
    back.
    """
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
        kept = [f for f in dataclasses.fields(value) if f.metadata.get("signature", True)]
        return {f.name: _essential(getattr(value, f.name), hints[f.name]) for f in kept}
    if isinstance(value, tuple) and typing.get_origin(hint) is tuple:
        return tuple(_essential(item, typing.get_args(hint)[0]) for item in value)
    return float(value) if hint is float and type(value) is int else value


def differing(one: Recipe, other: Recipe) -> list[str]:
    """Dotted names of the fields that change the result and are not the same."""

    def walk(a: Any, b: Any, name: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [found for key in a for found in walk(a[key], b.get(key), f"{name}.{key}" if name else key)]
        return [name] if a != b else []

    return walk(_essential(one), _essential(other), "")


def flat(recipe: Any) -> dict[str, Any]:
    """Every field by its dotted name."""
    values = {}
    for name in field_names(recipe):
        value = recipe
        for key in name.split("."):
            value = getattr(value, key)
        values[name] = value
    return values


def described(recipe: Recipe) -> list[tuple[str, str]]:
    """Every field as `override` takes it, with the values that it may have."""
    lines = []
    for name, value in flat(recipe).items():
        *sections, key = name.split(".")
        owner: Any = recipe
        for section in sections:
            owner = getattr(owner, section)
        if name not in ("name", "task"):
            item = next(f for f in dataclasses.fields(owner) if f.name == key)
            lines.append((f"{name}={_text(value)}", _choices(typing.get_type_hints(type(owner))[key], item)))
    return lines


def _text(value: Any) -> str:
    """A value as `_parse` reads it."""
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _choices(hint: Any, item: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    if hint is bool:
        return "true, false"
    least, below, most = (item.metadata.get(key) for key in ("least", "below", "most"))
    if least is None:
        return ""
    ends = [f"at least {least:g}"] + ([f"below {below:g}"] if below < float("inf") else [])
    return ", ".join(ends + ([f"at most {most:g}"] if most < float("inf") else []))


def field_names(value: Any, prefix: str = "") -> list[str]:
    """Every dotted name that `override` takes."""
    names: list[str] = []
    for item in dataclasses.fields(value):
        inner = getattr(value, item.name)
        nested = dataclasses.is_dataclass(inner)
        names += field_names(inner, f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return names


def _replace(value: Any, keys: list[str], text: str, path: str, root: Any = None) -> Any:
    root = value if root is None else root
    hints = typing.get_type_hints(type(value))
    key = keys[0]
    known = key in hints
    nested = known and dataclasses.is_dataclass(getattr(value, key))
    if not known or nested == (len(keys) == 1) or (key in ("name", "task") and value is root):
        names = [n for n in field_names(root) if n not in ("name", "task")]
        leaf = path.rsplit(".", 1)[-1]
        near = difflib.get_close_matches(path, names, 3, 0.5)
        near += [n for n in names if n.rsplit(".", 1)[-1] == leaf and n not in near]
        raise UserError(f"--set {shown(path, 60)}: no such field; near ones: {listed(near or names, 8)}.")
    if nested:
        new = _replace(getattr(value, key), keys[1:], text, path, root)
    else:
        where = f"--set {path}={shown(text, 80)}"
        item = next(f for f in dataclasses.fields(value) if f.name == key)
        new = _parse(hints[key], text, where)
        if new not in item.metadata.get("words", (new,)):
            new = _absolute(new, where)
        _check_range(item, new, where)
    return dataclasses.replace(value, **{key: new})


def _absolute(path: str, where: str) -> str:
    """A path as it is seen from the folder that the command was typed in."""
    try:
        return str(Path(path).expanduser().absolute())
    except (RuntimeError, OSError):  # ~nobody, or a folder that is gone
        raise UserError(f"{where}: write the whole path, from / on.") from None


def _parse(hint: Any, text: str, where: str) -> Any:
    """One command-line text as the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none":
            return None
        return _parse(next(a for a in arguments if a is not type(None)), text, where)
    if origin is tuple:
        inner = arguments[0]
        parts = [part.strip() for part in text.strip("()[] ").split(",") if part.strip()]
        if arguments[-1] is not Ellipsis and len(parts) != len(arguments):
            raise UserError(f"{where}: needs {len(arguments)} values with commas between them.")
        return tuple(_parse(inner, part, where) for part in parts)
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where}: needs true or false.")
        return text.lower() == "true"
    return _check(hint, text if hint is str or origin is Literal else _number(text), where)


def _check_range(item: Any, value: Any, where: str) -> None:
    least, below, most = (item.metadata.get(key) for key in ("least", "below", "most"))
    if least is None:
        return
    for number in value if isinstance(value, tuple) else (value,):
        if number is None:
            continue
        if not (least <= number < below and number <= most):
            bound = f" and below {below:g}" if below < float("inf") else ""
            bound += f" and at most {most:g}" if most < float("inf") else ""
            raise UserError(f"{where}: needs at least {least:g}{bound}.")
    if item.metadata.get("ordered") and value[0] > value[1]:
        raise UserError(f"{where}: needs the smaller number first.")


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _check(hint: Any, value: Any, where: str) -> Any:
    """Value as the annotated type, from a number, a text or a JSON value; raises UserError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if isinstance(value, bool) and {"on", "off"} <= set(arguments):  # as earlier recipes have it
            value = "on" if value else "off"
        if not isinstance(value, str) or value not in arguments:
            raise UserError(f"{where}: needs one of {', '.join(map(str, arguments))}.")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _check(next(a for a in arguments if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (arguments[-1] is not Ellipsis and len(value) != len(arguments)):
            many = "" if arguments[-1] is Ellipsis else f" of {len(arguments)} values"
            raise UserError(f"{where}: needs a list{many}.")
        return tuple(_check(arguments[0], item, where) for item in value)
    if hint in (int, float) and isinstance(value, (int, float)) and not abs(value) <= MOST:
        raise UserError(f"{where}: needs a number of at most {MOST:g}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        words = {int: "a whole number", bool: "true or false", str: "a text", float: "a number"}
        raise UserError(f"{where}: needs {words.get(hint, 'a ' + hint.__name__)}.")
    return value


def build(cls: Any, value: Any, where: str) -> Any:
    """A dataclass from a JSON object: every field of its annotated type and in its range, no other ones.

    A field that changes no result may be missing, as in older files. Raises UserError naming `where`.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    light = {name for name, f in fields.items() if not f.metadata.get("signature", True)}
    if not isinstance(value, dict) or (set(value) ^ set(hints)) - (light - set(value)):
        odd = sorted((set(value) ^ set(hints)) - light) if isinstance(value, dict) else [type(value).__name__]
        raise UserError(f"{where} has missing or unknown fields ({listed(odd)}): it is of another version or damaged.")
    made = {}
    for key, given in value.items():
        inner, hint = f"{where}, field {key}", hints[key]
        made[key] = build(hint, given, inner) if dataclasses.is_dataclass(hint) else _check(hint, given, inner)
        _check_range(fields[key], made[key], inner)
    return cls(**made)
