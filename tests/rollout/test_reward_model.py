"""A reward model as a reward: the scores of plain transformers; where there is none, none with a reason."""

from __future__ import annotations

import logging
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from laws import gpt_neox, save_model, word_tokenizer, write_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.load import ModelOptions, load
from prefopt.records import InputError, Sample, Score
from prefopt.rollout import reward_model
from prefopt.rollout.reward_model import RewardModelOptions, RewardModelReward

EXACT = ModelOptions(dtype="float32")
ROLES = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A reward model with a head that was drawn at random, so that every text has a score of its own."""
    where: Path = tmp_path_factory.mktemp("models") / "taste"
    model, tokenizer = gpt_neox(3, torch.float32, head="completion"), word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.chat_template = ROLES
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def reward(folder: Path) -> RewardModelReward:
    return RewardModelReward(folder, EXACT)


def plain(folder: Path, text: str) -> float:
    """The score of one text by transformers alone."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    ids = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        return float(model.eval()(**ids).logits[0, 0])


def values(scores: list[Score]) -> list[float | None]:
    return [score.value for score in scores]


def test_scores_are_those_of_plain_transformers_in_the_order_asked(reward, folder):
    samples = [
        Sample("red cat :", " good"),
        Sample("blue :", " bad dog runs", group=1),
        Sample("red cat :", " sleeps here", group=0),
        Sample("red cat :", " good"),
    ]
    expected = [plain(folder, f"{own.prompt}{own.completion}</s>") for own in samples]
    assert values(reward(samples)) == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3 and reward.name == "taste"
    assert reward([]) == []


def test_messages_are_rendered_by_the_reward_models_own_template(reward, folder):
    asked = [{"role": "user", "content": "red cat"}]
    [score] = reward([Sample(asked, [{"role": "assistant", "content": "good dog"}])])
    assert score.value == pytest.approx(plain(folder, "user : red cat assistant : good dog </s>"), abs=1e-5)


def test_the_budget_and_the_neighbours_change_no_score(folder, reward):
    samples = [Sample("red cat :", " good" * n, group=0) for n in range(1, 12)]
    samples += [Sample("blue :", " bad" * n, group=1) for n in range(1, 5)]
    whole = values(reward(samples))
    for tokens in (1, 16, 40):
        small = RewardModelReward(folder, EXACT, RewardModelOptions(reward_model_tokens=tokens))
        assert values(small(samples)) == pytest.approx(whole, abs=1e-5)
    assert values(reward(samples[3:4])) == pytest.approx(whole[3:4], abs=1e-5)


def test_a_prompt_is_read_once_for_its_completions(reward, monkeypatch):
    seen = []
    scores = reward_model.completion_scores
    monkeypatch.setattr(
        reward_model,
        "completion_scores",
        lambda policy, examples, tokens: seen.extend(examples) or scores(policy, examples, tokens),
    )
    reward([Sample("red cat :", f" {word}") for word in ("good", "bad", "one")])
    assert [len(example.completions) for example in seen] == [3]


def test_what_cannot_be_scored_is_none_with_a_reason_and_the_others_stay(folder):
    reward = RewardModelReward(folder, EXACT, RewardModelOptions(reward_model_length=8))
    turns = [{"role": "assistant", "content": "good"}]
    found = reward(
        [
            Sample("red :", " good"),
            Sample("red :", " good" * 20),
            Sample("red :", "  "),
            Sample("red :", turns),
            Sample([{"role": "user", "content": "red"}], turns),
        ]
    )
    assert [score.value is None for score in found] == [False, True, True, True, False]
    assert "23 tokens, where the reward model reads 8" in found[1].why
    assert "empty" in found[2].why and "not both" in found[3].why


def test_the_context_of_the_model_is_the_limit(reward):
    [score] = reward([Sample("red :", " good" * 1000)])
    assert score.value is None and "where the reward model reads" in score.why


def test_a_score_that_is_no_number_is_none(folder):
    reward = RewardModelReward(folder, EXACT)
    with torch.no_grad():
        reward.policy.scorer.layer.weight.fill_(math.inf)
    [score] = reward([Sample("red :", " good")])
    assert score.value is None and "not a finite number" in score.why


def test_an_adapter_on_a_reward_model_scores_too(folder, tmp_path):
    start = save_model(tmp_path / "start", architecture="gpt_neox")
    loaded = load(start, EXACT, head="completion")
    adapted = adapt(loaded.model, LoraOptions(lora_rank=2))
    adapted.save_pretrained(tmp_path / "adapter")
    loaded.tokenizer.save_pretrained(tmp_path / "adapter")
    [score] = RewardModelReward(tmp_path / "adapter", EXACT)([Sample("red :", " good")])
    assert score.value is not None


def test_a_language_model_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(InputError, match="not a reward model; train one with `prefopt train reward"):
        RewardModelReward(save_model(tmp_path / "m"), EXACT)


# ---------------------------------------------------------------- normalisation

SAMPLES = [Sample("red :", f" {word}") for word in ("good", "bad", "one", "two")]


def scaled(folder: Path, scale: str) -> RewardModelReward:
    return RewardModelReward(folder, EXACT, RewardModelOptions(reward_model_scale=scale))


def test_the_first_batch_sets_the_scale_for_all_later_ones(folder, reward, caplog):
    raw, later = values(reward(SAMPLES)), values(reward(SAMPLES[:1]))
    first = scaled(folder, "first")
    with caplog.at_level(logging.INFO, "prefopt"):
        found = first(SAMPLES)
    assert statistics.fmean(values(found)) == pytest.approx(0, abs=1e-6)
    assert statistics.stdev(values(found)) == pytest.approx(1)
    assert [score.parts["raw"] for score in found] == pytest.approx(raw)
    assert "of the first batch" in caplog.text
    [again] = values(first(SAMPLES[:1]))
    assert again == pytest.approx((later[0] - statistics.fmean(raw)) / statistics.stdev(raw), abs=1e-5)


def test_demonstrations_set_the_scale_before_anything_is_scored(folder, tmp_path):
    data = write_rows(tmp_path / "demos.jsonl", "demonstrations", num=16)
    once, twice = (scaled(folder, str(data)) for _ in range(2))
    assert once.deviation > 0 and (once.mean, once.deviation) == (twice.mean, twice.deviation)


def test_given_numbers_are_the_scale(folder, reward):
    raw = values(reward(SAMPLES))
    assert values(scaled(folder, "0.5,2")(SAMPLES)) == pytest.approx([(value - 0.5) / 2 for value in raw], abs=1e-6)


@pytest.mark.parametrize("scale", ["0,0", "0,-1", "nan,1", "0,inf", "nowhere.jsonl"])
def test_a_scale_that_is_none_is_refused(folder, scale):
    with pytest.raises(InputError, match="reward_model_scale"):
        scaled(folder, scale)


def test_a_first_batch_without_spread_is_no_scale(folder):
    with pytest.raises(InputError, match="1 scores of the first batch have no spread"):
        scaled(folder, "first")(SAMPLES[:1])


def test_a_model_of_a_run_is_called_by_the_runs_name(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "taste-3" / "model")
    assert RewardModelReward(tmp_path / "taste-3" / "model", EXACT).name == "taste-3"


def test_without_a_scale_there_are_no_parts(reward):
    assert all(score.parts == {} for score in reward(SAMPLES))
