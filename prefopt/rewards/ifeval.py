"""Checks of instructions that a program can verify, under their usual names: does the text follow this one?

Zhou et al. 2023, arXiv:2311.07911 (IFEval); the rules are those of its public checker except where a check says
otherwise. Every check is linear in the text.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from prefopt.records import text_of
from prefopt.rewards.channel import Reasoned, short

OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")

ENDS = ".!?\u3002\uff01\uff1f\u2026"  # of a sentence, in East Asian width too
CLOSING = "\"'\u201d\u2019)]*"  # what may stand between that and the next sentence

# a full stop after these ends no sentence
ABBREVIATIONS = {
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "st",
    "sr",
    "jr",
    "vs",
    "etc",
    "inc",
    "ltd",
    "no",
    "e.g",
    "i.e",
    "approx",
}

# Languages whose letters are (nearly) theirs alone, by the first words of those letters' Unicode names. Others share
# their script, so that letters cannot tell them.
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    "bn": ("BENGALI",),
    "el": ("GREEK",),
    "gu": ("GUJARATI",),
    "he": ("HEBREW",),
    "hy": ("ARMENIAN",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ka": ("GEORGIAN",),
    "km": ("KHMER",),
    "kn": ("KANNADA",),
    "ko": ("HANGUL",),
    "lo": ("LAO",),
    "ml": ("MALAYALAM",),
    "or": ("ORIYA",),
    "pa": ("GURMUKHI",),
    "si": ("SINHALA",),
    "ta": ("TAMIL",),
    "te": ("TELUGU",),
    "th": ("THAI",),
    "zh": ("CJK",),
}

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}


class Unknown(ValueError):
    """An instruction that cannot be checked here."""


def instruction(name: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return add


def follow(
    completions: Sequence[Any],
    instruction_id_list: Sequence[Sequence[str]] | None = None,
    kwargs: Sequence[Sequence[Mapping[str, Any]]] | None = None,
    ifeval_score: Literal["all", "share"] = "all",
    **columns: Any,
) -> list[Reasoned]:
    """Whether each completion follows its row's instructions: 1 or 0 for all of them, or the share of them.

    The columns are IFEval's: names, and for each its arguments. An instruction that is not known, or whose arguments
    are not its own, gives None.
    """
    scores = []
    for position, completion in enumerate(completions):
        names = instruction_id_list[position] if instruction_id_list else None
        given = kwargs[position] if kwargs else None
        scores.append(_follow(text_of(completion), names, given, ifeval_score))
    return scores


def _follow(text: str, names: Any, given: Any, score: str) -> Reasoned:
    if not names:
        return Reasoned(None, "the row has no instruction_id_list")
    if given is None:
        given = [{}] * len(names)
    if len(given) != len(names):
        return Reasoned(None, f"{len(names)} instructions but kwargs for {len(given)}")
    try:
        followed = [check(name, text, arguments or {}) for name, arguments in zip(names, given, strict=True)]
    except Unknown as error:
        return Reasoned(None, str(error))
    missed = [name for name, right in zip(names, followed, strict=True) if not right]
    value = sum(followed) / len(followed) if score == "share" else float(not missed)
    return Reasoned(value, "not followed: " + ", ".join(missed) if missed else "")


def check(name: str, text: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `text` follows one instruction. An empty text follows none. Unknown if it cannot be checked.

    Arguments that are None are left out: data sets with one schema for all rows hold them.
    """
    found = CHECKS.get(name)
    if found is None:
        raise Unknown(f"instruction {name!r} is not known here")
    given = {key: value for key, value in arguments.items() if value is not None}
    if not text.strip():
        return False
    try:
        return bool(found(text, **given))
    except Unknown:
        raise
    except TypeError as error:
        raise Unknown(f"instruction {name!r} with {short(given)}: {error}") from None


def compared(number: int, relation: str, than: int) -> bool:
    if relation == "at least":
        return number >= than
    if relation == "less than":
        return number < than
    raise Unknown(f"relation {relation!r} is neither 'at least' nor 'less than'")


