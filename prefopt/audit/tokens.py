"""Faults that show only as tokens: BOS, EOS, special tokens inside an answer, the boundary, length."""

from __future__ import annotations

from prefopt.audit.answers import ANSWERED
from prefopt.audit.check import Check, Finding, of_items, skipped
from prefopt.audit.table import Item, Table, fitted
from prefopt.evaluate.statistics import wilson
from prefopt.records import Example

# the note of prefopt.data.template
ENDLESS = "answers that the chat template ends with no special token: EOS added"


def double_bos(table: Table) -> Finding:
    """Rows whose tokens begin with two BOS, or hold one inside."""
    encoder = table.encoder
    if encoder is None or encoder.bos is None:
        return skipped("the tokenizer has no BOS")
    found = {}
    for number, example in _examples(table):
        ids = example.prompt
        # where one token is BOS and EOS, one inside may end a turn
        inside = ids[1:] if encoder.bos != encoder.eos else ids[1:2]
        if ids[:1] == [encoder.bos] and encoder.bos in inside:
            found[number] = "two BOS at the start" if ids[1] == encoder.bos else "a BOS inside the prompt"
    return of_items(table, found)


def no_bos(table: Table) -> Finding:
    """Rows without the BOS that the tokenizer itself puts first."""
    encoder = table.encoder
    if encoder is None or not encoder.adds_bos:
        return skipped("the tokenizer adds no BOS of its own")
    return of_items(table, {n: "" for n, e in _examples(table) if e.prompt[:1] != [encoder.bos]})


def no_end(table: Table) -> Finding:
    """Answers whose last trained token is none that ends, or whose template gives them none and training adds one."""
    encoder = table.encoder
    if encoder is None:
        return skipped("needs a tokenizer")
    ends = set(encoder.tokenizer.all_special_ids) | set(encoder.tokenizer.get_added_vocab().values())
    found = {}
    for number, example in _examples(table):
        for place, ids in enumerate(example.completions):
            # a template may write a line break after the token that ends a turn
            tail = [token for token in ids[-3:] if token in ends]
            if not tail:
                found[number] = f"{_side(example, place)} ends in {encoder.tokenizer.decode(ids[-3:])!r}"
    if found or not encoder.notes[ENDLESS]:
        return of_items(table, found)
    said = f"the chat template ends {encoder.notes[ENDLESS]:,} answers with no special token; training adds EOS"
    return Finding(fired=True, said=said)


def early_end(table: Table) -> Finding:
    """Single answers with EOS before their last token: sampling stops there, and the rest is never written."""
    encoder = table.encoder
    if encoder is None or encoder.eos is None:
        return skipped("the tokenizer has no EOS")
    found = {}
    for number, example in _examples(table):
        record = table.items[number].record
        if any(isinstance(text, list) and len(text) > 1 for text in record.completions):
            continue
        for place, ids in enumerate(example.completions):
            if encoder.eos in ids[:-3]:
                found[number] = f"EOS at token {ids.index(encoder.eos) + 1} of {len(ids)} of {_side(example, place)}"
    return of_items(table, found)


def unknown(table: Table) -> Finding:
    """Rows with the token for what the vocabulary cannot write."""
    encoder = table.encoder
    if encoder is None or getattr(encoder.tokenizer, "unk_token_id", None) is None:
        return skipped("the tokenizer has no token for the unknown")
    mark = encoder.tokenizer.unk_token_id
    if mark in (encoder.bos, encoder.eos):
        return skipped("the tokenizer's token for the unknown is its BOS or EOS")
    found = {}
    for number, example in _examples(table):
        total = sum(ids.count(mark) for ids in [example.prompt, *example.completions])
        if total:
            found[number] = f"{total:,} of {example.num_tokens:,} tokens"
    return of_items(table, found)


