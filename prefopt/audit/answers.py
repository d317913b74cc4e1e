"""Answers that are no answers: empty, cut off, refused, a formula, a loop, a placeholder, an echo of the prompt."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator

from prefopt.audit import words
from prefopt.audit.check import Check, Finding, of_items, of_rows
from prefopt.audit.table import EMPTY, Item, Table

REFUSAL = re.compile(
    r"^\W*(?:(?:(?:i'?m|i am|we'?re|we are)\s+(?:very |so |really |truly )?(?:sorry|afraid)|sorry|unfortunately"
    r"|my apologies|i apologi[sz]e|as an? (?:ai|artificial|large|language)[\w\s-]{0,40}?)\b[^.!?\n]{0,60}?)?"
    r"\b(?:i|we)\s*(?:(?:am|are|'?m|'?re)\s+(?:not able|unable|not allowed|not permitted|not programmed)"
    r"|can'?t|cannot|can not|could not|couldn'?t|won'?t|will not|must decline|have to decline"
    r"|(?:don'?t|do not) have (?:the )?(?:ability|capabilit|access|information))",
    re.IGNORECASE,
)
FORMULA = re.compile(
    r"\bas an? (?:ai|artificial intelligence|large language|language)(?: language)?(?: model| assistant)?\b"
    r"|\bmy (?:knowledge cut-?off|training data)\b|\bi(?:'?m| am) (?:just |only )?an? (?:ai\b|language model)"
    r"|\b(?:i was|i am) (?:trained|created|developed) by (?:openai|anthropic|google|meta|mistral|microsoft|alibaba)\b",
    re.IGNORECASE,
)
PLACEHOLDER = re.compile(
    r"\A\W*(?:n/?a|null|none|nan|undefined|todo|tbd|xxx+|test|placeholder|no (?:answer|response|output)"
    r"|(?:internal server )?error|(?:request )?time(?:d )?out|rate limit (?:exceeded|reached))\W*\Z"
    r"|\blorem ipsum\b|\A\W*\Z|\[(?:insert|your) (?:answer|response|text|output)[^\]]*\]",
    re.IGNORECASE,
)
SHORT = 15  # words: a shorter answer may well end without a full stop
SHORTEST = 60  # characters: a longer answer is no bare placeholder
LOOP = 0.5  # share of runs of four words that were there before in the answer
PACKED = 0.12  # a text that deflates to less than this is mostly repetition
REFUSED_WORDS = 60  # a longer answer that begins with a refusal usually goes on to help


def empty(table: Table) -> Finding:
    """Rows with an answer of nothing but white space."""
    return of_rows({fault.line: fault.reason for fault in table.faults if fault.reason in EMPTY})


def wrong(table: Table) -> Finding:
    """Rows that training would stop at, with the message it would give."""
    faults = [*table.faults, *table.token_faults]
    return of_rows({fault.line: fault.message.partition(": ")[2] for fault in faults if fault.wrong})


def no_prompt(table: Table) -> Finding:
    """Rows whose prompt is empty."""
    if table.kind == "demonstrations" and all(not item.asked.strip() for item in table.items):
        return Finding(said="rows are whole texts, without prompts")
    return of_items(table, {n: "" for n, item in enumerate(table.items) if not item.asked.strip()})


def better(item: Item) -> list[tuple[str, str]]:
    """The completions a model is taught to write, each with its name."""
    if len(item.answers) == 1:
        return [("answer", item.answers[0])] if item.record.scores[:1] != [0.0] else []
    top = max(item.record.scores, default=0.0)
    names = ["chosen", "rejected"] if len(item.answers) == 2 else [f"answer {n + 1}" for n in range(len(item.answers))]
    return [(n, a) for n, a, s in zip(names, item.answers, item.record.scores, strict=False) if s == top]


def every(item: Item) -> Iterator[tuple[str, str]]:
    """All completions, each with its name."""
    names = {1: ["answer"], 2: ["chosen", "rejected"]}.get(len(item.answers))
    yield from zip(names or [f"answer {n + 1}" for n in range(len(item.answers))], item.answers, strict=True)


def truncated(table: Table) -> Finding:
    """Answers to be learnt that stop in the middle of a sentence."""
    found = {}
    for number, item in enumerate(table.items):
        for name, text in better(item):
            if is_cut(text):
                found[number] = f"{name} ends: ...{words.folded(text)[-40:]}"
    return of_items(table, found)


def is_cut(text: str) -> bool:
    """Whether prose stops in mid-sentence: the last line is of several words, ends in a small letter or a comma, and
    other sentences of the text end as sentences do. Lists, verses, code and tables have their own ends.
    """
    tail = text.rstrip()
    if not tail or not (tail[-1].islower() or tail[-1] in ",;"):
        return False
    if len(text.split()) < SHORT or "```" in text or "/" in tail.split()[-1]:  # code, an address
        return False
    last = tail.rsplit("\n", 1)[-1]
    if len(last.split()) < 6 or re.match(r"\s*(?:[-*•#|>]|\(?[\dA-Za-z]{1,3}[.)]|[^\s:]{1,30}:)\s", last):
        return False
    return bool(re.search(r"[.!?\u2026\u3002\uff01\uff1f]\W*\s", text))


def refused(table: Table) -> Finding:
    """Answers to be learnt that are a short refusal, where the other answer of a pair is none."""
    found, every_one = {}, 0
    for number, item in enumerate(table.items):
        for name, text in better(item):
            if is_refusal(text):
                every_one += 1
                others = [other for label, other in every(item) if label != name]
                if not others or not all(map(is_refusal, others)):
                    found[number] = f"{name}: {words.folded(text)[:60]}"
    share = 100 * every_one / max(1, len(table.items))
    return of_items(table, found, f"{share:.1f} % of the answers to be learnt are short refusals")


def is_refusal(text: str) -> bool:
    """Whether an answer says in few words that it will not answer."""
    return REFUSAL.search(straight(text[:200])) is not None and len(text.split()) <= REFUSED_WORDS


def straight(text: str) -> str:
    """The text with typewriter's apostrophes, as the patterns have them."""
    return text.replace("\u2019", "'")


