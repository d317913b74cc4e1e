"""What a model makes of the rows: by hand with numbers in place of a model, and once with one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import planted
import pytest
import torch
from laws import save_model, write_rows
from transformers import AutoModelForCausalLM

from prefopt import cli
from prefopt.audit import BY_NAME, Table
from prefopt.audit.options import AuditOptions
from prefopt.audit.table import Asked, read_table
from prefopt.data import DataOptions


def asked(tmp_path: Path, chosen: list[float], rejected: list[float], own: list[float] | None = None) -> Table:
    """Pairs, with the log-probability per token that a model is said to give."""
    path = planted.write(tmp_path / "rows.jsonl", planted.pairs(len(chosen)))
    per_token = np.array([chosen, rejected]).T.ravel()
    said = Asked(per_token, 30 * per_token, None, None if own is None else np.array(own))
    return replace(read_table(path, DataOptions()), asked=said)


def normal(seed: int, num: int = 200) -> list[float]:
    """Log-probabilities around -2 nats per token."""
    found: list[float] = np.random.default_rng(seed).normal(-2, 0.3, num).tolist()
    return found


def test_pairs_that_the_model_parts_by_a_nat_are_named_each_by_its_side(tmp_path: Path) -> None:
    chosen, rejected = normal(0), normal(1)
    for n in range(20):
        chosen[n], rejected[n] = -5.0, -2.0
        chosen[n + 100], rejected[n + 100] = -2.0, -5.0
    table = asked(tmp_path, chosen, rejected)
    wrong, right = BY_NAME["model-inverted"].find(table), BY_NAME["model-separated"].find(table)
    assert set(wrong.rows) >= set(range(20)) and len(wrong.rows) <= 22
    assert set(right.rows) >= set(range(100, 120)) and len(right.rows) <= 22
    assert wrong.rows[0] == "-3.00 nats per token" and wrong.ranked[0][1] >= wrong.ranked[-1][1]
    assert not BY_NAME["model-inverted"].find(asked(tmp_path, normal(0), [x - 0.1 for x in normal(0)])).fired


def test_pairs_that_nearly_all_stand_as_the_model_has_them_are_said(tmp_path: Path) -> None:
    found = BY_NAME["model-order"].find(asked(tmp_path, [-1.0] * 200, [-2.0] * 200))
    assert found.fired and found.measured and found.measured.value == 1.0
    assert not BY_NAME["model-order"].find(asked(tmp_path, normal(0), normal(1))).fired


def test_rows_the_model_finds_far_less_likely_are_named(tmp_path: Path) -> None:
    chosen, rejected = normal(0), normal(1)
    for n in range(0, 200, 10):
        rejected[n] = -6.0
    found = BY_NAME["model-far"].find(asked(tmp_path, chosen, rejected))
    assert set(found.rows) == set(range(0, 200, 10))
    assert not BY_NAME["model-far"].find(asked(tmp_path, normal(0), normal(1))).rows


def test_pairs_the_model_would_not_write_are_said(tmp_path: Path) -> None:
    own = [-0.5] * 32
    assert BY_NAME["model-foreign"].find(asked(tmp_path, normal(0), normal(1), own)).fired
    assert not BY_NAME["model-foreign"].find(asked(tmp_path, normal(0), normal(1), normal(2, 32))).fired
    assert "no completions of its own" in BY_NAME["model-foreign"].find(asked(tmp_path, normal(0), normal(1))).skipped


def test_what_a_model_was_not_asked_is_not_counted(tmp_path: Path) -> None:
    nothing = float("nan")
    table = asked(tmp_path, [*normal(0, 100), *[nothing] * 100], [*normal(1, 100), *[nothing] * 100])
    found = BY_NAME["model-order"].find(table)
    assert found.measured and found.measured.n == 100


def test_a_model_s_word_makes_the_list_of_noise_better(tmp_path: Path) -> None:
    """Labels that words do not tell, a fifth of them wrong, and a model that tells most."""
    draw = np.random.default_rng(3)
    rows, wrong = planted.pairs(400), set(range(0, 400, 5))
    truth = np.array([-1.0 if n in wrong else 1.0 for n in range(400)])
    table = read_table(planted.write(tmp_path / "rows.jsonl", rows), DataOptions())
    gap = 0.5 * truth + draw.normal(0, 0.4, 400)
    per_token = np.array([gap, np.zeros(400)]).T.ravel()
    told = replace(table, asked=Asked(per_token, 30 * per_token, None, None))

    def found(which: Table) -> float:
        order = [line for line, _ in BY_NAME["label-noise"].find(which).ranked]
        return len(wrong & set(order[: len(wrong)])) / len(wrong)

    assert found(table) < 0.4 < 0.6 < found(told)


# -- a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "start", architecture="gpt_neox")


def test_a_model_is_asked_with_the_tokens_of_training(model: Path, tmp_path: Path) -> None:
    from prefopt.audit.asking import ask, ready
    from prefopt.models.load import ModelOptions

    path = write_rows(tmp_path / "pairs.jsonl", "pairs", num=12)
    loaded = ready(model, ModelOptions(dtype="float32"))
    table = read_table(path, DataOptions(), tokenizer=loaded.tokenizer)
    said = ask(loaded, table, rows=10, samples=4)
    assert np.isnan(said.per_token).tolist() == [False] * 20 + [True] * 4
    assert said.own is not None and len(said.own) == 4
    example = table.items[3].example
    assert example is not None
    ids = torch.tensor([example.prompt + example.completions[1]])
    with torch.no_grad():
        logp = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0].log_softmax(-1)
    start = len(example.prompt)
    by_hand = sum(float(logp[at - 1, ids[0, at]]) for at in range(start, ids.shape[1]))
    assert said.total[7] == pytest.approx(by_hand, abs=1e-4)
    assert said.per_token[7] == pytest.approx(by_hand / len(example.completions[1]), abs=1e-5)


def test_the_command_asks_a_model(model: Path, tmp_path: Path, capsys: Any) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", "pairs", num=24)
    words = ["audit", str(path), "--model", str(model), "--json", "--fail-on", "never", "model_samples=2"]
    assert cli.main(words) == 0
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert found["model-order"]["measured"]["n"] == 24
    assert found["model-foreign"]["measured"]["n"] == 24
    assert found["overlong"]["not_made"] is None


def test_the_options_are_checked() -> None:
    with pytest.raises(ValueError, match="model_rows"):
        AuditOptions(model_rows=0)
