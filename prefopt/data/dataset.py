"""From a source to the examples an objective trains on, every dropped row counted."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from prefopt import streams
from prefopt.data.columns import Dropped, Record
from prefopt.data.convert import COMPARED, Kind, check, convert
from prefopt.data.read import Row, RowError, read, unread
from prefopt.data.shapes import KNOWN, Reader, grow
from prefopt.data.template import Encoder, Rendered
from prefopt.records import Example, InputError

ROWS_AT_ONCE = 1000

# options that only some kinds of data read
READ_FOR = {"train_on": ("demonstrations",), "ties": COMPARED, "step_separator": ("steps",)}


@dataclass(frozen=True)
class DataOptions:
    """How rows are read and turned into tokens."""

    # Column names that differ from the conventions, ours to the file's: {"chosen": "good"}.
    map: dict[str, str] | None = None
    # Count rows that are wrong and go on, instead of stopping at the first one.
    skip_bad: bool = False
    # Longest prompt + completion, in tokens; null for no limit.
    max_length: int | None = 1024
    # What happens to longer rows: drop them, or cut the end of the completion (never the prompt; no EOS is then added).
    overlong: Literal["drop", "truncate"] = "drop"
    # Tokens that demonstrations train on: what the assistant wrote in every turn; only its last reply (completion); or
    # all, prompt included (TRL's default on messages). Plain text without a prompt trains on all.
    train_on: Literal["assistant", "completion", "all"] = "assistant"
    # Jinja chat template, as a path or as text, instead of the tokenizer's own.
    chat_template: str | None = None
    # Rows whose completions all score the same, where one must be better: stop at the first, or drop and count them.
    ties: Literal["error", "drop"] = "error"
    # Text that ends every step of an answer that is labelled by steps; its last token carries the step's label. \n in
    # it stands for a line break.
    step_separator: str = r"\n"

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (a prompt token and an answer token), got {self.max_length}"
            )
        choices = {
            "overlong": ("drop", "truncate"),
            "train_on": ("assistant", "completion", "all"),
            "ties": ("error", "drop"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


@dataclass(frozen=True)
class Dataset:
    """Examples in file order, and how they came about.

    examples, rows: the same length and order. shape: the detected convention in words. dropped: reason -> rows.
    truncated: completions whose end was cut. notes: what reading and tokenisation met and handled, with counts.
    """

    examples: list[Example]
    rows: list[Record]
    shape: str
    kind: str
    source: str
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    notes: dict[str, int] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the token ids, order included."""
        return fingerprint(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def describe(self) -> str:
        """Lines for the log: what was found, what was dropped and why, how long the rows are."""
        lines = [f"{self.source}: {self.shape}", f"{len(self.examples):,} {self.kind}"]
        if self.dropped:
            lines.append(f"dropped {sum(self.dropped.values()):,}: " + _counts(self.dropped))
        if self.truncated:
            lines.append(f"truncated {self.truncated:,} completions at the end")
        lines += [f"{count:,} {note}" for note, count in self.notes.items() if count]
        lines.append("prompt tokens     " + _quantiles([len(example.prompt) for example in self.examples]))
        lengths = [len(tokens) for example in self.examples for tokens in example.completions]
        if self.kind in ("labels", "steps"):
            good, bad = _balance(self.examples)
            words = ("good", "bad") if self.kind == "labels" else ("right", "wrong")
            lines.append(f"{self.kind}: {good:,} {words[0]}, {bad:,} {words[1]}")
        if lengths:
            lines.append("completion tokens " + _quantiles(lengths))
            trained = sum(flag for example in self.examples for flags in example.trained for flag in flags)
            lines.append(f"trained on {trained:,} of {sum(example.num_tokens for example in self.examples):,} tokens")
        return "\n".join(lines)

    def show(self, tokenizer: Any, num: int = 3) -> str:
        """The first rows as the model sees them: special tokens spelt out, untrained parts of an answer in «».

        An answer that is labelled by steps has each on a line of its own.
        """
        blocks = []
        for number, example in enumerate(self.examples[:num]):
            lines = [f"--- row {number + 1} ({example.where})", f"prompt: {tokenizer.decode(example.prompt)!r}"]
            for tokens, flags, score in zip(example.completions, example.trained, example.scores, strict=True):
                lines.append(f"score {score:g}: {_marked(tokenizer, tokens, flags)}")
            lines += _shown_steps(tokenizer, example)
            blocks.append("\n".join(lines))
        return "\n".join(blocks)


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over every token id and sequence length, in order, as 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for example in examples:
        sequences = [example.prompt, *example.completions]
        digest.update(array("q", [len(sequences), *map(len, sequences)]).tobytes())
        for tokens in sequences:
            digest.update(array("q", tokens).tobytes())
    return digest.hexdigest()[:16]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items(), key=lambda item: -item[1]))


