"""Seven tasks that differ in kind, each with every completion, its probability and its true reward known.

worlds: four tokens of six, judged by a random reward (docs/bench.md). sums: two digits to add up in base five, an
answer of one or two digits that has to end by itself, judged by how far off it is. instructions: an operation on three
symbols and a style token before the answer, judged by what is right of it. brackets: five brackets of two kinds, some
still open, to be closed in order by an answer of up to four tokens that has to end by itself, judged by its mistakes.
routes: the rows and columns of two fields of a board of nine, at most three moves apart, and moves from the first to
the second that have to end by themselves, judged by how far from it they end and by the moves that led nowhere. maps:
five fields with six borders, and a colour of four for each, judged by how many borders are between equal colours and by
how many colours were used; any other colours would do as well. coins: an amount and a coin that may not be used, to be
paid with up to four coins and an end, judged by what is missing or too much, by how many coins were used and by the
forbidden one.

Letters: P prompts, C completions, L tokens of the longest completion.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from prefopt import bench
from prefopt.bench.space import next_logp

KINDS = ("worlds", "sums", "instructions", "brackets", "routes", "maps", "coins")
# what a run starts from: a model that answers; the same where its twin has yet to learn to; that twin
REFERENCE, ANSWERS, BASE = "reference", "answers", "base"
DIGITS, SYMBOLS, STYLES, LENGTH = 5, 3, 2, 3  # sums are in base five
NO_NUMBER = 90  # what is no number counts as at least this far off
OPENING, OPENED, DEEPEST, MOST_MISTAKES = (
    2,
    5,
    3,
    4,
)  # brackets: kinds (closing ones follow), in a prompt, open, counted
SIDE, FARTHEST = 3, 3  # routes: of the board, moves that a field is away
MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))  # rows and columns
DETOUR = 0.5  # what a move that led no nearer costs, and an answer that does not end
FIELDS, BORDERS, COLOURS, PAINT = 5, 6, 4, 0.5  # maps: PAINT is what a colour costs, in borders of equal colours
COINS, AMOUNT, MOST_COINS = (1, 3, 4, 7), 20, 4  # coins: their values, the largest amount, of an answer
COIN, FORBIDDEN, OFF = 0.5, 2.0, 8.0  # what each coin costs, in units off the amount, a forbidden one, and the most
OPERATIONS: tuple[Callable[[tuple[int, ...]], tuple[int, ...]], ...] = (
    lambda x: x,
    lambda x: x[::-1],
    lambda x: tuple((symbol + 1) % SYMBOLS for symbol in x),
    lambda x: tuple(sorted(x)),
)
FIT_STEPS, FIT_BATCH, FIT_RATE = {"maps": 2000, "coins": 1000}, 128, 4e-3  # updates: 500 where none are given


@dataclass(frozen=True, eq=False)
class Task:
    """world: with the start model as its reference and a true reward of mean 0 and one standard deviation under the
    model that answers. right [P, C] bool: what a checker accepts. measured: numbers of the prompts by which a run is
    judged. answers [P, C]: log-probs of the model that answers, from which rows may be drawn. finished [C] bool: the
    completions that are no answer cut off.
    """

    kind: str
    world: bench.World
    right: Tensor
    measured: Tensor
    answers: Tensor
    finished: Tensor

    def logp(self, model: Any) -> Tensor:
        """log p of every completion of the measured prompts, [M, C] nats."""
        space = self.world.space
        with torch.no_grad():
            table = next_logp(model, space, self.measured)  # [M, S, V]
        return (table[:, space.places, space.tokens.clamp(min=0)] * space.real).sum(2)

    def expected(self, logp: Tensor, value: Tensor) -> float:
        """Mean over the measured prompts of the expectation of value [P, C] under a policy [M, C]."""
        return float((logp.exp() * value[self.measured]).sum(1).mean())


@functools.lru_cache(maxsize=48)
def task(kind: str, seed: int, start: str, folder: Path, chance: float = 0.0) -> Task:
    """A task from a start: a model that answers (`reference`), or one that has yet to learn to (`base`).

    folder: where fitted models are kept. chance: that the start succeeds, where a checker accepts answers or does not.
    """
    if kind == "worlds":
        space, gold, known, table = _worlds(seed, start)
    else:
        space, raw = FITTED[kind][0]()
        answers = _fitted(space, _teacher(kind, REFERENCE), (kind, seed, REFERENCE), folder)
        known = answers if start != BASE else _fitted(space, _teacher(kind, start), (kind, seed, start), folder)
        table = _tokens(answers, space).sum(2)
        gold = _standard(raw, table)
    world = bench.World(seed, "structured", space, gold, *_reference(known, space), known)
    measured = torch.arange(
        0, len(space.prompts), {"instructions": 3, "brackets": 2, "routes": 2, "maps": 2, "coins": 2}.get(kind, 1)
    )
    return Task(kind, world, accepted(world, chance), measured, table, _finished(kind, space))


def _finished(kind: str, space: bench.Space) -> Tensor:
    """[C] bool. In sums two digits are an answer as they are."""
    end = {"brackets": 2 * OPENING, "routes": len(MOVES), "coins": len(COINS)}.get(kind)
    return (space.tokens == end).any(1) if end is not None else torch.ones(len(space.tokens)) > 0


def accepted(world: bench.World, chance: float) -> Tensor:
    """The completions that a checker accepts, [P, C] bool: the most rewarded ones that together have about this chance.

    One whose own chance is above what is left is passed over, so that a hard task has rare answers.
    """
    order = world.gold.argsort(1, descending=True)
    probability = world.reference.exp().gather(1, order)
    found = torch.zeros_like(order, dtype=torch.bool)
    left = torch.full((len(order),), chance, dtype=probability.dtype)
    for place in range(order.shape[1]):
        fits = probability[:, place] <= left
        found[fits, order[fits, place]] = True
        left = left - probability[:, place] * fits
    return found


# ---------------------------------------------------------------- worlds


def _worlds(seed: int, start: str) -> tuple[bench.Space, Tensor, Any, Tensor]:
    """From a base, another world's model, what is rewarded is also to be likely under the reference: fluent."""
    world = bench.world(seed)
    if start == REFERENCE:
        return world.space, world.gold, world.model, world.reference
    fluent = _standard(world.gold + _standard(world.reference, world.reference), world.reference)
    model = world.model if start == ANSWERS else bench.world(seed + 500).model
    return world.space, fluent, model, world.reference


