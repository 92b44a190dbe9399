"""How a program ends: 0 done, 1 our fault, 2 the user's input, 3 something is missing or set aside, 130 interrupted."""

import contextlib
import errno
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from medtrain.wording import printable


class UserError(Exception):
    """What the user gave is wrong. The message is one sentence that names the file and the remedy."""


class NodeError(UserError):
    """A node lacks what its job asked for; on another one the job may go well."""


class Failed(Exception):
    """The work can not go on, and not through the user's input. The message is all there is to say: no traceback."""


class Stopped(Exception):
    """Training was asked to stop and has saved its state; run again, it goes on."""


def disk_full(error: Exception) -> bool:
    """Whether an operating-system error means that no more bytes fit on the disk or in the quota."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    # h5py tells the C library's errno only in its text, and in a RuntimeError when it closes a file
    return any(f"errno = {number}," in str(error) or os.strerror(number) in str(error) for number in full)


def free_words(path: str | os.PathLike[str]) -> str:
    """How much room is left where a path lies, in brackets; nothing where that can not be told."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return f" ({shutil.disk_usage(place).free:,} bytes are free)"
    except OSError:
        return ""


def out_of_memory(error: Exception) -> str:
    """ "GPU" or "host" where an error means that no more memory could be had there, else an empty text."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in text or "_ALLOC_FAILED" in text:
        return "GPU"
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in text or "Cannot allocate memory" in text
    return "host" if host else ""


# What a path can be wrong about, beside not being there.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST)


@contextlib.contextmanager
def threads_say_no_disk_full() -> Iterator[None]:
    """Inside, a thread of a library that ends because the disk is full prints nothing: who waits for it tells it."""
    before = threading.excepthook

    def tell(args: Any) -> None:
        if not (isinstance(args.exc_value, Exception) and disk_full(args.exc_value)):
            before(args)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = before


def exit_code(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and turn what it raises into an exit code, with one line on stderr for the user's errors."""
    try:
        with threads_say_no_disk_full():
            return main(argv)
    except UserError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as a program that SIGPIPE ended
    except (OSError, RuntimeError) as error:
        if disk_full(error):
            where = getattr(error, "filename", None)
            words = f"no space left while writing {f'{where}{free_words(where)}' if where else 'the output folder'}"
            print(f"error: {words}: free some and run the same command.", file=sys.stderr)
            return 2
        if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
            words = f"{error.filename} can not be used ({error.strerror})"
            print(f"error: {words}: correct the path or its permissions.", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1
