"""What a loader's source says when it can not go on: its sentence, out of another process and DALI's traceback."""

import re
from collections.abc import Iterator
from typing import Any

from medtrain.errors import UserError


def told(loader: Iterator[Any]) -> Iterator[Any]:
    """The same batches; a UserError that the source raised, in a worker or here, comes out as a UserError."""
    while True:
        try:
            batch = next(loader)
        except StopIteration:
            return
        except Exception as error:  # DALI's own types differ between this process and workers
            found = re.findall(r"UserError: (.+)", str(error))
            if not found:
                raise
            raise UserError(found[-1].strip()) from None
        yield batch