def _quantiles(lengths: list[int]) -> str:
    ordered = sorted(lengths)
    picked = [ordered[round(share * (len(ordered) - 1))] for share in (0, 0.5, 0.9, 0.99, 1)]
    return "shortest {}, median {}, 90 % {}, 99 % {}, longest {}".format(*picked)


def _marked(tokenizer: Any, tokens: list[int], flags: list[bool]) -> str:
    pieces, start = [], 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or flags[end] != flags[start]:
            text = tokenizer.decode(tokens[start:end])
            pieces.append(text if flags[start] else f"«{text}»")
            start = end
    return repr("".join(pieces))


def _shown_steps(tokenizer: Any, example: Example) -> list[str]:
    """A line for each labelled step: right or wrong, with the label where it is a share, and its tokens as text."""
    lines = []
    for tokens, labels in zip(example.completions, example.steps or [], strict=False):
        start = 0
        for end, label in enumerate(labels, 1):
            if not math.isnan(label):
                word = "right" if label > 0.5 else "wrong"
                word += "" if label in (0, 1) else f" ({label:g})"
                lines.append(f"  step {word}: {tokenizer.decode(tokens[start:end])!r}")
                start = end
    return lines


def _balance(examples: Sequence[Example]) -> tuple[int, int]:
    """How many labels are good and how many bad: of steps where answers have them, else of whole answers.

    A share counts as good above one half, as in the accuracy of a process reward model.
    """
    labels = [
        label
        for example in examples
        for own in (example.steps or [example.scores])
        for label in own
        if not math.isnan(label)
    ]
    good = sum(label > 0.5 for label in labels)
    return good, len(labels) - good


def load(
    source: str | Path,
    tokenizer: Any,
    kind: Kind,
    options: DataOptions = DataOptions(),
    held_out: bool = False,
    answer_tokens: int = 0,
) -> Dataset:
    """Read, understand and tokenise `source` for an objective whose `facts.data` is `kind`.

    kind "completions": every whole answer as it is, compared with none, to be scored; the result says what it holds.
    held_out: to evaluate on, so that labels may be of one class. answer_tokens: what a prompt must leave of max_length
    for an answer that is yet to be written.
    InputError, as `file:line: what was found; what to do`, at the first bad row (unless `skip_bad`), where the data
    cannot serve as `kind`, where an option is given that such data does not read, where labels to train on are of one
    class, or where nothing is left.
    """
    _refuse_unread(options, kind)
    separator = options.step_separator.replace(r"\n", "\n")
    encoder = Encoder(tokenizer, options.chat_template, options.train_on, step_separator=separator)
    counts: Counter[str] = Counter()
    reader = Reader(chat=encoder.has_template, whole=kind == "prompts")
    records = list(_records(source, reader, kind, options, counts))
    shape = reader.shape
    if shape is None:
        raise InputError(f"{source}: no row could be read ({_counts(counts)})")
    if not encoder.has_template and any(_conversational(record) for record in records):
        todo = "give one with chat_template=FILE.jinja, or data as text"
        raise InputError(
            f"{source}: the rows are conversations ({reader.how}), and the tokenizer has no chat template; {todo}"
        )
    examples, rows, truncated = _encode(records, encoder, kind, options, counts, answer_tokens)
    if not examples:
        raise InputError(f"{source}: every row was dropped ({_counts(counts)}); see max_length and the data")
    if kind == "labels" and not held_out:
        _refuse_one_class(examples, source, counts)
    notes = reader.notes + encoder.notes
    if left := unread(source):
        notes[f"files left out, not of the split train ({', '.join(left)}); add @NAME to the path for them"] = len(left)
    held = shape.kind if kind == "completions" else kind
    return Dataset(examples, rows, reader.how, held, str(source), dict(counts), truncated, dict(notes))


def read_prompts(source: str | Path, options: DataOptions = DataOptions()) -> tuple[list[Record], str, dict[str, int]]:
    """The prompts of `source` as text or messages, for who needs no tokens; its shape in words; dropped rows by reason.

    InputError as `load` has it.
    """
    _refuse_unread(options, "prompts")
    counts: Counter[str] = Counter()
    reader = Reader(chat=True, whole=True)
    records = list(_records(source, reader, "prompts", options, counts))
    if reader.shape is None:
        raise InputError(f"{source}: no row could be read ({_counts(counts)})")
    return records, reader.how, dict(counts)


