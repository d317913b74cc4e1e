"""Labels that contradict each other: A over B and B over A, or one answer that is good here and bad there."""

from __future__ import annotations

from collections import defaultdict

from prefopt.audit.check import Check, Finding, of_items
from prefopt.audit.table import Table

Edge = tuple[str, str, int]  # better, worse, the item that says so


def preferences(table: Table) -> Finding:
    """Pairs of one prompt that lie on a circle of preferences."""
    asked: dict[str, list[Edge]] = defaultdict(list)
    for number, (key, answers) in enumerate(zip(table.keys, table.answer_keys, strict=True)):
        if len(answers) == 2 and answers[0] != answers[1]:
            asked[key].append((answers[0], answers[1], number))
    found = {}
    for edges in asked.values():
        if len(edges) > 1:
            found.update(_circular(edges, table))
    return of_items(table, found)


def _circular(edges: list[Edge], table: Table) -> dict[int, str]:
    """The items on circles, each with the place of a row that says the opposite, or of one on its circle."""
    opposite = {(better, worse): number for better, worse, number in edges}
    part = components([(better, worse) for better, worse, _ in edges])
    inside: dict[int, list[int]] = defaultdict(list)
    for better, worse, number in edges:
        if part[better] == part[worse]:
            inside[part[better]].append(number)
    found = {}
    for better, worse, number in edges:
        if part[better] != part[worse]:
            continue
        against = opposite.get((worse, better))
        if against is not None:
            found[number] = f"{table.place(table.items[against].line)} says the opposite"
        else:
            other = next((n for n in inside[part[better]] if n != number), number)
            found[number] = f"a circle of preferences with {table.place(table.items[other].line)}"
    return found


def components(edges: list[tuple[str, str]]) -> dict[str, int]:
    """Strongly connected components: node -> number; edges within one lie on a circle.

    Kosaraju's algorithm: nodes in the order in which a search leaves them, then a search against the edges.
    """
    forward: dict[str, list[str]] = defaultdict(list)
    backward: dict[str, list[str]] = defaultdict(list)
    for tail, head in edges:
        forward[tail].append(head)
        backward[head].append(tail)
    nodes = list(dict.fromkeys(node for edge in edges for node in edge))
    left: list[str] = []
    seen: set[str] = set()
    for node in nodes:
        left += _search(node, forward, seen)
    number: dict[str, int] = {}
    seen = set()
    for label, node in enumerate(reversed(left)):
        for member in _search(node, backward, seen):
            number[member] = label
    return number


def _search(start: str, edges: dict[str, list[str]], seen: set[str]) -> list[str]:
    """The unseen nodes that `start` leads to, in the order in which a depth-first search leaves them."""
    if start in seen:
        return []
    seen.add(start)
    order, stack = [], [(start, iter(edges.get(start, ())))]
    while stack:
        node, heads = stack[-1]
        onward = next((head for head in heads if head not in seen), None)
        if onward is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(onward)
            stack.append((onward, iter(edges.get(onward, ()))))
    return order


def labels(table: Table) -> Finding:
    """Answers to one prompt that are labelled good in one row and bad in another."""
    marks: dict[tuple[str, tuple[str, ...]], dict[bool, int]] = defaultdict(dict)
    keys = list(zip(table.keys, table.answer_keys, strict=True))
    for number, key in enumerate(keys):
        marks[key].setdefault(table.items[number].record.scores[0] > 0.5, number)
    found = {}
    for number, key in enumerate(keys):
        against = marks[key].get(table.items[number].record.scores[0] <= 0.5)
        if against is not None:
            found[number] = f"{table.place(table.items[against].line)} says the opposite"
    return of_items(table, found)


def both(table: Table) -> Finding:
    """`preferences` of pairs, `labels` of labels."""
    return labels(table) if table.kind == "labels" else preferences(table)


CHECKS = (
    Check(
        "contradiction",
        "error",
        "rows that contradict another row of their prompt: A over B and B over A, a longer circle, or good and bad",
        "their gradients cancel, or the later one wins; at least one of them is wrong",
        "decide, or remove all of them (--fix does)",
        "logic: a preference is an order",
        both,
        kinds=("pairs", "labels"),
        removal="safe",
    ),
)
