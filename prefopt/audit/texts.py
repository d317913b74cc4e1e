"""Text that is not what it looks like: broken encodings, markup of another template, roles out of order."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import pairwise

from prefopt.audit.answers import ANSWERED, every
from prefopt.audit.check import Check, Finding, of_items, skipped
from prefopt.audit.table import Item, Table
from prefopt.data.columns import Message
from prefopt.evaluate.statistics import wilson

# UTF-8 read as Windows-1252 or Latin-1, replacement characters, control characters, escapes that were not read
BROKEN = re.compile(
    "\ufffd|[\u00c3\u00c2][\u0080-\u00bf]|\u00e2\u20ac|\u00e2[\u0080-\u00bf]{2}|\u00f0\u0178"
    "|[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f]|\\\\u00[89a-f][0-9a-f]|\\\\u20[01][0-9a-f]"
)
MARKUP = re.compile(
    r"<\|[a-z][\w ]{1,30}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|<(?:eos|bos|pad|unk)>|<\uff5c[^\uff5c]{1,30}\uff5c>"
    r"|^#{2,3} ?(?:Instruction|Response|Input):?[ \t]*$",
    re.MULTILINE,
)
LEADING = re.compile(
    r"\A\s*(?:\*\*)?(?:Assistant|AI|Bot|Response|Answer from (?:the )?model)(?:\*\*)?\s?:", re.IGNORECASE
)
FOREIGN = re.compile("[\u0370-\u1dff\u2c00-\u2dff\u3005-\ufaff]")  # letters beyond Latin
LETTERS = 40  # fewer say too little of a language


def broken(table: Table) -> Finding:
    """Rows with a trace of a wrong encoding in a prompt or an answer."""
    found = {}
    for number, item in enumerate(table.items):
        for name, text in [("prompt", item.asked), *every(item)]:
            if not text.isascii() or "\\u" in text or not text.isprintable():
                if match := BROKEN.search(text):
                    found[number] = f"{name}: {text[max(0, match.start() - 15) : match.end() + 15]!r}"
    return of_items(table, found)


def markup(table: Table) -> Finding:
    """Answers with the control tokens or headings of a chat template in their text."""
    found = {}
    for number, item in enumerate(table.items):
        for name, text in every(item):
            if ("<" in text or "[" in text or "##" in text) and (match := MARKUP.search(text)):
                found[number] = f"{name}: {match[0]!r}"
    return of_items(table, found)


def speaker(table: Table) -> Finding:
    """Answers that begin with the name of who speaks, or go on with the next speaker's turn."""
    found = {}
    for number, item in enumerate(table.items):
        handled = {n for n, spans in enumerate(item.record.asides) if spans}
        for place, (name, text) in enumerate(every(item)):
            lead = LEADING.match(text)
            turn = None if place in handled else re.search(r"\n\s*(?:Human|User)\s?:|\A\s*(?:Human|User)\s?:", text)
            if match := lead or turn:
                found[number] = f"{name}: {match[0].strip()!r}"
    return of_items(table, found)


def turns(table: Table) -> Finding:
    """Conversations whose roles are out of order, or with a turn that says nothing."""
    found = {}
    for number, item in enumerate(table.items):
        if why := _disorder(_messages(item)):
            found[number] = why
    return of_items(table, found)


def _messages(item: Item) -> list[Message]:
    record = item.record
    if isinstance(record.prompt, list):
        return record.prompt
    first = record.completions[0] if record.prompt is None and record.completions else None
    return first if isinstance(first, list) else []


def _disorder(messages: list[Message]) -> str:
    """What is wrong with the order of a conversation, or ""."""
    roles = [str(message["role"]) for message in messages]
    if "system" in roles[1:]:
        return f"a system turn at place {roles.index('system', 1) + 1}"
    spoken = [role for role in roles if role not in ("system", "developer")]
    for place, (before, after) in enumerate(pairwise(spoken), 1):
        if before == after and before == "user":
            return f"two user turns in a row, at {place} and {place + 1}"
        if before == after == "assistant" and not _calls(messages):
            return f"two assistant turns in a row, at {place} and {place + 1}"
    if spoken[:1] == ["assistant"]:
        return "starts with an assistant turn"
    blank = [n for n, turn in enumerate(messages, 1) if not str(turn["content"]).strip() and not turn.get("tool_calls")]
    return f"an empty turn at place {blank[0]}" if blank else ""


def _calls(messages: list[Message]) -> bool:
    return any(message.get("tool_calls") or message["role"] == "tool" for message in messages)


def edges(table: Table) -> Finding:
    """Prompts of plain text that end in a space or stick to the answer, where most rows do otherwise."""
    if not any(isinstance(item.record.prompt, str) for item in table.items):
        return skipped("the rows are messages: the chat template makes the boundary")
    forms = [_edge(item) for item in table.items]
    usual, count = Counter(form for form in forms if form).most_common(1)[0] if any(forms) else ("", 0)
    found = {}
    for number, form in enumerate(forms):
        if form == "space before the answer":
            found[number] = "the prompt ends in a space: put it at the start of the answer"
        elif form and form != usual and form != "line break" and count >= 0.9 * len(forms):
            found[number] = f"{form}, elsewhere {usual}"
    everywhere = len(found) > len(forms) // 2
    said = "most prompts end in a space, which tokenizers join with the word after it" if everywhere else ""
    return of_items(table, found, said)


