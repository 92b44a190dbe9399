"""The one way a program ends: 0 done, 1 our fault, 2 the user's input, 130 interrupted."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence


class UserError(Exception):
    """What the user gave is wrong. The message is one sentence that names the file and the remedy."""


def disk_full(error: OSError) -> bool:
    """Whether an operating-system error means that no more bytes fit on the disk or in the quota."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # h5py reports the C library's errno only in its text
    return f"errno = {errno.ENOSPC}" in str(error) or os.strerror(errno.ENOSPC) in str(error)


# What a path can be wrong about, beside not being there.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST)


def exit_code(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and turn what it raises into an exit code, with one line on stderr for the user's errors."""
    try:
        return main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if disk_full(error):
            where = error.filename or "the output folder"
            print(f"error: no space left while writing {where}: free some and run the same command.", file=sys.stderr)
            return 2
        if error.errno in REFUSED and error.filename:
            words = f"{error.filename} can not be used ({error.strerror})"
            print(f"error: {words}: correct the path or its permissions.", file=sys.stderr)
            return 2
        traceback.print_exc()
        return 1
    except Exception:
        traceback.print_exc()
        return 1
