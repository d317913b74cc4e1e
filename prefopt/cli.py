"""The command line: a user's error is one message and exit code 2."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from prefopt import config
from prefopt.recipes.signals import EXIT_CODE, Paused
from prefopt.records import InputError
from prefopt.terminal import Stopped, complain, flush, say, steady_streams

STOPPED, USER_ERROR, INTERRUPTED = 1, 2, 130

ABOUT = """\
Preference optimisation of language models.

  prefopt quickstart                     a model from nothing, SFT, then DPO, and what changed; a few minutes
  prefopt quickstart grpo                the same with rewards: a task it learns, one that stalls, and the way out
  prefopt train OBJECTIVE|RECIPE ...     train a model on a preference file
  prefopt sample --model DIR ...         what a model says
  prefopt score --model DIR --data FILE  what a reward model says of answers
  prefopt objectives [NAME]              what there is to train with, and which to choose; all about one
  prefopt audit DATA ...                 what is wrong with data: rows, why it matters, what to do; can remove them
  prefopt advise --data FILE ...         which objective fits data, model and machine, why, and a recipe that runs
  prefopt estimate OBJECTIVE|RECIPE ...  memory and time of a run, whether it fits, and what makes it fit
  prefopt doctor RUN [--apply]           what is wrong with a run, ours or TRL's, and the recipe that mends it
  prefopt explain [METRIC]               what a logged number means, and what healthy looks like
  prefopt --version

`prefopt train dpo --help` lists the options of a run."""

# command -> "module:function" of prefopt.commands
COMMANDS = {
    "train": "train:train",
    "sample": "sample:sample",
    "score": "score:score",
    "objectives": "lookup:objectives",
    "explain": "lookup:explain",
    "audit": "audit:audit",
    "advise": "advise:advise",
    "estimate": "estimate:estimate",
    "doctor": "doctor:doctor",
    "quickstart": "quickstart:quickstart",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit code: 0 fine, 1 stopped by a check, 2 a user's error, 75 asked to stop and can go on, 130
    interrupted.

    A traceback is a bug of ours.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    steady_streams()
    try:
        return dispatch(words)
    except InputError as error:
        complain(f"error: {error}")
        return USER_ERROR
    except Stopped as error:
        complain(f"stopped: {error}")
        return STOPPED
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except Paused as error:
        complain(str(error))
        return EXIT_CODE
    finally:
        flush()


def dispatch(words: list[str]) -> int:
    """Run the command that `words` names."""
    if not words or words[0] in ("-h", "--help", "help"):
        say(ABOUT)
        return 0
    if words[0] in ("--version", "-V"):
        from prefopt import __version__

        say(f"prefopt {__version__}")
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        near = config.nearest(words[0], COMMANDS)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(COMMANDS)}"
        raise InputError(f"{words[0]!r} is not a command; {hint}")
    module, function = command.split(":")
    getattr(importlib.import_module(f"prefopt.commands.{module}"), function)(words[1:])
    return 0
