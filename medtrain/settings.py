"""A file of DeepSpeed's settings, read without DeepSpeed: login nodes check it before anything is submitted."""

from pathlib import Path
from typing import Any

from medtrain.errors import UserError
from medtrain.files import parse_json
from medtrain.recipe import Train


def deepspeed_settings(train: Train) -> dict[str, Any]:
    """What the JSON file `train.deepspeed` holds, nothing where none is named; raises UserError where it is absent or
    no JSON object.
    """
    if not train.deepspeed:
        return {}
    path = Path(train.deepspeed)
    try:
        value = parse_json(path)
    except ValueError as error:
        raise UserError(f"{path} can not be read as JSON ({error}): correct train.deepspeed.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no settings of DeepSpeed: it needs a JSON object.")
    return value