# ---------------------------------------------------------------- sums


def _sums() -> tuple[bench.Space, Tensor]:
    first = DIGITS + 1  # ids of the operands, after those of digits and end
    prompts = [[first + a, first + DIGITS + b] for a in range(DIGITS) for b in range(DIGITS)]
    space = bench.Space.of(prompts, DIGITS, 2, end=True)
    return space, -_off(space).clamp(max=8.0)


def _off(space: bench.Space) -> Tensor:
    """How far each completion is from the sum, [P, C]; 9 and more for what is no number."""
    sums = torch.tensor([a + b for a in range(DIGITS) for b in range(DIGITS)])
    values = []
    for number in range(len(space.tokens)):
        digits = [token for token in space.completion(number) if token < DIGITS]
        formed = digits and not (len(digits) > 1 and digits[0] == 0)
        values.append(int("".join(map(str, digits)), DIGITS) if formed else -99)
    return (torch.tensor(values)[None, :] - sums[:, None]).abs().double()


# ---------------------------------------------------------------- instructions


def _instructions() -> tuple[bench.Space, Tensor]:
    first = SYMBOLS + STYLES
    inputs = [(a, b, c) for a in range(SYMBOLS) for b in range(SYMBOLS) for c in range(SYMBOLS)]
    prompts = [
        [first + operation, *(first + len(OPERATIONS) + s for s in given)]
        for operation in range(len(OPERATIONS))
        for given in inputs
    ]
    space = bench.Space.of(prompts, SYMBOLS + STYLES, 1 + LENGTH, end=False)
    answers = torch.tensor([operation(given) for operation in OPERATIONS for given in inputs])  # [P, LENGTH]
    same = (space.tokens[None, :, 1:] == answers[:, None]).double().mean(2)  # [P, C]
    styled = (space.tokens[:, 0] >= SYMBOLS)[None, :]
    return space, same + ((same == 1) & styled).double() - (~styled).double()


