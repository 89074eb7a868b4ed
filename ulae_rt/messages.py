"""What is worth saying besides a result: this package's warnings, and what other libraries print.

Warnings are records of this package's log. A command shows each once and gives all of them under
``--json``; a batch keeps those of a pair in its row.

Other libraries come in through one door. ITK writes pages to the terminal, nibabel has a handler of
its own, numpy and torch use Python's warnings, with lines of their source. In a command all of it
becomes records of this log. What is said while a file is in hand (`about`) is a warning that begins
with the file's name, told once; the rest is for developers and goes to the debug level.
"""

import contextlib
import contextvars
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

PACKAGE = "ulae_rt"
logger = logging.getLogger(__name__)

# The file in hand, and what has been told about it.
_file: contextvars.ContextVar[tuple[str, set[str]] | None] = contextvars.ContextVar(
    "file", default=None
)
_collecting: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "collecting", default=None
)
# What ITK puts before its message: place in its source, class and address.
_ITK_PLACE = re.compile(r"^\s*(\w+: )?In [^\n]*\n[^\n]*\((0x)?[0-9a-fA-F]+\): ?")
# ITK does not keep alive what it logs to.
_itk_loggers: list[Any] = []


@contextlib.contextmanager
def about(name: str) -> Iterator[None]:
    """What other libraries say in the block, in this thread, is about the file ``name``."""
    token = _file.set((name, set()))
    try:
        yield
    finally:
        _file.reset(token)


def tell(library: str, text: str) -> None:
    """Pass on what another library said, once about a file."""
    message, file = " ".join(text.split()), _file.get()
    if file is None:
        logger.debug("%s: %s", library, message)
    elif message and message not in file[1]:
        file[1].add(message)
        logger.warning("%s: %s says: %s", file[0], library, message)


@contextlib.contextmanager
def libraries_redirected() -> Iterator[None]:
    """Python's warnings and nibabel's log come in through the door for the length of the block."""
    nibabel_log = logging.getLogger("nibabel.global")
    handlers, propagate = nibabel_log.handlers[:], nibabel_log.propagate
    nibabel_log.handlers, nibabel_log.propagate = [_NibabelHandler()], False
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            nibabel_log.handlers, nibabel_log.propagate = handlers, propagate


def redirect_itk(library: Any) -> None:
    """ITK's messages come in through the door from now on, in this process.

    Args:
        library: SimpleITK, which only those who use it import.
    """
    if _itk_loggers:
        return

    class ItkLogger(library.LoggerBase):  # type: ignore[misc]
        def DisplayText(self, text: str) -> None:
            tell("ITK", _ITK_PLACE.sub("", text))

        DisplayErrorText = DisplayWarningText = DisplayText
        DisplayGenericOutputText = DisplayDebugText = DisplayText

    _itk_loggers.append(ItkLogger())
    _itk_loggers[-1].SetAsGlobalITKLogger()


class _NibabelHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tell("nibabel", record.getMessage())


def _show_warning(
    message: Warning | str, category: type[Warning], *_: object, **__: object
) -> None:
    library = category.__module__.partition(".")[0]
    tell("Python" if library == "builtins" else library, str(message))


class Messages(logging.Handler):
    """Keeps this package's warnings, each once: what a command gives under ``--json``."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message that has not been there."""
        message = record.getMessage()
        is_ours = record.name.partition(".")[0] == PACKAGE
        if is_ours and message not in self.messages:
            self.messages.append(message)


class Once(logging.Filter):
    """Lets a message pass the first time only."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message has not been there before."""
        message = record.getMessage()
        is_new = message not in self._passed
        self._passed.add(message)
        return is_new


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Warnings of the block, in this thread, each once: they belong to what it works on.

    Only inside `collecting`.
    """
    messages: list[str] = []
    token = _collecting.set(messages)
    try:
        yield messages
    finally:
        _collecting.reset(token)


@contextlib.contextmanager
def collecting() -> Iterator[None]:
    """Warnings go to whoever collects them in their thread, the rest where they always went."""
    package, handler = logging.getLogger(PACKAGE), _Collector()
    package.addHandler(handler)
    package.propagate = False
    try:
        yield
    finally:
        package.propagate = True
        package.removeHandler(handler)


class _Collector(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        messages = _collecting.get()
        if messages is None:
            logging.getLogger().handle(record)
        elif record.levelno >= logging.WARNING and record.getMessage() not in messages:
            messages.append(record.getMessage())
