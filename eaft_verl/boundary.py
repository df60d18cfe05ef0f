"""Where this process meets others: the text that leaves it, and the Python processes that it starts.

Data, answers, errors and file names are other people's. Everything printed passes `guard_streams`; everything written
into a run or handed to a launcher passes `masked`.
"""

import asyncio
import contextlib
import ctypes
import errno
import functools
import os
import re
import signal
import sys
import threading
from collections.abc import Coroutine, Iterator
from types import FrameType
from typing import Any, TextIO, TypeVar

# C0 but tab and line feed, DEL, C1; marks, embeddings, overrides and isolates of direction; halves of surrogate pairs;
# what has no width: spaces, joiners that join nothing (they do in emoji and in Persian), tags, selectors in a row
STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
    r"|[\ud800-\udfff]|[\U000e0000-\U000e007f]|(?<=[\ufe00-\ufe0f\U000e0100-\U000e01ef])[\ufe00-\ufe0f\U000e0100-\U000e01ef]"
    r"|(?<![^\x00-\x7f\u200c\u200d])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f\u200c\u200d])"
)
_SECRET_NAME = re.compile(
    r"(?i)(?:^|[_.-])(?:.*(?:token|secret|passw(?:or)?d|passphrase|credentials?|api_?key)|.*_?key|pass|pat|creds?)s?(?:_id)?$"
)
_NO_SECRET = re.compile(r"(?i)(?:^(?:bos|eos|pad|unk|sep|cls|mask|image|stop|think)_?token(?:_id)?|tokens)$")
_USERINFO = re.compile(r"(?<=://)[^\s/:@]*:[^\s/@]+(?=@)")
_START = (  # `python -m` would run a random.py of the current folder, -P is of Python 3.11, and -I loses PYTHONPATH
    "import sys; sys.path[:] = filter(None, sys.path); del sys.argv[0]; import runpy; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)
_REFERENCE = re.compile(r"\$\{oc\.env:\s*(\w+)")
_KEPT: set[str] = set()  # variables that a recipe uses for a secret, whatever they are called
_T = TypeVar("_T")
_SHORTEST = 8  # characters of a value that is left out: shorter ones are switches and numbers


def inert(text: str) -> str:
    r"""The text with everything that would steer or deceive a terminal written out, as in '\x1b' and '\u202e'."""
    return STEERING.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


@functools.lru_cache(maxsize=4096)
def looks_secret(name: str) -> bool:
    """Whether a key or variable of this name is likely to hold a secret: HF_TOKEN, api_key, password."""
    return bool(_SECRET_NAME.search(name)) and not _NO_SECRET.search(name)


def holds_password(text: str) -> bool:
    """Whether a URL in the text has user:password before its host."""
    return bool(_USERINFO.search(text))


def secrets_in_clear(tree: Any, key: str = "") -> list[str]:
    """Dotted keys whose text is a secret by its name, or a URL with user:password, and no reference to a variable.

    A variable that one refers to is a secret from now on, whatever it is called.
    """
    if isinstance(tree, dict):
        return [found for name, item in tree.items() for found in secrets_in_clear(item, f"{key}.{name}".lstrip("."))]
    if isinstance(tree, list):
        return [found for item in tree for found in secrets_in_clear(item, key)]
    if not isinstance(tree, str) or not tree:
        return []
    places = [tree] if looks_secret(key.rpartition(".")[2]) else [found[0] for found in _USERINFO.finditer(tree)]
    _KEPT.update(name for place in places for name in _REFERENCE.findall(place))
    return [key] if any("${" not in place for place in places) else []


def masked(value: Any) -> Any:
    """The value with each secret of the environment, wherever it stands, as the reference `${oc.env:NAME}`.

    A recipe written like that still means the same. Secret is what a variable holds whose name looks like it, from
    eight characters on, and the user:password of a URL. Lists and mappings are gone through, keys as well.
    """
    return _masked(value, _secrets())


def _masked(value: Any, secrets: tuple[tuple[str, str], ...]) -> Any:
    if isinstance(value, str):
        return _masked_text(value, secrets)
    if isinstance(value, dict):
        return {_masked(key, secrets): _masked(item, secrets) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item, secrets) for item in value]
    return value