# ---------------------------------------------------------------- brackets


def _brackets() -> tuple[bench.Space, Tensor]:
    """Ids: opening brackets, the closing ones of the same kinds, the end; then the same brackets in a prompt."""
    given = [(p, left) for p in itertools.product(range(2 * OPENING), repeat=OPENED) for left in [_open(p, [])]]
    asked = [(p, left) for p, left in given if left is not None and 0 < len(left) <= DEEPEST]
    space = bench.Space.of([[2 * OPENING + 1 + b for b in p] for p, _ in asked], 2 * OPENING, DEEPEST + 1, end=True)
    answers = [space.completion(number) for number in range(len(space.tokens))]
    mistakes = torch.tensor([[_mistakes(left, answer) for answer in answers] for _, left in asked])
    return space, -mistakes.clamp(max=MOST_MISTAKES).double()


def _open(brackets: Sequence[int], left: list[int]) -> list[int] | None:
    """The brackets still open, in order; None where one closes what was not opened."""
    for bracket in brackets:
        if bracket < OPENING:
            left = [*left, bracket]
        elif left and left[-1] == bracket - OPENING:
            left = left[:-1]
        else:
            return None
    return left


def _mistakes(left: list[int], answer: Sequence[int]) -> int:
    """Brackets of an answer that close nothing, those left open, and one for an answer that does not end."""
    wrong = 0
    for token in answer:
        after = _open([token], left) if token < 2 * OPENING else left
        wrong, left = (wrong + 1, left) if after is None else (wrong, after)
    return wrong + len(left) + (2 * OPENING not in answer)


# ---------------------------------------------------------------- routes


def _routes() -> tuple[bench.Space, Tensor]:
    """Ids: the four moves and the end; then rows and columns of where it starts and of where it is to go."""
    fields = list(itertools.product(range(SIDE), repeat=2))
    asked = [(a, b) for a in fields for b in fields if 0 < _apart(a, b) <= FARTHEST]
    first = len(MOVES) + 1
    prompts = [[first + at * SIDE + number for at, number in enumerate((*a, *b))] for a, b in asked]
    space = bench.Space.of(prompts, len(MOVES), FARTHEST + 1, end=True)
    answers = [space.completion(number) for number in range(len(space.tokens))]
    return space, torch.tensor([[-_cost(a, b, answer) for answer in answers] for a, b in asked]).double()


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _cost(at: tuple[int, ...], goal: tuple[int, ...], answer: Sequence[int]) -> float:
    """Moves that are left at the end, and what those that led no nearer cost. One off the board stays where it is."""
    wasted = len(MOVES) not in answer
    for token in answer:
        if token < len(MOVES):
            after = tuple(x + step for x, step in zip(at, MOVES[token], strict=True))
            after = after if all(0 <= x < SIDE for x in after) else at
            wasted, at = wasted + (_apart(after, goal) >= _apart(at, goal)), after
    return _apart(at, goal) + DETOUR * wasted


# ---------------------------------------------------------------- maps


def _maps() -> tuple[bench.Space, Tensor]:
    """Ids: the colours; then, for the third field and each after it, the one or two before it that it borders on. The
    second always borders on the first.
    """
    choices = [[(0,)], *([*itertools.combinations(range(at), 1), *itertools.combinations(range(at), 2)]
                         for at in range(2, FIELDS))]  # fmt: skip
    every = [(at, near) for at, some in enumerate(choices, 1) for near in some]
    known = {own: number for number, own in enumerate(every)}
    asked = [each for each in itertools.product(*choices) if sum(map(len, each)) == BORDERS]
    prompts = [[COLOURS - 1 + known[at, near] for at, near in enumerate(each, 1) if at > 1] for each in asked]
    space = bench.Space.of(prompts, COLOURS, FIELDS, end=False)
    equal = space.tokens[:, :, None] == space.tokens[:, None]  # [C, FIELDS, FIELDS]
    pairs = [[(at, other) for at, near in enumerate(each, 1) for other in near] for each in asked]
    clashes = torch.stack([sum(equal[:, at, other].double() for at, other in own) for own in pairs])  # [P, C]
    used = sum((space.tokens == colour).any(1).double() for colour in range(COLOURS))  # [C]
    return space, -clashes - PAINT * used