def formula(table: Table) -> Finding:
    """Answers to be learnt in which a model speaks of being a model."""
    found = {}
    for number, item in enumerate(table.items):
        for name, text in better(item):
            if match := FORMULA.search(straight(text)):
                found[number] = f"{name}: {match[0]}"
    return of_items(table, found)


def placeholder(table: Table) -> Finding:
    """Answers that stand for one that failed to be made."""
    found = {}
    for number, item in enumerate(table.items):
        for name, text in every(item):
            if not text.strip() or (len(text) > SHORTEST and "[" not in text and "orem" not in text):
                continue
            if match := PLACEHOLDER.search(text):
                found[number] = f"{name}: {words.folded(match[0])[:40] or words.folded(text)[:40]}"
    return of_items(table, found)


def loop(table: Table) -> Finding:
    """Answers to be learnt that say the same over and over."""
    found = {}
    for number, item in enumerate(table.items):
        for name, text in better(item):
            if len(text) >= 200 and repeats(text):
                found[number] = f"{name}: ...{words.folded(text)[-40:]}"
    return of_items(table, found)


def repeats(text: str) -> bool:
    """Whether half of the runs of four words were there before, or the text deflates to an eighth and less."""
    own = text.split()
    if len(own) >= 30:
        seen = {tuple(own[n : n + 4]) for n in range(len(own) - 3)}
        if 1 - len(seen) / (len(own) - 3) > LOOP:
            return True
    data = text.encode("utf-8", "replace")
    return len(zlib.compress(data)) < PACKED * len(data)


def stock(table: Table) -> Finding:
    """One answer to be learnt for many different prompts: at least five, and 1 % of the rows."""
    taught = [
        (number, name, dict(zip(item.answers, table.answer_keys[number], strict=True))[text])
        for number, item in enumerate(table.items)
        for name, text in better(item)
    ]
    asked: dict[str, set[str]] = defaultdict(set)
    for number, _, key in taught:
        asked[key].add(table.keys[number])
    least = max(5, 0.01 * len(table.items))
    many = {key for key, prompts in asked.items() if len(prompts) >= least and len(key.split()) >= 3}
    found = {n: f"{name} answers {len(asked[key])} prompts: {key[:50]}" for n, name, key in taught if key in many}
    return of_items(table, found)


def echo(table: Table) -> Finding:
    """Answers that begin with their whole prompt: the prompt was not cut off."""
    found = {}
    for number, item in enumerate(table.items):
        key = _last_turn(table.keys[number])
        if len(key) >= 20:
            for (name, _), text in zip(every(item), table.answer_keys[number], strict=True):
                if text.startswith(key):
                    found[number] = f"{name} begins with the prompt"
    return of_items(table, found)


def _last_turn(key: str) -> str:
    """What was asked last; of messages as one text, without its role."""
    at = key.rfind("user: ")
    return key[at + len("user: ") :] if at >= 0 else key