def _refuse_unread(options: DataOptions, kind: Kind) -> None:
    """InputError, naming the option, where one is changed that `kind` does not read; what is to be scored reads all."""
    for name, kinds in READ_FOR.items():
        if kind != "completions" and kind not in kinds and getattr(options, name) != getattr(DataOptions, name):
            raise InputError(
                f"{name}={getattr(options, name)} is read for {' and '.join(kinds)} only, and this objective trains on "
                f"{kind}; leave it out"
            )


def _refuse_one_class(examples: list[Example], source: str | Path, counts: Counter[str]) -> None:
    """InputError, naming the class that is missing, unless some answers are good and some bad."""
    good, bad = _balance(examples)
    if good and bad:
        return
    found, missing = ("good", "bad") if good else ("bad", "good")
    todo = "add bad ones, or train sft on the good ones" if good else "add good ones"
    left_out = f" (left out: {_counts(counts)})" if counts else ""
    raise InputError(
        f"{source}: all {good + bad:,} answers are labelled {found} and none {missing}{left_out}; an objective on "
        f"labels needs both: {todo}"
    )


def _conversational(record: Record) -> bool:
    return any(isinstance(text, list) for text in [record.prompt, *record.completions])


def _records(
    source: str | Path, reader: Reader, kind: Kind, options: DataOptions, counts: Counter[str]
) -> Iterator[Record]:
    """The records of every good row; bad rows raise, or are counted under skip_bad."""
    for row in _rows(source, options, counts):
        try:
            found = reader.records(row)
            if reader.shape and row.where == reader.first:
                check(reader.shape, kind, str(source))
        except RowError as error:
            _refuse(error, options, counts)
            continue
        except Dropped as why:
            counts[str(why)] += 1
            continue
        for record in found:
            yield from _converted(record, reader, kind, options, counts)


def _converted(
    record: Record, reader: Reader, kind: Kind, options: DataOptions, counts: Counter[str]
) -> Iterator[Record]:
    assert reader.shape
    try:
        for item in convert(record, reader.shape, kind, options.ties):
            if isinstance(item, Dropped):
                counts[str(item)] += 1
            else:
                yield item
    except RowError as error:
        _refuse(error, options, counts)


def _refuse(error: RowError, options: DataOptions, counts: Counter[str]) -> None:
    if not options.skip_bad:
        raise error
    counts[error.reason] += 1


def _rows(source: str | Path, options: DataOptions, counts: Counter[str]) -> Iterator[Row]:
    """Good rows with their columns renamed; messages of a tree, one per row, are gathered first."""
    loose: list[Row] = []
    for item in read(source):
        if isinstance(item, RowError):
            _refuse(item, options, counts)
            continue
        try:
            row = rename(item, options.map) if options.map else item
        except RowError as error:
            _refuse(error, options, counts)
            continue
        if {"message_id", "parent_id", "text"} <= row.values.keys() and "replies" not in row.values:
            loose.append(row)
        else:
            yield row
    for item in grow(loose):
        if isinstance(item, RowError):
            _refuse(item, options, counts)
        else:
            yield item


def rename(row: Row, names: dict[str, str]) -> Row:
    """The row with the user's column names turned into ours.

    InputError, naming the nearest, where ours is unknown; RowError, likewise, where the row lacks theirs.
    """
    for ours, theirs in names.items():
        if ours not in KNOWN:
            raise InputError(f"map: {ours!r} is not a column this program reads; {_nearest(ours, KNOWN)}")
        if theirs not in row.values:
            raise RowError(row.where, f"map names column {theirs!r}, which the row lacks", _nearest(theirs, row.values))
    taken = set(names.values())
    kept = {key: value for key, value in row.values.items() if key not in taken}
    return replace(row, values={**kept, **{ours: row.values[theirs] for ours, theirs in names.items()}})


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else f"the names are {', '.join(sorted(known))}"


def _encode(
    records: list[Record],
    encoder: Encoder,
    kind: Kind,
    options: DataOptions,
    counts: Counter[str],
    answer_tokens: int = 0,
) -> tuple[list[Example], list[Record], int]:
    """Tokenised rows that fit, and how many completions were cut."""
    examples, rows, truncated = [], [], 0
    with _progress(len(records)) as advance:
        for start in range(0, len(records), ROWS_AT_ONCE):
            rendered = list(_render(records[start : start + ROWS_AT_ONCE], encoder, kind, options, counts))
            for item, example in zip(rendered, encoder.encode(rendered), strict=True):
                if isinstance(example, RowError):
                    _refuse(example, options, counts)
                    continue
                try:
                    fitted, cut = fit(example, options, answer_tokens)
                    if kind != "completions":
                        _refuse_equal(fitted, bool(cut))
                except Dropped as why:
                    counts[str(why)] += 1
                    continue
                examples.append(fitted)
                rows.append(item.record)
                truncated += cut
            advance(min(ROWS_AT_ONCE, len(records) - start))
    return examples, rows, truncated


