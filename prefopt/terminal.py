"""What every command prints with and is read by. Results go to stdout, everything else to stderr."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

from prefopt import config, streams
from prefopt.records import InputError, plain


def steady_streams() -> None:
    """Make printing safe: a stream closed from the start goes nowhere, a character it cannot show is escaped."""
    streams.fill()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        stream = getattr(sys, name)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print to stdout; a reader that has gone away (`| head`) is no error, a disk that is full is said."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        drop(sys.stdout)
    except OSError as error:
        drop(sys.stdout)
        complain(f"stdout: cannot be written ({error.strerror})")


def complain(text: str) -> None:
    """Print to stderr, if anyone still reads it."""
    streams.note(text)


def drop(stream: IO[str]) -> None:
    """Send what is still to be written to nowhere, so that closing the stream at exit does not fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flush() -> None:
    """Write out what is buffered, so that a reader that has gone away is noticed here and not at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop(stream)


@contextlib.contextmanager
def libraries(machine: bool) -> Iterator[None]:
    """Work with the heavy libraries loaded: they report nothing to anyone, and draw bars on terminals only.

    machine: what they print goes to stderr, so that stdout holds the result alone.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        from transformers.utils import logging

        logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr) if machine else contextlib.nullcontext():
        yield


def as_json(value: Any) -> str:
    # ASCII: a machine reads this whatever the locale's encoding is.
    return json.dumps(plain(value), indent=2)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are InputErrors, that guesses no abbreviations, and whose help is ours."""

    def __init__(self, command: str, help_text: str) -> None:
        super().__init__(prog=f"prefopt {command}", add_help=False, allow_abbrev=False)
        self.help_text = help_text
        self.add_argument("-h", "--help", action="store_true")

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.prog}: {message}")

    def read(self, words: list[str]) -> argparse.Namespace:
        """The flags and words given. InputError on a flag that does not exist."""
        found, rest = self.parse_known_intermixed_args(words)
        if rest:
            raise InputError(f"{rest[0]}: {self.stray(rest[0])}; `{self.prog} --help` shows what there is")
        return found

    def stray(self, word: str) -> str:
        """Why a word is not understood, and what was perhaps meant."""
        name = word.lstrip("-").partition("=")[0].replace("-", "_")
        flags = [flag.lstrip("-").replace("-", "_") for flag in self._option_string_actions]
        near = config.nearest(name, flags)
        if near and near != name:
            return f"no such flag; did you mean --{near.replace('_', '-')}?"
        return f"no such flag; options are written without dashes, such as {name}=VALUE"


def summary_lines(summary: Mapping[str, Any], indent: str = "") -> list[str]:
    """A summary as `name  value` lines, inner mappings indented; what is None or empty is left out."""
    shown = {key: value for key, value in summary.items() if value is not None and value != {}}
    width = max((len(key) for key, value in shown.items() if not isinstance(value, Mapping)), default=0)
    lines = []
    for key, value in shown.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{key}", *summary_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{width}}  {figure(value)}")
    return lines


def figure(value: Any) -> str:
    """A value in a table: numbers to four digits, `-` for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines. InputError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot write: {error.strerror or error}") from None


class Stopped(Exception):
    """A run that was stopped because going on would have wasted it. The message says why."""