def merged(table: Table) -> Finding:
    """Prompts of text whose last token differs once the answer follows: the answer starts inside a token."""
    encoder = table.encoder
    if encoder is None:
        return skipped("needs a tokenizer")
    told = {n: item for n, item in enumerate(table.items) if isinstance(item.record.prompt, str) and item.example}
    if not told:
        return skipped("the rows are messages: the chat template makes the boundary")
    prompts = [str(item.record.prompt) for item in told.values()]
    alone = encoder.tokenizer(prompts, add_special_tokens=True, verbose=False)["input_ids"]
    found = {}
    for (number, item), ids in zip(told.items(), alone, strict=True):
        own = [token for token in ids if token not in (encoder.bos, encoder.eos)]
        used = [token for token in _prompt(item) if token not in (encoder.bos, encoder.eos)]
        if own != used and item.asked.strip():
            found[number] = f"the prompt's last token {encoder.tokenizer.decode(own[-1:])!r} joins the answer"
    return of_items(table, found)


def _prompt(item: Item) -> list[int]:
    return item.example.prompt if item.example else []


def overlong(table: Table) -> Finding:
    """Rows longer than max_length, which are dropped or cut."""
    limit = table.options.max_length
    if limit is None:
        return skipped("max_length is null: nothing is cut")
    found, cut = {}, 0
    for number, item in enumerate(table.items):
        if item.example is None:
            continue
        example, num, why = fitted(item, table.options)
        cut += bool(num)
        if num or example is None:
            longest = len(item.example.prompt) + max(map(len, item.example.completions), default=0)
            found[number] = f"{longest:,} tokens" + (f"; {why}" if why else "; its end is cut")
    finding = of_items(table, found)
    share = wilson(len(found), len(table.items))
    said = f"{len(found):,} of {len(table.items):,} rows are longer than max_length={limit}; "
    said += f"overlong={table.options.overlong}"
    return Finding(finding.rows, finding.items, bool(found), share, said)


def _examples(table: Table) -> list[tuple[int, Example]]:
    return [(number, item.example) for number, item in enumerate(table.items) if item.example is not None]


def _side(example: Example, place: int) -> str:
    return ("chosen", "rejected")[place] if len(example.completions) == 2 else "the answer"


CHECKS = (
    Check(
        "double-bos",
        "error",
        "rows that begin with two BOS tokens, or hold one inside",
        "the model never saw that; a template that writes BOS and a text that has it, too, are the usual cause",
        "take BOS out of the text or out of the chat template",
        "tokens as training has them",
        double_bos,
        needs="tokens",
        removal="never",
    ),
    Check(
        "no-bos",
        "warning",
        "rows without the BOS that the tokenizer puts first",
        "the model was trained with it; without it the first tokens are off",
        "let the chat template write bos_token",
        "tokens as training has them",
        no_bos,
        needs="tokens",
        removal="never",
    ),
    Check(
        "no-end",
        "warning",
        "answers that end in no special token, or only in the EOS that training adds to what the template writes",
        "earlier turns of a conversation then end in nothing, unlike the last, and the model may not know when to stop",
        "let the chat template end the assistant's turn with a special token",
        "tokens as training has them",
        no_end,
        kinds=ANSWERED,
        needs="tokens",
        removal="never",
    ),
    Check(
        "early-end",
        "error",
        "answers with EOS before their end",
        "sampling stops at it, so what follows is trained on and never written",
        "take EOS out of the text; remove the rest with --remove early-end",
        "tokens as training has them",
        early_end,
        kinds=ANSWERED,
        needs="tokens",
    ),
    Check(
        "unknown-token",
        "warning",
        "rows with characters that the vocabulary cannot write",
        "the model learns to write the token for the unknown",
        "replace the characters, or take a model whose vocabulary has them",
        "tokens as training has them",
        unknown,
        needs="tokens",
    ),
    Check(
        "merged-token",
        "note",
        "text prompts whose last token joins the first of the answer",
        "what a user sends ends in another token than what was trained on; training gives that token to the answer",
        "end prompts in a line break or a mark, and start answers with a space",
        "tokens of the prompt alone and with its answer",
        merged,
        needs="tokens",
        removal="never",
    ),
    Check(
        "overlong",
        "warning",
        "rows longer than max_length",
        "they are dropped, or lose the end of their answer, which is the part that is different for long answers",
        "raise max_length as memory allows; the count says what it would take",
        "max_length",
        overlong,
        needs="tokens",
        removal="never",
    ),
)