def _render(
    records: list[Record], encoder: Encoder, kind: Kind, options: DataOptions, counts: Counter[str]
) -> Iterator[Rendered]:
    for record in records:
        try:
            yield encoder.render(record, kind)
        except RowError as error:
            _refuse(error, options, counts)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar on a terminal, for sources big enough to wait for; otherwise nothing."""
    if total <= 2 * ROWS_AT_ONCE or not streams.is_terminal():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=streams.errors()), transient=True) as bar:
        task = bar.add_task("tokenising", total=total)
        yield lambda count: bar.advance(task, count)


def fit(example: Example, options: DataOptions, answer_tokens: int = 0) -> tuple[Example, int]:
    """The example within max_length, and how many completions were cut. Dropped, with the reason, if it cannot be.

    answer_tokens: what the prompt must leave for an answer that is yet to be written.
    """
    limit, room = options.max_length, None
    if limit is not None:
        room = limit - len(example.prompt)
        if room < max(answer_tokens, min(1, len(example.completions))):
            wanted = f"less than {answer_tokens} tokens" if answer_tokens > 1 else "no room"
            raise Dropped(f"prompt leaves {wanted} in max_length {limit}")
    cut = 0
    if room is not None and any(len(tokens) > room for tokens in example.completions):
        if options.overlong == "drop":
            raise Dropped(f"longer than max_length {limit}")
        cut = sum(len(tokens) > room for tokens in example.completions)
        example = _cut(example, room)
    if not all(any(flags) for flags in example.trained):
        raise Dropped("no token left to train on" + (" after truncation" if cut else ""))
    return example, cut


def _refuse_equal(example: Example, cut: bool) -> None:
    """Dropped if completions that are to be compared are the same tokens."""
    if len(example.completions) > 1 and all(tokens == example.completions[0] for tokens in example.completions):
        which = "chosen and rejected" if len(example.completions) == 2 else "all rated completions"
        raise Dropped(f"{which} are equal" + (" after truncation" if cut else " as tokens"))


def _cut(example: Example, room: int) -> Example:
    """The first `room` tokens of each completion; of one labelled by steps, its whole steps within them.

    Dropped if not one step is whole. The score of what is left is that of its steps.
    """
    steps, scores = None, example.scores
    if example.steps:
        ends = [number for number, label in enumerate(example.steps[0][:room]) if not math.isnan(label)]
        if not ends:
            raise Dropped("no whole step left after truncation")
        room = ends[-1] + 1
        steps = [example.steps[0][:room]]
        scores = [min(label for label in steps[0] if not math.isnan(label))]
    tokens, flags = [t[:room] for t in example.completions], [f[:room] for f in example.trained]
    return replace(example, completions=tokens, trained=flags, scores=scores, steps=steps)


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, about `fraction` of them held out, rows with the same prompt on one side.

    A pure function of (prompts, fraction, seed). InputError if either side would be empty.
    """
    if not 0 < fraction < 1:
        raise InputError(f"a held-out fraction must lie between 0 and 1, got {fraction}")
    groups: dict[str, list[int]] = {}
    for number, record in enumerate(dataset.rows):
        groups.setdefault(prompt_key(record), []).append(number)
    if len(groups) < 2:
        raise InputError(
            f"{dataset.source}: all rows have one prompt, so none can be held out; give held-out data in a file"
        )
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted, held = max(1, round(fraction * len(dataset))), set(order[0])
    for members in order[1:-1]:
        if len(held) >= wanted:
            break
        held.update(members)
    sides = [[n for n in range(len(dataset)) if (n in held) is side] for side in (False, True)]
    train, test = (
        replace(dataset, examples=[dataset.examples[n] for n in side], rows=[dataset.rows[n] for n in side])
        for side in sides
    )
    return train, replace(test, dropped={}, truncated=0, notes={})


def prompt_key(record: Record) -> str:
    """What rows of one prompt share: the prompt, or a conversation up to its first answer, or a whole text."""
    prompt: Any = record.prompt
    if not prompt:
        text = record.completions[0] if record.completions else ""
        prompt = text
        if isinstance(text, list):
            first = next((n for n, item in enumerate(text) if item["role"] == "assistant"), 0)
            prompt = text[:first] or text
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)
