"""What runs on the policy's own completions count, refuse and say before they begin."""

from __future__ import annotations

import json

import pytest
from laws import save_model, write_rows
from test_online import FAST, run, says_answer

from prefopt.objectives import BNPO, GRPO, PPO, MaxRL
from prefopt.recipes import train
from prefopt.records import InputError


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", "prompts")


@pytest.mark.parametrize(
    ("objective", "penalty", "refused"),
    [
        (MaxRL(), 1.0, True),
        (BNPO(), 1.0, True),
        (BNPO(lowest=-1.0), 1.0, False),
        (BNPO(lowest=-1.0), 2.0, True),
        (GRPO(), 1.0, False),
    ],
)
def test_a_penalty_that_takes_rewards_out_of_their_range_is_refused(objective, penalty, refused, model_dir, prompts):
    given = {"model": str(model_dir), "data": str(prompts), "out": "unused", "reward": says_answer, **FAST}
    given |= {"unfinished": "penalty", "unfinished_penalty": penalty}
    if not refused:
        assert train.plan(objective=objective, **given).steps == 12
        return
    with pytest.raises(InputError, match=f"{objective.facts.name} takes no reward below .*; use unfinished: keep"):
        train.plan(objective=objective, **given)


def test_dynamic_sampling_of_single_completions_is_refused(model_dir, prompts, tmp_path):
    with pytest.raises(InputError, match="num_completions=1 leaves nothing to differ"):
        run(PPO(), model_dir, prompts, tmp_path / "run", num_completions=1, dynamic_sampling=True)


def test_an_epoch_goes_once_through_the_data_beside_easier_prompts(model_dir, prompts, tmp_path):
    easy = tmp_path / "easy.jsonl"
    easy.write_text(json.dumps({"prompt": "red red red :", "answer": "good"}))
    given = {"max_steps": None, "epochs": 1, "easier_data": str(easy)}
    result = run(GRPO(), model_dir, prompts, tmp_path / "run", **given)
    # 18 prompts, 4 of the 8 in an update: 5 updates, of which the last begins another epoch
    assert result.summary["data"]["rows"] == 18 and result.summary["steps"] == 5
    assert result.summary["end"]["epoch"] == pytest.approx(20 / 18)


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, True), ({"critic": "shared"}, False), ({"learning_rate": 1e-4}, False), ({"lora_rank": 0}, False)],
    ids=str,
)
def test_a_critic_at_the_rate_of_adapters_is_said(options, said, model_dir, prompts, tmp_path, capsys):
    given = {"lora_rank": 4, "learning_rate": None, "max_steps": 1, "num_completions": 2, **options}
    run(PPO(), model_dir, prompts, tmp_path / "run", **given)
    assert ("critic: trained whole at the adapter's learning rate, 3e-05" in capsys.readouterr().err) == said