def _secrets() -> tuple[tuple[str, str], ...]:
    found = [
        (value, name)
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and (name in _KEPT or looks_secret(name))
    ]
    return tuple(sorted(found, key=lambda pair: (-len(pair[0]), pair)))


def _masked_text(text: str, secrets: tuple[tuple[str, str], ...]) -> str:
    for value, name in secrets:
        if value in text:
            text = text.replace(value, f"${{oc.env:{name}}}")
    return _USERINFO.sub(lambda found: found[0] if "${" in found[0] else "***", text) if "://" in text else text


class LastingStream:
    """A text stream whose terminal may be closed: what would be written there then is written nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.guarded = stream

    def write(self, text: str) -> int:
        """As it is."""
        with self._though_closed():
            self.guarded.write(text)
        return len(text)

    def flush(self) -> None:
        """What is buffered."""
        with self._though_closed():
            self.guarded.flush()

    @contextlib.contextmanager
    def _though_closed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.guarded.fileno())

    def writelines(self, lines: Any) -> None:
        """Each of them by `write`."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.guarded, name)


class GuardedStream(LastingStream):
    """A lasting stream that writes `inert` and `masked` text, and is the stream it guards in all else."""

    def write(self, text: str) -> int:
        """A carriage return at the beginning of a piece stays: progress bars write it there."""
        start = len(text) - len(text.lstrip("\r"))
        super().write(text[:start] + inert(masked(text[start:].replace("\r\n", "\n"))))
        return len(text)


def guard_streams() -> None:
    """Guard this process's standard output and error until it ends, a traceback at its end included.

    One that whoever started this process has closed is made anew and leads nowhere.
    """
    for name in ("stdout", "stderr"):
        stream = vars(sys)[name] or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        if not isinstance(stream, GuardedStream):
            setattr(sys, name, GuardedStream(stream))


def unguarded(stream: Any) -> Any:
    """The stream for text that is `inert` already and is to be coloured."""
    return LastingStream(stream.guarded) if isinstance(stream, GuardedStream) else stream


def in_cluster() -> bool:
    """Whether RAY_ADDRESS names a cluster; otherwise Ray is started here."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def python_command(module: str, *arguments: str) -> list[str]:
    """`python -m MODULE ARGUMENTS`, with the current folder not on the path of what may be imported.

    A module of the user's own (an objective, a grader) is found through PYTHONPATH, as by the `eaft` command.
    """
    return [sys.executable, "-c", _START, module, *arguments]


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it has died; on Linux, elsewhere nothing does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stops_held() -> Iterator[None]:
    """Fork within this block: Ctrl-C, SIGTERM and SIGHUP come afterwards, to the child when
    `begin_worker` has run in it."""
    before, came = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS), list[int]()
    asked = _STOPS if threading.current_thread() is threading.main_thread() else ()
    handlers = {one: signal.getsignal(one) or signal.SIG_DFL for one in asked}
    for one in asked:  # a thread that does not block it may be handed it, and Python then calls the handler here
        signal.signal(one, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if came:
            signal.raise_signal(came[0])


def run_async(work: Coroutine[Any, Any, _T]) -> _T:
    """`asyncio.run`, where a signal that ends the command cancels `work` and KeyboardInterrupt follows in the end.

    Raised wherever the loop is, it would break the end of the loop too, whose tasks then tell of their own destruction.
    Python from 3.11 on does as much, but not in a script's background jobs, which ignore Ctrl-C and hear SIGTERM.
    """
    told: list[int] = []

    async def cancellable() -> _T:
        main, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert main is not None

        def stop(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and before == signal.SIG_IGN:
                return
            if told:
                raise KeyboardInterrupt
            told.append(number)
            main.cancel()
            loop.call_soon_threadsafe(lambda: None)  # it may be waiting for its sockets

        before = signal.signal(signal.SIGINT, stop)
        try:
            return await work
        finally:
            signal.signal(signal.SIGINT, before)

    if threading.current_thread() is not threading.main_thread():  # no signal comes here
        return asyncio.run(work)
    try:
        made = asyncio.run(cancellable())
    except asyncio.CancelledError:
        if told:
            raise KeyboardInterrupt from None
        raise
    if told:
        raise KeyboardInterrupt
    return made


def begin_worker() -> None:
    """In a process of a pool: leave what the terminal sends to the parent, which ends it; die with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # forked, it would have its parent's; a pool ends its processes by it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    die_with_parent()