def _edge(item: Item) -> str:
    """How a text prompt and its answers meet, in words; "" for other rows."""
    prompt = item.record.prompt
    if not isinstance(prompt, str) or not prompt.strip() or not item.answers:
        return ""
    if prompt[-1] in " \t":
        return "space before the answer"
    if prompt[-1] == "\n":
        return "line break"
    starts = {text[:1].isspace() for text in item.answers if text}
    if len(starts) > 1:
        return "one answer starts with a space and the other does not"
    return "the answer starts with a space" if starts == {True} else "no space between prompt and answer"


def uneven(table: Table) -> Finding:
    """Whether chosen and rejected answers differ in the white space they begin or end with."""
    sides = []
    for place in (0, 1):
        texts = [item.answers[place] for item in table.items]
        sides.append([sum(t != t.lstrip() for t in texts), sum(t != t.rstrip() for t in texts)])
    total = max(1, len(table.items))
    gaps = [abs(a - b) / total for a, b in zip(*sides, strict=True)]
    where = ("begins", "ends")[gaps.index(max(gaps))]
    place = gaps.index(max(gaps))
    said = f"{sides[0][place]:,} chosen and {sides[1][place]:,} rejected answers of {total:,}: white space {where} them"
    return Finding(fired=total >= 20 and max(gaps) > 0.1, measured=wilson(max(gaps) * total, total), said=said)


def script(table: Table) -> Finding:
    """Chosen answers in a script that neither their prompt nor the other answer is in."""
    found = {}
    for number, item in enumerate(table.items):
        # Latin answers to Latin prompts, nearly all of most sets, need no closer look
        if not any(map(FOREIGN.search, [item.asked, *item.answers])):
            continue
        own = [main_script(text) for text in item.answers]
        asked = main_script(item.asked)
        if asked and own and own[0] and own[0] != asked and asked not in own[:1] and own[0] not in (asked, *own[1:]):
            found[number] = f"{own[0].lower()} letters, prompt {asked.lower()}"
    return of_items(table, found)


def main_script(text: str) -> str:
    """The script of most of the first 400 letters; "" where they are fewer than 40. The Japanese scripts are one."""
    letters = [letter for letter in text[:2000] if letter.isalpha()][:400]
    if len(letters) < LETTERS:
        return ""
    counts = Counter(unicodedata.name(letter, "").split(" ")[0] for letter in letters)
    if counts["HIRAGANA"] + counts["KATAKANA"] > 0.1 * len(letters):
        return "JAPANESE"
    name, count = counts.most_common(1)[0]
    return name if count > 0.6 * len(letters) else ""


CHECKS = (
    Check(
        "broken-text",
        "warning",
        "rows with traces of a wrong encoding: replacement characters, UTF-8 read as Latin-1, control characters",
        "the model learns to write them",
        "read the source again as UTF-8; remove the rest with --remove broken-text",
        "byte sequences that no sound text has; rare names and examples of such text are flagged, too",
        broken,
    ),
    Check(
        "markup",
        "error",
        "answers with a chat template's control tokens or headings in their text",
        "the text was rendered once before: turns then end twice or in the wrong place, and the model writes markup",
        "give plain text or messages; remove the rest with --remove markup",
        "control tokens of the common templates",
        markup,
        kinds=ANSWERED,
    ),
    Check(
        "speaker",
        "warning",
        "answers that begin with who speaks (`Assistant:`), or go on with the user's next turn",
        "the model learns to write the label, or to talk to itself",
        "cut the label or the later turns off, or give messages",
        "wording at the start of a line",
        speaker,
        kinds=ANSWERED,
    ),
    Check(
        "turns",
        "warning",
        "conversations with two turns of one role in a row, a late system turn, or an empty turn",
        "some templates refuse them, others render what no user will ever send",
        "join or repair the turns; remove the rest with --remove turns",
        "the order that chat templates expect",
        turns,
    ),
    Check(
        "boundary",
        "warning",
        "text prompts that end in a space, or meet the answer otherwise than nine tenths of the rows do",
        "tokenizers join a space with the word after it: a prompt that ends in one is not what users send",
        "put the space at the start of the answer, in all rows alike",
        "byte-level and SentencePiece vocabularies have the space at a word's start",
        edges,
        kinds=(*ANSWERED,),
    ),
    Check(
        "uneven-space",
        "warning",
        "whether chosen and rejected answers begin or end with white space unequally often (10 %)",
        "one space decides the pair",
        "strip both sides alike",
        "10 percentage points: a rule of thumb, not measured",
        uneven,
        kinds=("pairs",),
        removal="never",
    ),
    Check(
        "script",
        "note",
        "answers to be learnt in a script that neither their prompt nor the other answer is in",
        "right for translations; else the model learns to switch languages",
        "read them; remove the wrong ones with --remove script",
        "most of the first 400 letters, where there are 40",
        script,
        kinds=("pairs", "demonstrations"),
    ),
)