# ---------------------------------------------------------------- coins


def _coins() -> tuple[bench.Space, Tensor]:
    """Ids: the coins and the end; then the amount; then the coin that may not be used, or that any may."""
    first = len(COINS) + 1
    asked = [(amount, coin) for amount in range(1, AMOUNT + 1) for coin in range(len(COINS) + 1)]
    space = bench.Space.of(
        [[first + a - 1, first + AMOUNT + c] for a, c in asked], len(COINS), MOST_COINS + 1, end=True
    )
    counts = torch.stack([(space.tokens == coin).sum(1) for coin in range(len(COINS))], 1).double()  # [C, coins]
    amounts, forbidden = (torch.tensor(own) for own in zip(*asked, strict=True))
    off = (counts @ torch.tensor(COINS).double() - amounts[:, None]).abs().clamp(max=OFF)  # [P, C]
    used = torch.cat([counts, torch.zeros(len(counts), 1)], 1).T[forbidden] > 0  # [P, C]
    unended = ~(space.tokens == len(COINS)).any(1)
    return space, -off - COIN * counts.sum(1) - FORBIDDEN * used - FORBIDDEN * unended


# ---------------------------------------------------------------- models


def _teacher(kind: str, start: str) -> Tensor:
    """What a start model is fitted to, [P, C] probabilities."""
    return FITTED[kind][1](start)


def _brackets_teacher(start: str) -> Tensor:
    """Few mistakes, and short rather than long; or what would close some other prompt, whatever was asked."""
    space, raw = _brackets()
    likely = (raw / 0.6).exp() * 0.5 ** space.lengths.double()
    if start == BASE:
        likely = (likely / likely.sum(1, keepdim=True)).mean(0).expand_as(raw)
    return likely / likely.sum(1, keepdim=True)


def _routes_teacher(start: str) -> Tensor:
    """Near the goal rather than far from it; or what leads to some other goal, whatever was asked."""
    space, raw = _routes()
    likely = (raw / 0.8).exp() * 0.3 ** space.lengths.double()
    likely = likely / likely.sum(1, keepdim=True)
    return likely if start != BASE else likely.mean(0).expand_as(raw)


def _maps_teacher(start: str) -> Tensor:
    """Few borders between equal colours; or, nearly half the time, what would colour some other map."""
    likely = (_maps()[1] / 0.6).exp()
    likely = likely / likely.sum(1, keepdim=True)
    return likely if start != BASE else 0.55 * likely + 0.45 * likely.mean(0)


def _coins_teacher(start: str) -> Tensor:
    """Near the amount; or what would pay some other one."""
    space, raw = _coins()
    likely = (raw / 1.5).exp() * 0.6 ** space.lengths.double()
    likely = likely / likely.sum(1, keepdim=True)
    return likely if start != BASE else likely.mean(0).expand_as(raw)


def _sums_teacher(start: str) -> Tensor:
    """Near the sum; or any sum of two digits, whatever was asked."""
    off = _off(_sums()[0])
    formed = off <= NO_NUMBER - 2 * DIGITS
    near = torch.where(formed, (-off / 2.0).exp(), 1e-4)
    if start == BASE:
        near = torch.where(formed & (off[:1] <= 2 * DIGITS - 2), 1.0, 1e-4).expand_as(off)
    return near / near.sum(1, keepdim=True)


