"""The console script: one subcommand a module, one place that turns errors into lines."""

import argparse
import importlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any, NoReturn

from ulae_rt import __version__, messages
from ulae_rt.errors import BatchError, UlaeError, UsageError
from ulae_rt.optional import require

# Name -> (module, one-line help). Modules load only when their command runs, so that `--help`
# never pays for torch or for the exporter.
COMMANDS = {
    "register": ("ulae_rt.register", "register one pair of NIfTI files"),
    "batch": ("ulae_rt.batch", "register every pair of a list"),
    "apply": ("ulae_rt.apply", "carry further images or labels through a saved warp"),
    "evaluate": ("ulae_rt.evaluate", "measure registrations against labels and landmarks"),
    "pairs": ("ulae_rt.pairs", "list every ordered pair of the scans in a folder"),
    "prepare": ("ulae_rt.prepare", "bring scans to the training grid of a template"),
    "train": ("ulae_rt.train", "train the network from a configuration file"),
    "export": ("ulae_rt.export.cli", "turn weights into verified inference engines"),
    "doctor": ("ulae_rt.doctor", "say what can run on this machine, and why the rest cannot"),
}

EXIT_INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse with this project's ``error:`` and ``hint:`` lines."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        print(f"hint: see '{self.prog} -h'", file=sys.stderr)
        raise SystemExit(2)


class Report:
    """Where a command says what it did: standard output, or nowhere under ``--json``."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled

    def __call__(self, line: str = "") -> None:
        """Say one line."""
        if self.enabled:
            print(line, flush=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Parse ``argv``, run one subcommand, turn its errors into two lines and a status.

    A command's module defines ``add_arguments(parser)`` and ``run(arguments, report) -> dict``:
    it says what it did line by line through ``report``; the dictionary is what ``--json`` prints.

    Returns:
        0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    try:
        module = _module_of(name)
    except KeyboardInterrupt:  # importing takes a second
        return _interrupted("")
    except UlaeError as error:
        return _failed(error)
    parser = _Parser(prog=prog or f"python -m ulae_rt.{name}", description=module.__doc__)
    module.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    given = list(sys.argv[1:] if argv is None else argv)
    for number, text in enumerate(given, 1):
        if not text.strip() or (text.startswith("-") and text.endswith("=")):
            # An empty path would be the current folder.
            parser.error(f"argument {number} is empty: is it a variable that is not set?")
    arguments = parser.parse_args(given)
    if itk := sys.modules.get("SimpleITK"):  # the command's module has imported it if it needs it
        messages.redirect_itk(itk)
    with messages.libraries_redirected():
        return _guarded(module.run, arguments)


def _module_of(name: str) -> ModuleType:
    """The module of a command.

    Raises:
        BackendUnavailable: it cannot be loaded without torch, and torch is not installed.
    """
    try:
        return importlib.import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if error.name == "torch":
            require("torch", "torch")
        raise


def _guarded(
    run: Callable[[argparse.Namespace, Report], dict[str, Any]], arguments: argparse.Namespace
) -> int:
    log = logging.getLogger()
    shown, collected = logging.StreamHandler(sys.stderr), messages.Messages()
    shown.setLevel(logging.WARNING)
    shown.setFormatter(logging.Formatter("warning: %(message)s"))
    shown.addFilter(messages.Once())
    log.addHandler(shown)
    log.addHandler(collected)
    try:
        return _run(run, arguments, collected)
    finally:
        log.removeHandler(shown)
        log.removeHandler(collected)


def _run(
    run: Callable[[argparse.Namespace, Report], dict[str, Any]],
    arguments: argparse.Namespace,
    collected: messages.Messages,
) -> int:
    signal.signal(signal.SIGTERM, _interrupt)  # a stopped job unwinds and removes its half files
    report = Report(enabled=not arguments.json)
    try:
        result = run(arguments, report)
    except UlaeError as error:
        if isinstance(error, BatchError) and arguments.json:
            _printed({**error.result, "warnings": collected.messages})
        return _failed(error)
    except KeyboardInterrupt as interrupt:
        return _interrupted(str(interrupt))
    except BrokenPipeError:
        return 1
    return _printed({**result, "warnings": collected.messages}) if arguments.json else 0


def _failed(error: UlaeError) -> int:
    """Say an error in its two lines; the status that it ends the command with."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    if error.hint:
        print(f"hint: {' '.join(error.hint.split())}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def _printed(result: dict[str, Any]) -> int:
    """Print the one JSON object of ``--json``; a status that says whether it got there."""
    try:
        print(json.dumps(result), flush=True)
    except BrokenPipeError:
        return 1
    except OSError as error:
        print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
        # What is left of it would be written again, and fail again, at the very end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _interrupted(message: str) -> int:
    print(
        f"error: {message or 'interrupted; nothing half-written was left behind'}", file=sys.stderr
    )
    return EXIT_INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``ulae-rt``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        prog="ulae-rt",
        description="Learned deformable registration of brain scans.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items())
        + "\n\n'ulae-rt COMMAND -h' explains each.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ulae-rt {__version__}")
    parser.add_argument("command", choices=sorted(COMMANDS), metavar="COMMAND")
    arguments = parser.parse_args(argv[:1])
    return run_command(arguments.command, argv[1:], prog=f"ulae-rt {arguments.command}")


if __name__ == "__main__":
    sys.exit(main())
