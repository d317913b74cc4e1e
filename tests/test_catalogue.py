"""What users read of objectives and metrics: complete, shown in full, and refused with the nearest name."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

import prefopt
from prefopt import catalogue, cli, config
from prefopt.metrics import METRICS
from prefopt.objectives import EVERY

every_objective = pytest.mark.parametrize("name", EVERY)
every_metric = pytest.mark.parametrize("name", METRICS)


def said(capsys: Any, *words: str) -> str:
    """What a command that succeeds prints."""
    assert cli.main(words) == 0
    return str(capsys.readouterr().out)


def refused(capsys: Any, *words: str) -> str:
    """The message of a command that ends in exit code 2."""
    assert cli.main(words) == 2
    return str(capsys.readouterr().err.rstrip("\n"))


def flowing(text: str) -> str:
    """Text as words one space apart, so that wrapping does not matter."""
    return " ".join(text.replace("\n  - ", "\n").split())


# ---------------------------------------------------------------- the texts are complete


def missing(facts: dict[str, Any]) -> list[str]:
    """What an objective's text lacks; `facts` as `catalogue.objective` gives it."""
    lacking = [f"facts.{part} is empty" for part in ("title", "source", "healthy", "failures") if not facts[part]]
    if not any(verbatim for verbatim, _ in catalogue.passages(facts["formula"])):
        lacking.append("the class's docstring has no formula (indented lines)")
    if not any(name.removeprefix("eval/") in METRICS for name in re.findall(r"`([^`]+)`", facts["healthy"])):
        lacking.append("facts.healthy names no metric in backticks")
    for mode in catalogue.failures(facts):
        if not re.search(r".: .*; ", mode):
            lacking.append(f"facts.failures: not of the form `symptom: cause; what to change`: {mode}")
    for option in facts["options"]:
        lacking += [f"{option['name']}: {gap}" for gap in gaps(option)]
    return lacking


def gaps(option: dict[str, str]) -> list[str]:
    """What the comment above an option does not say."""
    text, kind = option["text"], re.sub(r"( or )?mapping\[.*?\]", "", option["type"])
    if kind.startswith(("number", "whole number")):
        ways = re.findall(r"\blarger\b|\bsmaller\b|\b[01]\b(?= \w)", text)
        return [] if len({*ways}) > 1 else ["does not say what a larger and a smaller value do"]
    if kind.startswith(("true or false", "text")) or not kind:
        return [] if text else ["has no comment above it"]
    return [f"does not say what {value} is" for value in re.split(r", | or ", kind) if value not in text]


@every_objective
def test_every_objective_says_all_of_itself(name: str) -> None:
    assert missing(catalogue.objective(name)) == []


def test_a_text_with_gaps_is_seen() -> None:
    option = {"name": "beta", "type": "number", "default": "0.1", "text": "strength: larger stays closer"}
    facts = {"title": "T", "source": "S", "formula": "In words.", "healthy": "`vibes` rises.", "options": [option]}
    found = missing({**facts, "failures": "It fails: why; what. It fails otherwise: no remedy."})
    assert found == [
        "the class's docstring has no formula (indented lines)",
        "facts.healthy names no metric in backticks",
        "facts.failures: not of the form `symptom: cause; what to change`: It fails otherwise: no remedy.",
        "beta: does not say what a larger and a smaller value do",
    ]
    kind = {"name": "loss", "type": "hinge, exo", "default": "hinge", "text": "hinge: none beyond 1"}
    assert gaps(kind) == ["does not say what exo is"]


def test_every_objective_is_chosen_by_something_and_every_choice_exists() -> None:
    chosen = {name for choice in catalogue.CHOICES for name in choice.names}
    assert chosen == set(EVERY)


@every_metric
def test_every_metric_says_what_it_is_and_which_way_is_better(name: str) -> None:
    known = METRICS[name]
    assert known.definition and known.healthy and known.sign in catalogue.BETTER


# ---------------------------------------------------------------- objectives


def test_the_overview_has_a_row_for_each_with_its_facts(capsys: Any) -> None:
    shown = said(capsys, "objectives")
    rows = catalogue.overview_rows()
    assert [row[0] for row in rows] == catalogue.names() and sorted(catalogue.names()) == sorted(EVERY)
    for row in rows:
        assert re.search(r"^" + r" +".join(map(re.escape, row[:-1])) + "$", shown, re.MULTILINE), row
        assert row[-1] in flowing(shown)
    facts = dict(zip(catalogue.HEADINGS, next(row for row in rows if row[0] == "dpo"), strict=True))
    assert (facts["data"], facts["reference"], facts["strength"], facts["rate"]) == ("pairs", "yes", "beta=0.1", "1e-6")
    strengths = {row[0]: row[catalogue.HEADINGS.index("strength")] for row in rows}
    assert (strengths["orpo"], strengths["reward"], strengths["sft"]) == ("odds_weight=0.1", "-", "-")


def test_the_package_offers_every_objective() -> None:
    for cls in EVERY.values():
        assert cls.__name__ in prefopt.__all__ and cls.__name__ in prefopt.objectives.__all__
        assert getattr(prefopt, cls.__name__) is cls
    assert all(hasattr(prefopt, name) and name in dir(prefopt) for name in prefopt.__all__)
    with pytest.raises(AttributeError, match="'prefopt' has no attribute 'PPPO'"):
        prefopt.PPPO  # noqa: B018


