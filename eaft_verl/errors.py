"""Errors a user can act on, and what each does to the exit code.

Each message says: which key or row, what was found, what is allowed, what to do.
"""

import difflib
import errno
import traceback
from collections.abc import Iterable, Mapping

REFUSED, OUT_OF_MEMORY, DISK_FULL, HUNG, DIVERGED, LOST = 2, 4, 5, 6, 7, 8
SAVED, CTRL_C, UNREAD, ENDED = 75, 130, 141, 143  # EX_TEMPFAIL of sysexits.h; 128 + SIGINT, SIGPIPE, SIGTERM
EXIT_CODES = {
    0: "done",
    1: "a stage of a comparison failed, a check of `doctor` did, or this program has a fault",
    REFUSED: "not possible as asked: recipe, data, model or run directory; nothing to retry unchanged",
    3: "`plan`: an arm does not fit; `reproduce`: a number came out different",
    OUT_OF_MEMORY: "out of memory, on a GPU or a host",
    DISK_FULL: "no space left where the run is written",
    HUNG: "no step was finished for too long; the stacks of every process are in the run directory",
    DIVERGED: "loss, gradient or weights are not finite",
    LOST: "a worker, a node or Ray itself died",
    SAVED: "told to stop (SIGTERM, or the terminal was closed) and saved: the same command goes on",
    CTRL_C: "told to stop by Ctrl-C; the last line says what is saved",
    UNREAD: "whoever read the output has stopped reading, as `head` does",
    ENDED: "told to stop (SIGTERM) before anything new could be saved, or told twice",
}


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_REFUSED_FILES = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN),  # a disk or a mount that has gone
    *(errno.ENOLCK, errno.EOPNOTSUPP),  # a mount without locks
    *(errno.EMFILE, errno.ENFILE),
)
_LOOP = "Symlink loop from "  # Path.resolve, before Python 3.13


class ConfigError(ValueError):
    """A recipe, override or command line asks for something unknown, contradictory or unsupported."""


class DataError(ValueError):
    """A data set cannot be used as it is; the message names the file and, where there is one, the row."""


class RunError(RuntimeError):
    """A run directory is missing, incomplete, already in use, or not comparable with another one."""

    code = REFUSED


class Interrupted(RunError):
    """A stage was told to stop and has ended. code: SAVED only where the same command goes on from what was saved.

    said: the user has been told by the stage itself.
    """

    def __init__(self, message: str, code: int = SAVED, *, said: bool = False) -> None:
        super().__init__(message)
        self.code, self.said = code, said


class OutOfMemory(RunError):
    """A device or a host has no memory left."""

    code = OUT_OF_MEMORY


class DiskFull(RunError):
    """A file of the run could not be written for lack of space."""

    code = DISK_FULL


class Hung(RunError):
    """No step was finished for too long."""

    code = HUNG


class Diverged(RunError):
    """Loss, gradient or weights are not finite."""

    code = DIVERGED


class Lost(RunError):
    """A worker, a node or Ray died; the same command goes on from what is saved."""

    code = LOST


class WorkerFailed(RunError):
    """A worker raised what nobody foresaw; its traceback is in the file that the message names."""

    code = 1


def refusal(error: OSError | RuntimeError) -> tuple[int, str] | None:
    """Exit code and line where the system refuses a file, which the user can mend; None for a fault of ours."""
    if not isinstance(error, OSError):
        where, loop, name = str(error).replace("'", "").rpartition(_LOOP)
        return (REFUSED, f"{name}: a link that leads back to itself") if loop and not where else None
    if error.errno == errno.ENOENT and not error.filename:  # os.getcwd and tempfile name none
        gone = "the current folder does not exist any more; change to one that does"
        return REFUSED, f"{error.strerror}: export TMPDIR=FOLDER" if "temporary" in str(error.strerror) else gone
    if error.errno == errno.ENOENT and _made_a_folder(error):  # a parent that is there and takes none, as /proc
        return REFUSED, f"{error.filename}: no folder can be made there; choose another place"
    line = f"{error.filename or 'writing'}: {error.strerror}"
    if error.errno in NO_SPACE:
        return DISK_FULL, line
    return (REFUSED, line) if error.filename and error.errno in _REFUSED_FILES else None


def _made_a_folder(error: OSError) -> bool:
    """Whether it was raised where a folder was to be made; one that is looked for and missing is a fault of ours."""
    innermost = list(traceback.walk_tb(error.__traceback__))[-1:]
    return any(frame.f_code.co_name == "mkdir" for frame, _ in innermost)


def did_you_mean(word: str, known: Mapping[str, object] | Iterable[str]) -> str:
    """'; did you mean X?' where a known word is near; of a mapping its value is named. Else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    named = known.get(near[0]) if near and isinstance(known, Mapping) else near and near[0]
    return f"; did you mean {named}?" if near else ""


def require(condition: object, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