# ---------------------------------------------------------------- words


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


@instruction("keywords:existence")
def has_keywords(text: str, keywords: Sequence[str]) -> bool:
    """Each stands in the text, in any case, also inside a word. Taken as text, not as a pattern."""
    lower = text.lower()
    return all(keyword.lower() in lower for keyword in keywords)


@instruction("keywords:frequency")
def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return compared(text.lower().count(keyword.strip().lower()), relation, frequency)


@instruction("keywords:forbidden_words")
def no_forbidden_words(text: str, forbidden_words: Sequence[str]) -> bool:
    """None stands in the text as a word of its own, in any case."""
    return not any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) for word in forbidden_words)


@instruction("keywords:letter_frequency")
def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return compared(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


@instruction("length_constraints:number_words")
def number_of_words(text: str, num_words: int, relation: str) -> bool:
    return compared(len(words(text)), relation, num_words)


@instruction("change_case:capital_word_frequency")
def capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    """Words that are all capital letters; "I" and "A" are."""
    found = sum(word.isupper() for word in re.findall(r"\w+(?:['\u2019-]\w+)*", text))
    return compared(found, capital_relation, capital_frequency)


# ---------------------------------------------------------------- sentences and paragraphs


def sentences(text: str) -> int:
    """Sentences: runs of text that end with `.`, `!`, `?` or their like, a line end after one, or the end.

    Not after a common abbreviation, an initial or a number, and not before a small letter. An approximation, as
    every counter of sentences is: IFEval's own takes a trained model.
    """
    count = 0
    for block in re.split(r"\n\s*\n", text):
        pieces = re.split(rf"(?<=[{ENDS}])[{re.escape(CLOSING)}]*\s+", block.strip())
        open_piece = False
        for piece, after in zip(pieces, [*pieces[1:], ""], strict=True):
            if not re.search(r"\w", piece):
                continue
            open_piece = not _ends(piece, after)
            count += not open_piece
        count += open_piece
    return count


def _ends(piece: str, after: str) -> bool:
    if not after:
        return True
    last = piece.split()[-1].rstrip(CLOSING)
    if last.endswith(".") and not last.endswith(".."):
        bare = last[:-1].lstrip("(\"'\u201c")
        if bare.lower() in ABBREVIATIONS or (len(bare) == 1 and bare.isalpha() and bare.isupper() and bare != "I"):
            return False
        if bare.isdigit() and piece.strip() == last:  # the number of an item in a list
            return False
    return not after[0].islower()


@instruction("length_constraints:number_sentences")
def number_of_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return compared(sentences(text), relation, num_sentences)


@instruction("length_constraints:number_paragraphs")
def number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly so many, divided by `***`; one that is empty counts as wrong except at the start and the end."""
    found = [paragraph.strip() for paragraph in text.split("***")]
    if not found[0]:
        found = found[1:]
    if found and not found[-1]:
        found = found[:-1]
    return all(found) and len(found) == num_paragraphs


@instruction("length_constraints:nth_paragraph_first_word")
def first_word_of_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Exactly so many paragraphs, divided by an empty line, and one starts with this word, in any case."""
    found = [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]
    if len(found) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    first = re.split(r"[.,?!'\"]", found[nth_paragraph - 1].split()[0].lstrip("'\""))[0]
    return first.lower() == first_word.lower()


# ---------------------------------------------------------------- form


@instruction("detectable_format:json_format")
def is_json(text: str) -> bool:
    """All of it is one JSON value, perhaps in a fence of backticks. What is nested too deep to read is not."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        if text.startswith(fence):
            text = text.removeprefix(fence)
            break
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


@instruction("detectable_format:title")
def has_title(text: str) -> bool:
    """A title in double angle brackets, such as <<poem of joy>>."""
    for line in text.splitlines():
        title, closed, _ = line.partition("<<")[2].rpartition(">>")
        if closed and title.strip("<> "):
            return True
    return False


@instruction("detectable_format:number_bullet_lists")
def number_of_bullets(text: str, num_bullets: int) -> bool:
    """Exactly so many lines that start with `*` (not `**`) or `-`."""
    return len(re.findall(r"^[^\S\n]*(?:-|\*[^*\n])", text, re.MULTILINE)) == num_bullets


@instruction("detectable_format:number_highlighted_sections")
def number_of_highlights(text: str, num_highlights: int) -> bool:
    """At least so many of *this* or **this**, each once and on one line."""
    marked = re.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", text)
    return sum(bool(each.strip("* ")) for each in marked) >= num_highlights


@instruction("detectable_format:multiple_sections")
def number_of_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least so many marks of a section, such as `Section 1`."""
    return len(re.findall(re.escape(section_spliter.strip()) + r"\s?\d+", text)) >= num_sections


@instruction("detectable_format:constrained_response")
def is_one_of_the_options(text: str) -> bool:
    """One of the three options stands in it, and no other."""
    return sum(option in text for option in OPTIONS) == 1


@instruction("detectable_content:number_placeholders")
def number_of_placeholders(text: str, num_placeholders: int) -> bool:
    """At least so many of [this], on one line."""
    return len(re.findall(r"\[[^\[\]\n]*\]", text)) >= num_placeholders


@instruction("detectable_content:postscript")
def has_postscript(text: str, postscript_marker: str) -> bool:
    """The marker stands in the text, in any case, its dots perhaps with a space between: `p. s.`."""
    letters = [re.escape(letter) for letter in postscript_marker.strip().lower().replace(" ", "")]
    return re.search(r"\s?".join(letters), text.lower()) is not None


@instruction("punctuation:no_comma")
def no_comma(text: str) -> bool:
    return "," not in text


@instruction("startend:quotation")
def is_quoted(text: str) -> bool:
    """All of it stands in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


@instruction("startend:end_checker")
def ends_with(text: str, end_phrase: str) -> bool:
    """The last words are these, in any case, perhaps before a closing quotation mark."""
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@instruction("combination:two_responses")
def are_two_responses(text: str) -> bool:
    """Two different ones with `******` between them."""
    found = [response.strip() for response in text.split("******")]
    if not found[0]:
        found = found[1:]
    if found and not found[-1]:
        found = found[:-1]
    return len(found) == 2 and all(found) and found[0] != found[1]


@instruction("combination:repeat_prompt")
def repeats_the_prompt(text: str, prompt_to_repeat: str) -> bool:
    """It starts with the request, word for word, in any case."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


# ---------------------------------------------------------------- case and language


def _latin(text: str) -> bool:
    letters = [letter for letter in text if letter.isalpha()]
    return all(letter.isascii() or "LATIN" in unicodedata.name(letter, "") for letter in letters)


@instruction("change_case:english_capital")
def is_english_capitals(text: str) -> bool:
    """No small letter and at least one capital. English is not recognised: Latin letters are asked for."""
    return text.isupper() and _latin(text)


@instruction("change_case:english_lowercase")
def is_english_lowercase(text: str) -> bool:
    """No capital letter and at least one small one. English is not recognised: Latin letters are asked for."""
    return text.islower() and _latin(text)


@instruction("language:response_language")
def is_in_language(text: str, language: str) -> bool:
    """Nine of ten letters are of the language's own script. Unknown for a language that shares its script."""
    scripts = SCRIPTS.get(language.partition("-")[0])
    if scripts is None:
        raise Unknown(f"language {language!r} shares its script with others, so its letters cannot tell it")
    letters = [unicodedata.name(letter, "") for letter in text if letter.isalpha()]
    own = sum(name.startswith(scripts) for name in letters)
    kana = language != "ja" or any(name.startswith(scripts[:2]) for name in letters)
    return bool(letters) and own >= 0.9 * len(letters) and kana