@every_objective
def test_the_page_of_an_objective_holds_every_part(capsys: Any, name: str) -> None:
    shown, facts = said(capsys, "objectives", name), catalogue.objective(name)
    text = flowing(shown)
    assert shown.startswith(f"{name}: {facts['title']} ({facts['source']})\n")
    assert f"Healthy {flowing(facts['healthy'])} How it goes wrong" in text
    assert " ".join(catalogue.failures(facts)) in text
    for verbatim, passage in catalogue.passages(facts["formula"]):
        assert all(line in shown for line in passage.splitlines()) if verbatim else flowing(passage) in text
    for option in facts["options"]:
        assert f"  {option['name']}={option['default']} " in shown and flowing(option["text"]) in text
    assert shown.rstrip().endswith(f"prefopt train {name} {facts['start'].partition(name)[2].strip()}")


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_prose_is_wrapped_to_the_terminal(capsys: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    for words in (["objectives"], ["objectives", "dpo"], ["explain", "logps/chosen"]):
        prose = [line for line in said(capsys, *words).splitlines() if not re.search(r" {3}|=|--", line)]
        assert max(map(len, prose)) <= min(columns, 110) and len(prose) > 5


def test_the_reference_is_none_cached_or_live() -> None:
    facts = {"reference": True, "live": True}
    assert catalogue.reference_kind(facts) == "live"
    assert catalogue.reference_kind({**facts, "live": False}) == "yes"
    assert catalogue.reference_kind({"reference": False, "live": False}) == "no"


def test_objectives_for_machines_are_all_their_facts(capsys: Any) -> None:
    one = json.loads(said(capsys, "objectives", "dpo", "--json"))
    assert one["reference"] is True and one["learning_rate"] == 1e-6
    assert one["options"][0]["name"] == "beta" and one["options"][0]["default"] == "0.1"
    everything = json.loads(said(capsys, "objectives", "--json"))
    assert everything["dpo"] == one and sorted(everything) == sorted(EVERY)


def test_an_unknown_objective_or_two_are_refused(capsys: Any) -> None:
    assert refused(capsys, "objectives", "dop") == "error: objective: 'dop' is not one; did you mean dpo?"
    assert refused(capsys, "objectives", "dpo", "sft").endswith("one name at a time, got dpo sft")


def test_help_says_what_the_commands_show(capsys: Any) -> None:
    assert "--json" in said(capsys, "objectives", "--help") and "--json" in said(capsys, "explain", "--help")


def test_a_failure_mode_may_have_several_sentences() -> None:
    facts = {"failures": "It stops: no rows; add some. Look twice. `nll` rises: too fast; slow down."}
    assert catalogue.failures(facts) == [
        "It stops: no rows; add some. Look twice.",
        "`nll` rises: too fast; slow down.",
    ]


def test_a_docstring_keeps_its_formula_and_flows_its_prose() -> None:
    docstring = "In words.\n\n    a = b\n      + c\n\nwhere a is\none. It\n    d = e\nends."
    assert catalogue.passages(docstring) == [
        (False, "In words."),
        (True, "a = b\n  + c"),
        (False, "where a is one. It"),
        (True, "d = e"),
        (False, "ends."),
    ]


# ---------------------------------------------------------------- metrics


@every_metric
def test_a_metric_is_explained_in_full(capsys: Any, name: str) -> None:
    known, text = METRICS[name], flowing(said(capsys, "explain", name))
    for part in (name, known.definition, known.unit or "none", catalogue.BETTER[known.sign], known.healthy, known.more):
        assert flowing(part) in text


def test_a_held_out_metric_is_explained_as_one(capsys: Any) -> None:
    text = said(capsys, "explain", "eval/logps/chosen")
    assert (
        text.startswith("eval/logps/chosen\n")
        and "on held-out rows" in text
        and METRICS["logps/chosen"].more[:60] in text
    )


def test_both_names_under_which_falling_log_probs_are_asked_about_have_the_answer(capsys: Any) -> None:
    for name in ("logps/chosen", "rewards/chosen"):
        text = flowing(said(capsys, "explain", name))
        for part in ("both fall: is that fine?", "14 of 14", "AUC 0.20", "arXiv:2402.13228", "arXiv:2410.08847"):
            assert part in text


def test_without_a_name_every_metric_is_listed(capsys: Any) -> None:
    shown = said(capsys, "explain")
    assert [line.split()[0] for line in shown.splitlines()[1:] if re.match(r"\w", line)] == list(METRICS)


def test_metrics_for_machines(capsys: Any) -> None:
    one = json.loads(said(capsys, "explain", "eval/nll", "--json"))
    assert (one["name"], one["unit"], one["sign"], one["held_out"]) == ("eval/nll", "nats/token", "lower", True)
    assert list(json.loads(said(capsys, "explain", "--json"))) == list(METRICS)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("los", "did you mean loss?"),
        ("accuracies", "did you mean rewards/accuracies?"),
        ("eval/rewards/margin", "did you mean rewards/margins?"),
        ("zebra", "`prefopt explain` lists them all"),
    ],
)
def test_an_unknown_metric_names_the_nearest(capsys: Any, word: str, hint: str) -> None:
    assert refused(capsys, "explain", word) == f"error: metric: {word!r} is not one; {hint}"


def test_what_help_reads_must_be_literal(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "prefopt"
    (package / "objectives").mkdir(parents=True)
    source = (config.PACKAGE / "objectives" / "facts.py").read_text(encoding="utf-8")
    (package / "objectives" / "facts.py").write_text(source, encoding="utf-8")
    wrong = "class New:\n    facts: ClassVar[Facts] = Facts(name='new', title=TITLE)\n"
    (package / "objectives" / "new.py").write_text(wrong, encoding="utf-8")
    monkeypatch.setattr(config, "PACKAGE", package)
    with pytest.raises(ValueError, match=r"New\.facts\.title must be a literal, got TITLE"):
        config.objectives.__wrapped__()