def opening(table: Table) -> Finding:
    """One beginning of three words that opens most chosen answers and few rejected ones, or the other way round."""
    sides: list[Counter[tuple[str, ...]]] = [Counter(), Counter()]
    for chosen, rejected in table.answer_keys:
        for side, text in zip(sides, (chosen, rejected), strict=True):
            side[tuple(text.lower().split(maxsplit=3)[:3])] += 1
    total = len(table.items)
    gaps = [(abs(sides[0][start] - sides[1][start]) / total, start) for start in {*sides[0], *sides[1]}]
    gap, start = max(gaps, default=(0.0, ()))
    said = f"{' '.join(start)!r} opens {sides[0][start]:,} chosen and {sides[1][start]:,} rejected of {total:,}"
    return Finding(fired=total >= 50 and gap > 0.2, said=said)


LEARNT = ("pairs", "labels", "demonstrations")
ANSWERED = (*LEARNT, "ratings")
CHECKS = (
    Check(
        "wrong-row",
        "error",
        "rows that training would stop at",
        "a run ends at the first, or leaves them out with skip_bad",
        "repair each as its message says, or remove them with --remove wrong-row",
        "the reader of `prefopt train`",
        wrong,
    ),
    Check(
        "empty",
        "error",
        "rows with an empty answer",
        "nothing can be learnt of it; a pair with one teaches to say nothing, or only that (training drops them)",
        "remove them (--fix does)",
        "the reader of `prefopt train`",
        empty,
        kinds=(*ANSWERED, "steps"),
        removal="safe",
    ),
    Check(
        "no-prompt",
        "warning",
        "rows with an empty prompt",
        "the answer is learnt as an answer to nothing, behind BOS",
        "give the prompt, or remove them with --remove no-prompt",
        "white space alone",
        no_prompt,
    ),
    Check(
        "cut-off",
        "warning",
        "answers to be learnt that stop in the middle of a sentence",
        "an end token follows, so the model learns to stop there",
        "make them anew with a larger limit, or remove them with --remove cut-off",
        "a small letter or comma at the end of prose of 15 words or more; read by hand on real sets",
        truncated,
        kinds=LEARNT,
    ),
    Check(
        "refused",
        "warning",
        "short refusals that are to be learnt, where the other answer of the pair is none",
        "right where the prompt is harmful; elsewhere the model learns to refuse what it could do",
        "read them: keep those to harmful prompts, remove the rest with --remove refused",
        "wording, 60 words at most; whether a refusal is right it cannot tell",
        refused,
        kinds=LEARNT,
    ),
    Check(
        "formula",
        "warning",
        "answers to be learnt in which a model speaks of being a model, or of who made it",
        "phrases of the model that wrote the data become this model's, its maker's name included",
        "rewrite them, or remove them with --remove formula",
        "wording",
        formula,
        kinds=LEARNT,
    ),
    Check(
        "placeholder",
        "warning",
        "answers that are a placeholder or an error message",
        "they come from a step that failed, and are learnt as answers",
        "make them anew, or remove them with --remove placeholder",
        "wording",
        placeholder,
        kinds=ANSWERED,
    ),
    Check(
        "loop",
        "warning",
        "answers to be learnt that say the same over and over",
        "repetition is learnt quickly and spreads",
        "remove them with --remove loop",
        "half of all runs of four words there before, or deflating to 12 %; beyond all but a few answers of real sets",
        loop,
        kinds=LEARNT,
    ),
    Check(
        "stock-answer",
        "warning",
        "answers to be learnt that answer at least five prompts and 1 % of them",
        "the model learns to give that answer whatever is asked",
        "keep a few of each, or remove them with --remove stock-answer",
        "a rule of thumb, not measured",
        stock,
        kinds=LEARNT,
    ),
    Check(
        "echo",
        "warning",
        "answers that begin with their whole prompt",
        "the prompt was not cut off, so the model learns to repeat what it is asked",
        "cut the prompt off, or leave the column prompt out, so that it is found where answers begin to differ",
        "equality, for prompts of 20 characters and more",
        echo,
        kinds=LEARNT,
    ),
    Check(
        "opening",
        "warning",
        "whether one opening of three words is much more frequent among chosen or among rejected answers (20 %)",
        "three words then decide the pair, and what follows is hardly learnt (hollow margin)",
        "drop the opening from both, or write the other side anew",
        "20 percentage points: a rule of thumb, not measured",
        opening,
        kinds=("pairs",),
        removal="never",
    ),
)
