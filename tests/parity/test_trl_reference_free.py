"""CPOTrainer and ORPOTrainer (both in `trl.experimental`) beside `CPO`, `SimPO` and `ORPO`.

| TRL | prefopt |
|---|---|
| `CPOConfig(loss_type="sigmoid")` | `CPO()` |
| `cpo_alpha` | `sft_weight` |
| `CPOConfig(loss_type="simpo", cpo_alpha=0)` | `SimPO()` |
| `simpo_gamma` | `beta * gamma_beta_ratio` |
| `ORPOConfig(beta=...)` | `ORPO(odds_weight=...)` |

TRL alone has CPO's `hinge` and `ipo`, AlphaPO (`alpha`) and label smoothing of SimPO.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from laws import one_update
from peer import (
    LOGPS,
    REWARDS,
    TOLERANCE,
    Ours,
    alone,
    as_demonstrations,
    assert_differ,
    assert_equal,
    assert_parity,
    assert_same_metrics,
    chosen,
    on_pairs,
    pairs,
    same,
    with_prompt,
)

from prefopt.batch import Batch
from prefopt.objectives import CPO, ORPO, SFT, SimPO

ROWS = pairs(5)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_cpo_without_its_likelihood_term(label_smoothing: float, tmp_path: Path) -> None:
    options = {"beta": 0.3, "label_smoothing": label_smoothing}
    peer = on_pairs("CPO", ROWS, tmp_path, loss_type="sigmoid", cpo_alpha=0.0, **options)
    assert_parity(peer, CPO(sft_weight=0.0, **options))


def test_metrics_of_one_name_have_one_value(tmp_path: Path) -> None:
    names = same(*REWARDS)
    cpo = on_pairs("CPO", ROWS, tmp_path, loss_type="sigmoid", cpo_alpha=0.0)
    assert_same_metrics(cpo, CPO(sft_weight=0.0), names | same(*LOGPS))
    simpo = on_pairs("CPO", ROWS, tmp_path, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
    assert_same_metrics(simpo, SimPO(beta=2.0, gamma_beta_ratio=0.5), names)
    orpo = on_pairs("ORPO", ROWS, tmp_path, beta=0.3)
    assert_same_metrics(orpo, ORPO(odds_weight=0.3), names | same("log_odds_chosen"))


def test_log_probs_are_logged_as_sums_where_trl_logs_the_means_it_computes_with(tmp_path: Path) -> None:
    """`logps/chosen` is one quantity here, whatever the objective: in TRL's SimPO and ORPO it is per token."""
    rows = ROWS[:1]
    peer = on_pairs("ORPO", rows, tmp_path)
    peer.said()
    length = len(chosen(rows[0]))
    metrics = one_update(ORPO(), Batch.of(rows), Ours().models).metrics
    assert metrics["logps/chosen"] == pytest.approx(length * peer.logged("logps/chosen"), rel=TOLERANCE)


def test_simpo(tmp_path: Path) -> None:
    peer = on_pairs("CPO", ROWS, tmp_path, loss_type="simpo", cpo_alpha=0.0, beta=2.5, simpo_gamma=1.0)
    assert_parity(peer, SimPO(beta=2.5, gamma_beta_ratio=0.4))


def test_the_likelihood_term_is_a_mean_per_completion_where_trl_averages_over_a_batchs_tokens(tmp_path: Path) -> None:
    """As DPO's `sft` term: on one row equal, over several TRL's depends on which rows share a forward pass."""
    peer, ours = on_pairs("CPO", ROWS, tmp_path, loss_type="sigmoid", cpo_alpha=0.7), Ours()
    assert_parity(peer, CPO(sft_weight=0.7), alone(len(ROWS)))
    assert_differ(ours.said(CPO(sft_weight=0.7), ROWS), peer.said())
    term = ours.said(SFT(), as_demonstrations(ROWS)).times(0.7)
    assert_equal(ours.said(CPO(sft_weight=0.0), ROWS) + term, peer.said())


def test_simpo_with_a_likelihood_term(tmp_path: Path) -> None:
    peer = on_pairs("CPO", ROWS, tmp_path, loss_type="simpo", cpo_alpha=0.5, beta=2.0, simpo_gamma=1.0)
    assert_parity(peer, SimPO(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.5), alone(len(ROWS)))


def test_orpo_on_prompts_of_one_token(tmp_path: Path) -> None:
    """TRL's likelihood term covers the prompt, but no token predicts a prompt's first: with one there is none to
    cover, and a row's loss is prefopt's.
    """
    rows = pairs(5, prompt=1)
    assert_parity(on_pairs("ORPO", rows, tmp_path, beta=0.3), ORPO(odds_weight=0.3), alone(len(rows)))


def test_orpo_learns_the_answers_where_trl_learns_the_prompts_too(tmp_path: Path) -> None:
    """TRL's likelihood term averages over all tokens of a batch, prompts included; the paper's is the chosen answer's.
    The odds ratio is the same: with the one term in place of the other, loss and gradient are TRL's.
    """
    peer, ours = on_pairs("ORPO", ROWS, tmp_path, beta=0.3), Ours()
    objective = ORPO(odds_weight=0.3)
    assert_differ(ours.said(objective, ROWS), peer.said())
    for rows in [*([example] for example in ROWS), ROWS]:
        answers = ours.said(ORPO(odds_weight=0.0), rows)
        whole = ours.said(SFT(), with_prompt(rows))
        theirs = peer.said([ROWS.index(example) for example in rows])
        assert_equal(ours.said(objective, rows) - answers + whole, theirs)
