"""Whole runs in which the policy writes the completions: what is learnt, said and kept, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from laws import largest_difference, save_model, weights, word_tokenizer, write_rows
from test_processes import launch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import prefopt
from prefopt import cli, config
from prefopt.objectives import EVERY, GRPO, PPO, RLOO, SFT
from prefopt.objectives.facts import fitted
from prefopt.preflight import PreflightError
from prefopt.recipes import online
from prefopt.records import InputError

FAST = {
    "batch_size": 8,
    "max_steps": 12,
    "num_completions": 6,
    "max_tokens": 4,
    "learning_rate": 1e-2,
    "eval_fraction": 0.25,
    "eval_completions": 2,
    "dtype": "float32",
}
ONLINE = [name for name, cls in EVERY.items() if cls.facts.data == "prompts"]


def functions() -> tuple[Any, Any]:
    """Rewards that travel to their processes whole: a function of this module would take its imports along."""

    def says_answer(completions: list[str], answer: list[str], **columns: Any) -> list[float]:
        """The share of words that are the row's answer."""
        return [said.split().count(word) / 4 for said, word in zip(completions, answer, strict=True)]

    def never(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    return says_answer, never


says_answer, never = functions()


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def prompts(tmp_path):
    return write_rows(tmp_path / "prompts.jsonl", "prompts")


def run(objective: Any, model: Path, data: Path, out: Path, **options: Any) -> Any:
    given = {"reward": says_answer, **FAST, **options}
    return prefopt.train(objective=objective, model=model, data=data, out=out, **given)


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- what is learnt


@pytest.mark.parametrize("name", ONLINE)
def test_every_objective_on_prompts_raises_the_reward_of_held_out_prompts(name, model_dir, prompts, tmp_path):
    rate = {"gspo": 2e-2}.get(name, FAST["learning_rate"])
    result = run(EVERY[name](), model_dir, prompts, tmp_path / "run", max_steps=15, learning_rate=rate)
    change = result.summary["held_out"]["reward"]
    assert change["gain"]["value"] > 0.15 and change["gain"]["low"] > 0
    assert change["end"]["value"] == pytest.approx(result.summary["end"]["eval/reward"])
    assert change["start"]["low"] <= change["start"]["value"] <= change["start"]["high"]
    AutoModelForCausalLM.from_pretrained(result.model_dir)


def test_a_rollout_may_serve_several_updates_and_passes(model_dir, prompts, tmp_path):
    result = run(
        RLOO(beta=0.01), model_dir, prompts, tmp_path / "run", rollout_batches=2, rollout_passes=2, max_steps=8
    )
    steps = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert ["reward" in line for line in steps] == [True, False, False, False] * 2
    # the first update of a rollout starts from the policy that drew it, the later ones do not
    assert [abs(line["ratio"] - 1) < 1e-6 for line in steps] == [True, False, False, False] * 2
    assert result.summary["steps"] == 8


def test_epochs_count_updates_with_every_pass(model_dir, prompts, tmp_path):
    result = run(GRPO(), model_dir, prompts, tmp_path / "run", max_steps=None, epochs=1, rollout_passes=2)
    assert result.summary["data"]["rows"] == 18 and result.summary["steps"] == 6  # 3 updates of 8 prompts, twice
    assert result.summary["end"]["epoch"] == pytest.approx(24 / 18)


@pytest.mark.parametrize("options", [{"lora_rank": 4}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_adapters_checkpointing_and_16_bits_learn_too(options, model_dir, prompts, tmp_path):
    result = run(RLOO(beta=0.01), model_dir, prompts, tmp_path / "run", **options)
    assert result.summary["end"]["eval/reward"] > result.summary["start"]["eval/reward"] + 0.1
    assert result.summary["end"]["sampler_gap"] < (2e-2 if "dtype" in options else 1e-4)


def test_training_scores_the_temperature_that_was_sampled(model_dir, prompts, tmp_path):
    for heat in (0.7, 1.6):
        result = run(RLOO(beta=0.1), model_dir, prompts, tmp_path / str(heat), temperature=heat, max_steps=2)
        assert result.summary["end"]["sampler_gap"] < 1e-5
        assert result.summary["start"]["kl_reference"] == pytest.approx(0, abs=1e-6)


def test_another_models_directory_scores_the_temperature_too_when_it_is_the_reference(model_dir, prompts, tmp_path):
    options = {"temperature": 0.7, "reference_model": model_dir, "max_steps": 1, "eval_fraction": 0.0}
    result = run(RLOO(beta=0.1), model_dir, prompts, tmp_path / "run", **options)
    assert result.summary["start"]["kl_reference"] == pytest.approx(0, abs=1e-5)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(model_dir, prompts, tmp_path):
    ends = []
    for number, seed in enumerate((3, 3, 4)):
        result = run(GRPO(), model_dir, prompts, tmp_path / str(number), seed=seed, eval_data=prompts, max_steps=3)
        ends.append(weights(AutoModelForCausalLM.from_pretrained(result.model_dir)))
    assert largest_difference(ends[0], ends[1]) == 0
    assert largest_difference(ends[0], ends[2]) > 1e-4


def test_ppo_keeps_its_critic_beside_the_policy(model_dir, prompts, tmp_path):
    result = run(PPO(), model_dir, prompts, tmp_path / "run", num_completions=2)
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "critic")
    assert critic.config.num_labels == 1 and critic.score.weight.abs().max() > 0
    again = run(
        PPO(), model_dir, prompts, tmp_path / "again", num_completions=2, critic_model=str(tmp_path / "run" / "critic")
    )
    assert again.summary["start"]["value/explained_variance"] > result.summary["start"]["value/explained_variance"]


def test_keep_best_goes_by_the_held_out_reward(model_dir, prompts, tmp_path):
    out = tmp_path / "run"
    result = run(GRPO(), model_dir, prompts, out, keep="best", eval_every=2, learning_rate=0.1, max_steps=6)
    seen = {line["step"]: line["eval/reward"] for line in lines(out) if "eval/reward" in line}
    assert seen[result.summary["best_step"]] == max(seen.values()) == result.summary["end"]["eval/reward"]


# ---------------------------------------------------------------- what is said and kept


def test_completions_are_kept_with_their_reward_and_its_parts(model_dir, prompts, tmp_path, capsys):
    def short(completions, **columns):
        return [-0.01 * len(said.split()) for said in completions]

    out = tmp_path / "run"
    result = run(GRPO(), model_dir, prompts, out, reward=[says_answer, short], save_completions=None, max_steps=2)
    rows = lines(out, "completions.jsonl")
    assert len(rows) == 2 * 8 * 6 and {row["step"] for row in rows} == {1, 2}
    for row in rows:
        assert row["parts"].keys() == {"says_answer", "short"}
        assert row["reward"] == pytest.approx(sum(row["parts"].values()))
        assert row["prompt"].endswith(" :") and row["where"].startswith(str(prompts))
    first = next(line for line in lines(out) if "loss" in line)
    mean = sum(row["parts"]["says_answer"] for row in rows if row["step"] == 1) / 48
    assert first["reward/says_answer"] == pytest.approx(mean)
    assert result.summary["rewards"]["says_answer"]["scored"] > 96  # held-out ones too
    assert "\n> " in capsys.readouterr().err
    assert config.read_recipe(out / "config.yaml")["reward"] == ["says_answer", "short"]


@pytest.mark.fault(18)
def test_a_task_that_is_never_rewarded_is_reported_as_stalled(model_dir, prompts, tmp_path, capsys):
    result = run(GRPO(), model_dir, prompts, tmp_path / "run", reward=never, stall_window=4, max_steps=5)
    stalled = result.summary["stalled"]
    assert stalled["since"] == 1 and stalled["recovered"] is None and stalled["failed"] == 1.0
    # 5 rollouts seen, the window holds 4 of 8 x 6 completions: 1 - 0.05^(1/192)
    assert stalled["p_upper"] == pytest.approx(0.01548, rel=1e-3)
    assert capsys.readouterr().err.count("learning has stalled") == 1


def test_easier_prompts_are_mixed_in(model_dir, prompts, tmp_path):
    easy = tmp_path / "easy.jsonl"
    easy.write_text("\n".join(json.dumps({"prompt": "red red red :", "answer": "good"}) for _ in range(3)))
    out = tmp_path / "run"
    run(
        GRPO(), model_dir, prompts, out, easier_data=str(easy), easier_share=0.25, save_completions=None, max_steps=2
    )  # fmt: skip
    for step in (1, 2):
        asked = [row["prompt"] for row in lines(out, "completions.jsonl") if row["step"] == step]
        assert asked.count("red red red :") == 2 * 6


def test_a_reward_model_and_a_function_of_a_file_are_rewards_too(model_dir, prompts, tmp_path):
    pairs = write_rows(tmp_path / "pairs.jsonl", "pairs")
    judge = prefopt.train(
        objective=EVERY["reward"](), model=model_dir, data=pairs, out=tmp_path / "reward", max_steps=8, batch_size=8,
        learning_rate=1e-2, dtype="float32",
    ).model_dir  # fmt: skip
    file = tmp_path / "mine.py"
    file.write_text("def even(completions, **columns):\n    return [len(c.split()) % 2 for c in completions]\n")
    result = run(GRPO(), model_dir, prompts, tmp_path / "run", reward=[str(judge), f"{file}:even"], max_steps=2)
    assert {"reward/reward", "reward/even"} <= result.summary["end"].keys()
    recipe = config.read_recipe(tmp_path / "run" / "config.yaml")
    assert recipe["reward"] == [str(judge), f"{file}:even"]


@pytest.mark.fault(17)
def test_completions_that_cannot_be_scored_stop_the_run_and_say_why(model_dir, prompts, tmp_path):
    def silent(completions, **columns):
        return [None] * len(completions)

    with pytest.raises(InputError, match="3 rollouts in a row without a single score; the first reason: abstained"):
        run(GRPO(), model_dir, prompts, tmp_path / "run", reward=silent)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (GRPO(), {"num_completions": 1}, "num_completions: grpo compares the completions of a prompt and needs"),
        (GRPO(), {"max_tokens": 1024}, "max_length=1024 is for prompt and completion together"),
        (GRPO(), {"max_tokens": 125}, r"a prompt and max_tokens=125 make 1\d\d tokens and the model's context is 128"),
        (GRPO(), {"reference": "copy"}, "grpo reads no reference with beta 0; set beta above 0, or leave out"),
        (RLOO(beta=0.1), {"reference": "cache"}, "reference: cache cannot serve rloo"),
        (GRPO(), {"shard": True}, "shard: processes that share the weights cannot draw completions of unequal lengths"),
        (GRPO(), {"reward": "meth"}, r"reward: 'meth' is not one; did you mean math\?"),
        (GRPO(), {"reward": []}, "reward: none is named"),
        (GRPO(), {"reward": "no_such.py:f"}, "there is no file no_such.py"),
        (GRPO(), {"eval_metric": "eval/vibes", "keep": "best"}, "eval_metric: eval/vibes is not measured"),
        (GRPO(), {"temperature": 0}, "temperature 0 makes all completions of a prompt the same"),
        (SFT(), {"num_completions": 4}, "num_completions: not an option here; it belongs to .*grpo"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_training(objective, options, message, model_dir, prompts, tmp_path):
    given = {**(FAST if objective != SFT() else {}), "reward": says_answer, **options}
    given = {name: value for name, value in given.items() if objective != SFT() or name != "reward"}
    with pytest.raises(InputError, match=message):
        prefopt.train(objective=objective, model=model_dir, data=prompts, out=tmp_path / "run", **given)


@pytest.mark.fault(30)
def test_a_sampler_that_draws_from_another_distribution_stops_the_run(model_dir, prompts, tmp_path, monkeypatch):
    from prefopt.models.sampler import Local

    plain = Local.sample

    def other(self, asked, n, sampling, seeds):
        drawn = plain(self, asked, n, sampling, seeds)
        return [[one._replace(logp=[x - 0.1 for x in one.logp]) for one in own] for own in drawn]

    monkeypatch.setattr(Local, "sample", other)
    with pytest.raises(PreflightError, match=r"the sampler's log-probs differ from the policy's by 1\.0e-01"):
        run(GRPO(), model_dir, prompts, tmp_path / "run")


def test_truncated_sampling_is_said_with_its_remedy(model_dir, prompts, tmp_path, capsys):
    run(GRPO(correction="token"), model_dir, prompts, tmp_path / "run", top_k=5, max_steps=1)
    assert "top_k, top_p or min_p leave some tokens out" in capsys.readouterr().err


# ---------------------------------------------------------------- rows and options


def test_prompts_keep_every_column_of_their_row_and_leave_room_for_the_answer(tmp_path):
    rows = [
        {"question": "red cat", "answer": "good", "level": 3},
        {"question": "red " * 20, "answer": "bad"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = prefopt.load_data(
        data, word_tokenizer(), "prompts", prefopt.data.DataOptions(max_length=20), answer_tokens=10
    )
    assert found.dropped == {"prompt leaves less than 10 tokens in max_length 20": 1}
    [prompt] = online.prompts_of(found)
    assert prompt.columns == rows[0] and prompt.asked == "red cat\n"


def test_options_that_follow_from_the_rollout_are_settled_and_said(model_dir, prompts, tmp_path, capsys):
    objective = EVERY["dr_grpo"]()
    result = run(objective, model_dir, prompts, tmp_path / "run", max_steps=1)
    assert result.summary["settled"] == {"length": 4}
    assert fitted(objective, 4, 6).length == 4
    assert "length: 4.0, from the rollout options" in capsys.readouterr().err


def test_the_command_line_names_rewards(model_dir, prompts, tmp_path, capsys):
    words = [f"{name}={value}" for name, value in FAST.items() if name != "max_steps"]
    given = ["train", "grpo", "--model", str(model_dir), "--data", str(prompts), "--reward", "exact", *words]
    code = cli.main([*given, "--reward", "repetition", "--out", str(tmp_path / "run"), "max_steps=1", "--json"])
    assert code == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["objective"] == "grpo" and summary["rewards"].keys() == {"exact", "repetition"}
    assert cli.main([*given, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == 18
    assert cli.main([*given[:6], "--reward", "meth", "--dry-run"]) == 2
    assert "'meth' is not one" in capsys.readouterr().err


def test_only_objectives_on_prompts_have_the_options_of_rollouts(capsys):
    for name in ("grpo", "dpo"):
        assert cli.main(["train", name, "--help"]) == 0
    grpo, dpo = capsys.readouterr().out.split("Direct preference optimisation")
    for option in ("num_completions=8", "  reward=", "easier_data=null", "judge_url="):
        assert option in grpo and option not in dpo


# ---------------------------------------------------------------- several processes


def rewarding(folder: Path, body: str) -> str:
    """A reward in a file of its own, where every process finds it."""
    file = folder / "mine.py"
    file.write_text(f"import os\ndef mine(completions, answer, **columns):\n    {body}\n", encoding="utf-8")
    return f"{file}:mine"


COUNTED = "return [said.split().count(word) / 4 for said, word in zip(completions, answer)]"


def test_two_processes_draw_score_and_learn_what_one_does(model_dir, prompts, tmp_path):
    given = {
        "reward": rewarding(tmp_path, COUNTED),
        "batch_size": 5,
        "rollout_batches": 2,
        "dynamic_sampling": True,
        "curriculum": "success",
        "save_completions": None,
        "max_steps": 4,
    }
    run(RLOO(beta=0.01), model_dir, prompts, tmp_path / "1", **given)
    named = {
        "objective": "rloo",
        "settings": {"beta": 0.01},
        "model": model_dir,
        "data": prompts,
        "out": tmp_path / "2",
    }
    done = launch(2, tmp_path, [{**FAST, **given, **named}])
    assert done.returncode == 0, done.stderr
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / str(at) / "model") for at in (1, 2))
    assert largest_difference(weights(one), weights(two)) < 1e-5
    told = [[line for line in lines(tmp_path / str(at)) if "reward" in line] for at in (1, 2)]
    for alone, together in zip(*told, strict=True):
        for name in ("reward", "reward_std", "zero_variance/failed", "effective_groups", "epoch", "completion_length"):
            assert together[name] == pytest.approx(alone[name]), name
    kept = [sorted(row["completion"] for row in lines(tmp_path / str(at), "completions.jsonl")) for at in (1, 2)]
    assert kept[0] == kept[1]


def test_a_reward_that_fails_on_one_process_stops_all_with_its_reason(model_dir, prompts, tmp_path):
    reward = rewarding(tmp_path, 'assert os.environ["RANK"] == "0", "out of paper"\n    ' + COUNTED)
    given = {**FAST, "objective": "grpo", "model": str(model_dir), "data": str(prompts), "reward": reward}
    done = launch(2, tmp_path, [{**given, "out": str(tmp_path / "run")}])  # TimeoutExpired where one waits on
    assert done.returncode != 0 and "out of paper" in done.stderr