def _instructions_teacher(start: str) -> Tensor:
    """Often what the operation asks for; or what another operation does, whatever was asked."""
    space, raw = _instructions()
    styled = (space.tokens[:, 0] >= SYMBOLS) & (space.tokens[:, 1:] < SYMBOLS).all(1)
    right = (raw == raw.max()).double()
    any_operation = right.view(len(OPERATIONS), -1, len(styled)).mean(0).repeat(len(OPERATIONS), 1)
    noise = torch.where(styled, 1.0, 1e-4).expand_as(right)
    own, some, noise = (each / each.sum(1, keepdim=True) for each in (right, any_operation, noise))
    return 0.7 * some + 0.3 * noise if start == BASE else 0.4 * own + 0.3 * some + 0.3 * noise


FITTED: dict[str, tuple[Callable[[], tuple[bench.Space, Tensor]], Callable[[str], Tensor]]] = {
    "sums": (_sums, _sums_teacher),
    "instructions": (_instructions, _instructions_teacher),
    "brackets": (_brackets, _brackets_teacher),
    "routes": (_routes, _routes_teacher),
    "maps": (_maps, _maps_teacher),
    "coins": (_coins, _coins_teacher),
}


def _fitted(space: bench.Space, teacher: Tensor, name: Sequence[Any], folder: Path) -> Any:
    """A model fitted to draws of the teacher; kept in `folder`."""
    model = _model(space, int(name[1]))
    file = folder / ("-".join(str(part).replace(" ", "-") for part in name) + ".pt")
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval().requires_grad_(False)
    adam = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.01)
    random, steps = torch.Generator().manual_seed(int(name[1])), FIT_STEPS.get(name[0], 500)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = FIT_RATE * min((step + 1) / 20, 1 - step / steps)
        prompts = torch.randint(len(space.prompts), (FIT_BATCH,), generator=random)
        drawn = torch.multinomial(teacher[prompts], 1, generator=random)[:, 0]
        loss = -_likelihood(model, space, prompts, drawn).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    folder.mkdir(parents=True, exist_ok=True)
    scratch = file.with_suffix(f".{id(model)}")
    torch.save(model.state_dict(), scratch)
    scratch.rename(file)
    return model.eval().requires_grad_(False)


def _likelihood(model: Any, space: bench.Space, prompts: Tensor, drawn: Tensor) -> Tensor:
    """log p of one completion of each prompt, both by number, [N] nats; carries gradient."""
    tokens, real = space.tokens[drawn], space.real[drawn]
    ids = torch.cat([space.prompts[prompts], tokens.clamp(min=0)], 1)
    logits = model(input_ids=ids, use_cache=False).logits[:, space.prompts.shape[1] - 1 : -1]
    return (logits.log_softmax(-1).gather(2, tokens.clamp(min=0)[..., None])[..., 0] * real).sum(1)


def _model(space: bench.Space, seed: int) -> Any:
    """A GPT-NeoX of 0.1 M parameters whose head has a row for each token of a completion, as in the bench's worlds."""
    settings: Any = GPTNeoXConfig
    config = settings(
        vocab_size=int(space.prompts.max()) + 1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=256,
        rotary_pct=1.0,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = GPTNeoXForCausalLM(config)
        head = torch.nn.Linear(64, space.num_tokens, bias=False)
        torch.nn.init.normal_(head.weight, std=config.initializer_range)
        model.set_output_embeddings(head)
    return model


def _tokens(model: Any, space: bench.Space) -> Tensor:
    """log p of every token of every completion, [P, C, L] nats."""
    with torch.no_grad():
        return space.along(next_logp(model, space))


def _reference(model: Any, space: bench.Space) -> tuple[Tensor, Tensor]:
    """log p of completions [P, C] and of their tokens [P, C, L]."""
    tokens = _tokens(model, space)
    return tokens.sum(2), tokens


def _standard(raw: Tensor, logp: Tensor) -> Tensor:
    """With mean 0 for each prompt and one standard deviation over all of them under a policy [P, C]."""
    probability = logp.exp()
    centred = raw.double() - (probability * raw).sum(1, keepdim=True)
    return centred / (probability * centred.square()).sum(1).mean().sqrt()
