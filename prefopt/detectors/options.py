"""Whether a run is watched, and what happens when it is sick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WatchOptions:
    """What is done about a run that goes wrong."""

    # look for signs of trouble in every line of metrics and say them, each once; off says nothing. What is trained is
    # the same either way, unless on_sick acts
    watch: Literal["on", "off"] = "on"
    # when a run is found to be sick. warn: say so and go on; stop: end it there, with its weights saved as always; fix:
    # end it and train anew with the options that mend it, once, in OUT/fixed
    on_sick: Literal["warn", "stop", "fix"] = "warn"

    def __post_init__(self) -> None:
        if self.watch == "off" and self.on_sick != "warn":
            raise ValueError(f"on_sick={self.on_sick} needs watch=on, or nothing would find the run sick")
