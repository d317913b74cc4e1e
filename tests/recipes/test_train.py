"""Whole runs on a tiny model: what comes out loads elsewhere, and what cannot work is refused before it starts."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import transformers
import yaml
from laws import largest_difference, save_model, weights, word_tokenizer, write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefopt
from prefopt import config, metrics
from prefopt.batch import Batch, Ragged
from prefopt.commands.train import train as run_command
from prefopt.models.heads import AUTO
from prefopt.models.policy import Policy
from prefopt.models.reference import ReferenceOptions
from prefopt.objectives import DPO, EVERY, SFT, ProcessReward
from prefopt.objectives.facts import Facts
from prefopt.preflight import PreflightError
from prefopt.recipes import train as recipe
from prefopt.recipes.lock import Lock
from prefopt.recipes.updates import Following
from prefopt.records import Example, InputError

# those on prompts have a file of their own, test_online.py
OFFLINE = {name: cls() for name, cls in EVERY.items() if cls.facts.data != "prompts"}
FAST = {"batch_size": 8, "max_steps": 3, "eval_fraction": 0.25, "learning_rate": 1e-2, "dtype": "float32"}


@pytest.fixture
def model_dir(tmp_path):
    return save_model(tmp_path / "model")


@pytest.fixture
def pairs(tmp_path):
    return write_rows(tmp_path / "pairs.jsonl", "pairs")


@pytest.fixture
def demonstrations(tmp_path):
    return write_rows(tmp_path / "demonstrations.jsonl", "demonstrations")


def run(objective: Any, model: Path, data: Path, out: Path, **options: Any) -> Any:
    return prefopt.train(objective=objective, model=model, data=data, out=out, **{**FAST, **options})


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluations(out: Path) -> list[dict[str, Any]]:
    return [line for line in journal(out) if "eval/loss" in line]


def plain_logp(model: Any, example: Example) -> list[float]:
    """Sum of each completion's token log-probs by plain transformers, nats."""
    found = []
    for completion in example.completions:
        ids = torch.tensor([[*example.prompt, *completion]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].float().log_softmax(-1)
        found.append(sum(float(logp[len(example.prompt) + i - 1, token]) for i, token in enumerate(completion)))
    return found


def held_out_loss(result: Any, model: Any, reference: Any, beta: float = 0.1) -> float:
    """The DPO loss of a run's held-out rows, from nothing but transformers and the formula."""
    given = config.read_recipe(result.model_dir.parent / "config.yaml")
    given.pop("objective")
    settings = config.resolve(config.sections("dpo"), given)
    _, held_out = recipe._read(DPO(), settings, word_tokenizer())
    losses = []
    for example in held_out.examples:
        ratio = torch.tensor(plain_logp(model, example)) - torch.tensor(plain_logp(reference, example))
        assert example.scores == [1.0, 0.0]
        losses.append(-torch.nn.functional.logsigmoid(beta * (ratio[0] - ratio[1])).item())
    return sum(losses) / len(losses)


# ---------------------------------------------------------------- what comes out


def test_sft_lowers_the_held_out_loss_and_the_result_loads_in_plain_transformers(model_dir, demonstrations, tmp_path):
    result = run(SFT(), model_dir, demonstrations, tmp_path / "run", max_steps=8)
    assert result.summary["end"]["eval/loss"] < result.summary["start"]["eval/loss"] - 0.1
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(result.model_dir),
        AutoTokenizer.from_pretrained(result.model_dir),
    )
    assert largest_difference(weights(model), weights(AutoModelForCausalLM.from_pretrained(model_dir))) > 1e-3
    assert tokenizer("red cat : good")["input_ids"] == word_tokenizer()("red cat : good")["input_ids"]
    ids = torch.tensor([tokenizer("red cat :")["input_ids"]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 6


def test_dpo_result_gives_in_plain_transformers_the_loss_that_the_run_reported(model_dir, pairs, tmp_path):
    result = run(DPO(), model_dir, pairs, tmp_path / "run", max_steps=6)
    model, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (result.model_dir, model_dir))
    assert result.summary["start"]["eval/loss"] == pytest.approx(0.693147, abs=1e-4)
    assert result.summary["end"]["eval/loss"] == pytest.approx(held_out_loss(result, model, start), abs=1e-5)
    assert result.summary["end"]["eval/loss"] < 0.66


def test_lora_result_is_an_adapter_that_gives_the_loss_the_run_reported(model_dir, pairs, tmp_path):
    result = run(DPO(), model_dir, pairs, tmp_path / "run", max_steps=6, lora_rank=4)
    start = AutoModelForCausalLM.from_pretrained(model_dir)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), result.model_dir)
    assert not list(result.model_dir.glob("model*.safetensors"))
    assert result.summary["end"]["eval/loss"] == pytest.approx(held_out_loss(result, model, start), abs=1e-5)
    assert result.summary["end"]["eval/loss"] < 0.68


def test_a_continued_adapter_takes_its_own_start_as_reference(model_dir, demonstrations, pairs, tmp_path):
    first = run(SFT(), model_dir, demonstrations, tmp_path / "sft", max_steps=8, lora_rank=4).model_dir
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    start = PeftModel.from_pretrained(base, first)
    for where in ("cache", "adapter"):
        result = run(DPO(), first, pairs, tmp_path / where, max_steps=6, reference=where)
        assert result.summary["start"]["eval/loss"] == pytest.approx(0.693147, abs=1e-4)
        end = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), result.model_dir)
        assert {path.name for path in result.model_dir.iterdir() if path.is_dir()} == set()
        assert result.summary["end"]["eval/loss"] == pytest.approx(held_out_loss(result, end, start), abs=1e-5)


def test_all_places_of_the_reference_give_the_same_weights(model_dir, pairs, tmp_path):
    ends = {
        name: weights(
            AutoModelForCausalLM.from_pretrained(run(DPO(), model_dir, pairs, tmp_path / name, **options).model_dir)
        )
        for name, options in {
            "cache": {"reference": "cache"},
            "copy": {"reference": "copy"},
            "self": {"reference_model": str(model_dir)},
            "self copied": {"reference_model": str(model_dir), "reference": "copy"},
        }.items()
    }
    for end in ends.values():
        assert largest_difference(end, ends["cache"]) < 1e-5


def test_another_reference_model_is_the_one_that_counts(model_dir, pairs, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    result = run(DPO(), model_dir, pairs, tmp_path / "run", reference_model=other)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (result.model_dir, other))
    assert abs(result.summary["start"]["eval/loss"] - 0.693147) > 1e-3
    assert result.summary["end"]["eval/loss"] == pytest.approx(held_out_loss(result, model, reference), abs=1e-5)


def test_second_run_takes_the_reference_from_the_cache(model_dir, pairs, tmp_path, capsys):
    run(DPO(), model_dir, pairs, tmp_path / "first")
    assert "0 rows from the cache, 24 computed" in capsys.readouterr().err
    run(DPO(), model_dir, pairs, tmp_path / "second")
    assert "24 rows from the cache, 0 computed" in capsys.readouterr().err
    run(DPO(), save_model(tmp_path / "other", seed=1), pairs, tmp_path / "third")
    assert "0 rows from the cache, 24 computed" in capsys.readouterr().err


@pytest.mark.parametrize("objective", OFFLINE.values(), ids=list(OFFLINE))
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_gradient_checkpointing_changes_memory_only(objective, lora_rank, model_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", objective.facts.data)
    ends = []
    for on in (False, True):
        result = run(objective, model_dir, data, tmp_path / str(on), gradient_checkpointing=on, lora_rank=lora_rank)
        ends.append(result.summary["end"])
    assert ends[1]["grad_norm"] == pytest.approx(ends[0]["grad_norm"], rel=1e-4)
    assert ends[1]["eval/loss"] == pytest.approx(ends[0]["eval/loss"], rel=1e-5)


@pytest.mark.parametrize("objective", OFFLINE.values(), ids=list(OFFLINE))
def test_bfloat16_weights_learn_and_stay_bfloat16(objective, model_dir, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", objective.facts.data)
    # in float32 too, IPO overshoots its margin at the rate of the others, and KTO, whose loss is bounded, learns slower
    rate = {"ipo": 3e-3, "kto": 3e-2}.get(objective.facts.name, FAST["learning_rate"])
    result = run(objective, model_dir, data, tmp_path / "run", dtype="bfloat16", max_steps=8, learning_rate=rate)
    assert result.summary["end"]["eval/loss"] < result.summary["start"]["eval/loss"] - 0.02
    model = getattr(transformers, AUTO[objective.facts.head]).from_pretrained(result.model_dir, dtype="auto")
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_same_seed_gives_the_same_weights_and_another_seed_others(lora_rank, model_dir, pairs, tmp_path):
    """The seed decides the order of the data and, with an adapter, its first weights."""
    ends = []
    for number, seed in enumerate((3, 3, 4)):
        given = {"seed": seed, "lora_rank": lora_rank, "eval_data": pairs}  # the same rows are trained on
        result = run(DPO(), model_dir, pairs, tmp_path / str(number), **given)
        model = AutoModelForCausalLM.from_pretrained(model_dir if lora_rank else result.model_dir)
        ends.append(weights(PeftModel.from_pretrained(model, result.model_dir) if lora_rank else model))
    assert largest_difference(ends[0], ends[1]) == 0
    assert largest_difference(ends[0], ends[2]) > 1e-4


# ---------------------------------------------------------------- the best weights


def test_keep_best_writes_the_weights_of_the_best_evaluation(model_dir, pairs, tmp_path):
    """At this rate the loss ends above its best: the weights kept must be the ones that had the best."""
    out = tmp_path / "run"
    options = {"keep": "best", "eval_every": 1, "learning_rate": 0.1, "max_steps": 8, "schedule": "constant"}
    result = run(DPO(), model_dir, pairs, out, **options)
    seen = {line["step"]: line["eval/loss"] for line in evaluations(out)}
    best = min(seen, key=lambda step: seen[step])
    assert best not in (0, 8)
    assert result.summary["best_step"] == best
    model, start = (AutoModelForCausalLM.from_pretrained(folder) for folder in (result.model_dir, model_dir))
    assert held_out_loss(result, model, start) == pytest.approx(seen[best], abs=1e-4)


def test_summary_and_card_report_the_weights_that_were_kept(model_dir, pairs, tmp_path):
    out = tmp_path / "run"
    options = {"keep": "best", "eval_every": 1, "learning_rate": 0.1, "max_steps": 8, "schedule": "constant"}
    result = run(DPO(), model_dir, pairs, out, **options)
    best = min(line["eval/loss"] for line in evaluations(out))
    assert result.summary["end"]["eval/loss"] == best
    assert f"| eval/loss | 0.6931 | {best:.4g} |" in (result.model_dir / "README.md").read_text(encoding="utf-8")


def test_keep_best_by_a_metric_where_more_is_better(model_dir, pairs, tmp_path):
    out = tmp_path / "run"
    result = run(
        DPO(), model_dir, pairs, out, keep="best", eval_every=1, eval_metric="eval/rewards/accuracies", max_steps=5
    )
    seen = [(line["eval/rewards/accuracies"], -line["step"]) for line in evaluations(out)]
    assert result.summary["best_step"] == -max(seen)[1]


def test_keep_best_by_a_likelihood_keeps_the_lowest(model_dir, demonstrations, tmp_path):
    """At this rate it ends above its best and far below its start."""
    options = {"keep": "best", "eval_every": 1, "eval_metric": "eval/nll", "learning_rate": 0.1, "max_steps": 8}
    result = run(SFT(), model_dir, demonstrations, tmp_path / "run", **options, schedule="constant")
    seen = {line["step"]: line["eval/nll"] for line in evaluations(tmp_path / "run")}
    assert (
        result.summary["best_step"] == min(seen, key=lambda step: seen[step]) != max(seen, key=lambda step: seen[step])
    )


def test_keep_best_by_a_metric_without_a_better_way_names_those_that_have_one(
    model_dir, pairs, tmp_path, nothing_loads
):
    message = r"neither a high nor a low eval/logps/chosen is better .* eval/loss \(lower\).*accuracies \(higher\)"
    with pytest.raises(InputError, match=message):
        run(DPO(), model_dir, pairs, tmp_path / "run", keep="best", eval_metric="eval/logps/chosen")


def test_keep_best_by_a_metric_that_is_not_measured_says_which_are(model_dir, pairs, tmp_path):
    with pytest.raises(InputError, match=r"eval_metric: eval/win_rate is not measured; choose one of .*eval/loss"):
        run(DPO(), model_dir, pairs, tmp_path / "run", keep="best", eval_metric="eval/win_rate")


def test_keep_best_without_a_held_out_row_is_refused(model_dir, tmp_path):
    with pytest.raises(InputError, match="keep: best needs held-out rows"):
        run(DPO(), model_dir, write_rows(tmp_path / "one.jsonl", "pairs", 1), tmp_path / "run", keep="best")
    with pytest.raises(InputError, match="keep: best needs held-out rows"):
        run(
            DPO(),
            model_dir,
            write_rows(tmp_path / "two.jsonl", "pairs", 2),
            tmp_path / "run",
            keep="best",
            eval_fraction=0.0,
        )


def test_eval_data_is_what_is_evaluated_and_nothing_else_is_held_out(model_dir, pairs, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", "pairs", 5, seed=9)
    result = run(DPO(), model_dir, pairs, tmp_path / "run", eval_data=other)
    assert (result.summary["data"]["rows"], result.summary["held_out_rows"]) == (24, 5)
    without = run(DPO(), model_dir, pairs, tmp_path / "without", eval_fraction=0.0)
    assert without.summary["held_out_rows"] == 0 and not evaluations(tmp_path / "without")


# ---------------------------------------------------------------- the run folder


def strict_json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_run_folder_holds_config_metrics_summary_and_card(model_dir, pairs, tmp_path):
    out = tmp_path / "run"
    result = run(DPO(beta=0.3), model_dir, pairs, out, max_steps=4, eval_every=2)
    assert {path.name for path in out.iterdir()} == {".lock", "config.yaml", "metrics.jsonl", "summary.json", "model"}
    lines = journal(out)
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    for line in lines:
        for name in line.keys() - {"step"}:
            metrics.known(name)
    summary = strict_json((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 4 and summary["objective"] == "dpo"
    assert summary["data"]["rows"] + summary["held_out_rows"] == 24
    assert summary["start"]["loss"] == lines[1]["loss"] and summary["end"]["loss"] == lines[5]["loss"]
    assert summary["start"]["eval/loss"] == lines[0]["eval/loss"]
    card = (result.model_dir / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front  # a path is no hub name
    assert "dpo" in front["tags"] and front["library_name"] == "transformers"
    assert "beta: 0.3" in card and "arXiv:2305.18290" in card and str(pairs) in card


def test_the_config_that_is_written_repeats_the_run(model_dir, pairs, tmp_path):
    first = run(DPO(beta=0.3), model_dir, pairs, tmp_path / "first", lora_rank=2, seed=5)
    given = config.read_recipe(tmp_path / "first" / "config.yaml")
    assert given.pop("objective") == "dpo"
    settings = config.resolve(config.sections("dpo"), given)
    objective = settings.pop("objective")
    second = prefopt.train(objective=objective, **{**config.flat(settings), "out": str(tmp_path / "second")})
    again = {**second.summary, **{key: first.summary[key] for key in ("seconds", "model")}}
    timed = {"tokens_per_second": None}
    assert {**again, "end": {**again["end"], **timed}, "start": {**again["start"], **timed}} == {
        **first.summary,
        "end": {**first.summary["end"], **timed},
        "start": {**first.summary["start"], **timed},
    }


def test_a_metric_that_is_not_registered_is_refused(model_dir, pairs, tmp_path, monkeypatch):
    plain = DPO.loss

    def loss(self: Any, *args: Any) -> Any:
        total, seen = plain(self, *args)
        return total, {**seen, "rewards/vibes": seen["rewards/chosen"]}

    monkeypatch.setattr(DPO, "loss", loss)
    with pytest.raises(KeyError, match=r"rewards/vibes' is not registered in prefopt/metrics\.py"):
        run(DPO(), model_dir, pairs, tmp_path / "run")


# ---------------------------------------------------------------- what is refused, and when


@pytest.fixture
def nothing_loads(monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(recipe, "load_model", refuse)


def test_an_existing_run_is_not_overwritten_unless_asked(model_dir, pairs, tmp_path):
    out = tmp_path / "run"
    run(DPO(), model_dir, pairs, out)
    before = (out / "summary.json").read_bytes()
    with pytest.raises(InputError, match="run: already holds a run; choose another out, or overwrite=true"):
        run(DPO(), model_dir, pairs, out)
    assert (out / "summary.json").read_bytes() == before
    run(DPO(), model_dir, pairs, out, overwrite=True, max_steps=1)
    assert max(line["step"] for line in journal(out)) == 1


@pytest.mark.fault(7)
def test_a_model_without_a_summary_is_this_run_unfinished_or_another_run(model_dir, pairs, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(recipe, "write_json", full)
    with pytest.raises(InputError, match=r"run: cannot write there \(No space left on device\); the model is there"):
        run(DPO(), model_dir, pairs, out)
    monkeypatch.undo()
    assert (out / "model").exists() and not (out / "summary.json").exists()
    with pytest.raises(InputError, match="already holds a run"):
        run(DPO(beta=0.2), model_dir, pairs, out)
    run(DPO(), model_dir, pairs, out)
    assert (out / "summary.json").exists()


def test_a_result_that_is_being_removed_is_no_result(model_dir, pairs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(DPO(), model_dir, pairs, out)
    monkeypatch.setattr("prefopt.recipes.folder.shutil.rmtree", lambda *args, **named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(DPO(), model_dir, pairs, out, overwrite=True)
    assert (out / "model").exists() and not (out / "summary.json").exists()


@pytest.mark.parametrize("command", ["the same", "--resume"])
def test_what_a_run_killed_after_its_summary_left_is_removed(command, model_dir, pairs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(recipe, "remove_state", lambda out: 1 / 0)
        run(DPO(), model_dir, pairs, out, save_every=2, keep="best")
    assert (out / "summary.json").exists()
    assert {"checkpoints", "best"} <= {path.name for path in out.iterdir()}
    with pytest.raises(InputError, match="already holds a run"):
        if command == "--resume":
            run_command(["--resume", str(out)])
        else:
            run(DPO(), model_dir, pairs, out, save_every=2, keep="best")
    assert not {"checkpoints", "best"} & {path.name for path in out.iterdir()}
    assert (out / "summary.json").exists() and (out / "model" / "config.json").exists()


def test_what_is_refused_removes_nothing_of_another_run(model_dir, pairs, tmp_path, nothing_loads):
    others = [tmp_path / "run" / folder / "weights" for folder in ("checkpoints", "best", "fixed")]
    for path in others:
        path.parent.mkdir(parents=True)
        path.write_text("theirs")
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="already holds a run"):
        run(DPO(), model_dir, pairs, tmp_path / "run")
    assert all(path.exists() for path in others)


def test_what_a_killed_run_was_writing_or_removing_is_swept_when_it_goes_on(model_dir, pairs, tmp_path):
    kept = tmp_path / "run" / "checkpoints"
    for name in (".removed-step-00000001", ".writing-00000003-7-7-0", "step-00000002"):
        (kept / name).mkdir(parents=True)
    settings = recipe._settings(DPO(), {"model": str(model_dir), "data": str(pairs), "out": str(tmp_path / "run")})
    with contextlib.ExitStack() as stack:
        recipe.prepare(settings, stack)
    assert [path.name for path in kept.iterdir()] == ["step-00000002"]


def test_what_mended_an_overwritten_run_goes_with_it_unless_it_is_needed(model_dir, pairs, tmp_path):
    out = tmp_path / "run"
    save_model(out / "fixed" / "model")
    (out / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="would be written over a model it is made from"):
        run(DPO(), out / "fixed" / "model", pairs, out, overwrite=True)
    lock = Lock(out / "fixed")
    with pytest.raises(InputError, match="run/fixed: another run is writing there"):
        run(DPO(), model_dir, pairs, out, overwrite=True)
    assert (out / "fixed" / "model").exists()
    lock.close()
    run(DPO(), model_dir, pairs, out, overwrite=True, max_steps=1)
    assert (out / "model").exists() and not (out / "fixed").exists()


def test_an_unfinished_run_that_mends_another_is_named(model_dir, pairs, tmp_path, nothing_loads):
    out = tmp_path / "run"
    (out / "fixed").mkdir(parents=True)
    (out / "summary.json").write_text("{}")
    (out / "fixed" / "config.yaml").write_text("objective: dpo\n")
    with pytest.raises(InputError, match=r"`prefopt train --resume .*run/fixed` goes on with that"):
        run(DPO(), model_dir, pairs, out)


def test_a_result_is_never_written_over_the_model_it_comes_from(model_dir, pairs, nothing_loads):
    with pytest.raises(InputError, match="the result would be written over a model it is made from"):
        run(DPO(), model_dir, pairs, model_dir.parent, overwrite=True)
    AutoModelForCausalLM.from_pretrained(model_dir)


def test_a_run_that_broke_off_leaves_nothing_that_a_new_one_mixes_with_its_own(model_dir, pairs, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(DPO(), model_dir, pairs, out)
    monkeypatch.setattr(recipe, "save", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(DPO(), model_dir, pairs, out, overwrite=True)
    assert not (out / "summary.json").exists()  # of the run that is gone
    monkeypatch.undo()
    run(DPO(), model_dir, pairs, out, max_steps=2)
    assert [line["step"] for line in journal(out)] == [0, 1, 2, 2]


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    model_dir, pairs, tmp_path, nothing_loads
):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/run: cannot write there \(.*\); choose another out"):
        run(DPO(), model_dir, pairs, tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_before_anything_is_loaded(model_dir, pairs, tmp_path, nothing_loads):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(InputError, match="cannot write there"):
        run(DPO(), model_dir, pairs, tmp_path / "locked" / "run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rnak": 4}, "lora_rnak: unknown option; did you mean lora_rank"),
        ({"reference": "adapter"}, "reference: adapter needs lora_rank"),
        ({"reference": "adapter", "lora_rank": 4, "reference_model": "x/y"}, "reference: adapter contradicts"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"epochs": 0.0}, "epochs must be above 0"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must"),
        ({"warmup": 1.5}, "warmup must"),
        ({"tokens_per_forward": 0}, "tokens_per_forward must be at least 1"),
        ({"eval_fraction": 1.0}, "eval_fraction must be at least 0 and below 1"),
        ({"keep": "best", "eval_fraction": 0.0}, "keep: best needs held-out rows"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_loaded(
    options, message, model_dir, pairs, tmp_path, nothing_loads
):
    with pytest.raises(InputError, match=message):
        run(DPO(), model_dir, pairs, tmp_path / "run", **options)


def test_missing_data_is_refused_before_anything_is_loaded(model_dir, tmp_path, nothing_loads):
    with pytest.raises(InputError, match="nowhere"):
        run(DPO(), model_dir, tmp_path / "nowhere.jsonl", tmp_path / "run")


@pytest.mark.fault(40)
def test_a_failed_upload_keeps_the_files_and_says_how_to_retry(model_dir, pairs, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    out = tmp_path / "run"
    with pytest.raises(
        InputError, match=r"me/mine: the upload failed \(no route to host\); the model is safe; retry with `hf upload"
    ):
        run(DPO(), model_dir, pairs, out, push_to_hub="me/mine")
    assert "should that be cut off, `hf upload --private me/mine" in capsys.readouterr().err
    assert (out / "summary.json").exists() and (out / "model" / "README.md").exists()
    AutoModelForCausalLM.from_pretrained(out / "model")


def test_nothing_is_uploaded_unless_asked(model_dir, pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "_push", lambda *args: pytest.fail("uploaded"))
    run(DPO(), model_dir, pairs, tmp_path / "run")


# ---------------------------------------------------------------- step-0 identities


def test_preflight_stops_a_broken_run_unless_it_is_off(model_dir, pairs, tmp_path, monkeypatch):
    plain = Policy.score

    def noisy(self: Any, batch: Any, layout: Any) -> Any:
        out = plain(self, batch, layout)
        return out._replace(logp=out.logp + 0.1 * torch.rand_like(out.logp))

    monkeypatch.setattr(Policy, "score", noisy)
    with pytest.raises(PreflightError, match="two passes over the same rows differ"):
        run(DPO(), model_dir, pairs, tmp_path / "on")
    assert run(DPO(), model_dir, pairs, tmp_path / "off", preflight="off").summary["steps"] == 3


def test_a_dry_plan_counts_what_the_run_then_does(model_dir, pairs, tmp_path, nothing_loads):
    plan = recipe.plan(objective=DPO(), model=model_dir, data=pairs, out=tmp_path / "run", batch_size=8, epochs=2.0)
    assert len(plan.data.examples) + len(plan.held_out.examples) == 24
    assert plan.steps == 2 * -(-len(plan.data.examples) // 8)
    assert not (tmp_path / "run").exists()


def test_steps_of_one_class_are_said_and_the_other_class_is_not_measured(model_dir, tmp_path, capsys):
    row = {"completions": [" cat good", " dog good"], "labels": [True, 0.75]}
    rows = [{"prompt": f"{word} :", **row} for word in ("red", "blue", "cat", "dog")]
    (tmp_path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result = run(ProcessReward(), model_dir, tmp_path / "steps.jsonl", tmp_path / "run")
    told = capsys.readouterr().err
    assert "steps.jsonl: all 6 steps are labelled right" in told and "all 2 steps are labelled right" in told
    assert "nan" not in told
    assert "wrong_accuracy" not in result.summary["end"] and "eval/wrong_accuracy" not in result.summary["end"]
    assert 0 <= result.summary["end"]["eval/right_accuracy"] <= 1


# ---------------------------------------------------------------- what a run keeps, and what contradicts itself


def test_a_template_given_for_the_data_is_saved_with_the_model(model_dir, pairs, tmp_path):
    template = "{% for message in messages %}{{ message.content }} {{ eos_token }}{% endfor %}"
    result = run(DPO(), model_dir, pairs, tmp_path / "run", chat_template=template)
    assert AutoTokenizer.from_pretrained(result.model_dir).chat_template == template


def test_a_reference_with_another_tokenizer_is_refused(model_dir, pairs, tmp_path):
    other = save_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["newword"])
    tokenizer.save_pretrained(other)
    with pytest.raises(InputError, match="its tokenizer is not the model's"):
        run(DPO(), model_dir, pairs, tmp_path / "run", reference_model=other)


def test_rows_longer_than_the_models_context_are_refused_with_the_remedy(model_dir, pairs, tmp_path):
    settings = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    settings["max_position_embeddings"] = 4
    (model_dir / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match=r"a row has \d+ tokens and the model's context is 4; set max_length=4"):
        run(DPO(), model_dir, pairs, tmp_path / "run")


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        (SFT(), {"reference": "copy"}, "sft reads no reference"),
        (SFT(), {"lora_alpha": 3}, "lora_alpha and lora_targets need a lora_rank"),
        (SFT(), {"eval_every": 2, "eval_fraction": 0.0}, "eval_every needs held-out rows"),
    ],
)
def test_options_that_nothing_would_read_are_refused(
    objective, options, message, model_dir, demonstrations, tmp_path, nothing_loads
):
    with pytest.raises(InputError, match=message):
        run(objective, model_dir, demonstrations, tmp_path / "run", **options)


def test_an_adapters_shape_cannot_be_changed_when_it_is_continued(model_dir, pairs, tmp_path):
    first = run(DPO(), model_dir, pairs, tmp_path / "first", lora_rank=2)
    with pytest.raises(InputError, match="an adapter is continued as it is; leave out lora_rank"):
        run(DPO(), first.model_dir, pairs, tmp_path / "second", lora_rank=8)


def test_a_failed_run_leaves_the_result_that_it_was_to_overwrite(model_dir, pairs, tmp_path):
    out = tmp_path / "run"
    kept = weights(AutoModelForCausalLM.from_pretrained(run(DPO(), model_dir, pairs, out).model_dir))
    settings = (out / "config.yaml").read_text()
    with pytest.raises(InputError, match="no such"):
        run(DPO(), model_dir, tmp_path / "typo.jsonl", out, overwrite=True)
    assert (out / "config.yaml").read_text() == settings
    assert largest_difference(weights(AutoModelForCausalLM.from_pretrained(out / "model")), kept) == 0


# ---------------------------------------------------------------- a reference that moves (TR-DPO)

CONSTANT = {"schedule": "constant", "warmup": 0.0}


def updates(out: Path) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in journal(out) if "loss" in line}


def test_the_update_after_a_whole_move_starts_from_ln_2_again(model_dir, pairs, tmp_path):
    """With reference_mixup=1 the reference of updates 3 and 5 is the policy as it is: margins 0, loss ln 2."""
    out = tmp_path / "run"
    options = {"reference_sync_steps": 2, "reference_mixup": 1.0, "max_steps": 5, **CONSTANT}
    result = run(DPO(), model_dir, pairs, out, **options)
    assert result.summary["reference"] == "a frozen copy in memory, moved every 2 updates"
    losses = {step: line["loss"] for step, line in updates(out).items()}
    for step in (1, 3, 5):
        assert losses[step] == pytest.approx(0.693147, abs=1e-5)
    for step in (2, 4):
        assert losses[step] < 0.68


def test_rewards_fall_back_part_of_the_way_when_the_reference_moves(model_dir, pairs, tmp_path):
    """One batch of all rows, so that an update's margins differ from those of a still reference by the moves alone."""
    still, moved = tmp_path / "still", tmp_path / "moved"
    options = {"batch_size": 24, "eval_fraction": 0.0, "max_steps": 4, "learning_rate": 3e-3, **CONSTANT}
    run(DPO(), model_dir, pairs, still, reference="copy", **options)
    run(DPO(), model_dir, pairs, moved, reference_sync_steps=3, **options)
    without, margins = (
        {step: line["rewards/margins"] for step, line in updates(out).items()} for out in (still, moved)
    )
    for step in (1, 2, 3):
        assert margins[step] == pytest.approx(without[step], abs=1e-6)
    # were log-probs linear in the weights, 1 - reference_mixup of them would be left
    assert margins[4] / without[4] == pytest.approx(0.4, abs=0.08)


def test_the_reference_moves_after_a_skipped_update_that_it_was_due_at():
    """Update 4 is skipped, so the second move follows update 5; the third is two updates later."""
    moved: list[int] = []
    options, heard = ReferenceOptions(reference_sync_steps=2), [1, 2, 3, 5, 6, 7, 8]
    reference = SimpleNamespace(follow=lambda policy, mixup: moved.append(step))
    following = Following(options, reference, policy=None)
    for step in heard:
        following.listen(step, {"loss": 1.0})
        following.listen(step, {"eval/loss": 1.0})
    assert moved == [2, 5, 7]


def test_evaluations_do_not_move_the_reference(model_dir, pairs, tmp_path):
    options = {"reference_sync_steps": 2, "max_steps": 5, **CONSTANT}
    for name, every in (("seldom", None), ("often", 1)):
        run(DPO(), model_dir, pairs, tmp_path / name, eval_every=every, **options)
    seldom, often = (updates(tmp_path / name) for name in ("seldom", "often"))
    assert [often[step]["loss"] for step in often] == [seldom[step]["loss"] for step in seldom]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_rank": 2}, "reference_sync_steps mixes whole weights and does not work with an adapter"),
        ({"shard": True}, "does not work with shard"),
        ({"reference": "cache"}, "reference_sync_steps moves a copy of the weights; use reference: copy"),
        ({"reference": "adapter", "lora_rank": 2}, "moves a copy of the weights"),
        ({"reference_sync_steps": None, "reference_mixup": 0.5}, "reference_mixup is read where the reference moves"),
    ],
)
def test_a_reference_that_cannot_move_is_refused_before_anything_is_loaded(
    options, message, model_dir, pairs, tmp_path, nothing_loads
):
    with pytest.raises(InputError, match=message):
        run(DPO(), model_dir, pairs, tmp_path / "run", **{"reference_sync_steps": 2, **options})


def test_a_reference_of_another_shape_cannot_move_towards_the_policy(model_dir, pairs, tmp_path):
    other = save_model(tmp_path / "other", architecture="gpt_neox")
    with pytest.raises(InputError, match="its weights differ in shape from the model's"):
        run(DPO(), model_dir, pairs, tmp_path / "run", reference_model=other, reference_sync_steps=2)
    same = save_model(tmp_path / "same", seed=1)
    options = {"reference_sync_steps": 1, "reference_mixup": 1.0, "max_steps": 2, **CONSTANT}
    run(DPO(), model_dir, pairs, tmp_path / "moves", reference_model=same, **options)
    losses = [line["loss"] for line in updates(tmp_path / "moves").values()]
    assert abs(losses[0] - 0.693147) > 1e-3 and losses[1] == pytest.approx(0.693147, abs=1e-5)


# ---------------------------------------------------------------- what an objective may ask of a run


class Ratio(NamedTuple):
    """The reference's log-prob of each completion, [N] nats, and the mean of what it says of other prompts, []."""

    logp: torch.Tensor
    apart: torch.Tensor


@dataclass(frozen=True)
class Offset(DPO):
    """DPO with an offset that follows from the rows, and a reference that is asked about texts in none of them."""

    offset: float | None = None
    facts: ClassVar[Facts] = replace(DPO.facts, name="offset", live=True, least=3)

    def settled(self, examples: Any) -> Offset:
        if any(len(example.prompt) > 30 for example in examples):
            raise InputError(f"{examples[0].where}: too long")
        return replace(self, offset=1 / len(examples)) if self.offset is None else self

    def targets(self, batch: Batch, models: Any) -> Any:
        assert batch.num_prompts >= self.facts.least
        prompts = batch.prompts.rows()
        swapped = replace(batch, prompts=Ragged.of([row.tolist() for row in [*prompts[1:], prompts[0]]]))
        return Ratio(batch.sum_tokens(models.reference(batch)), models.reference(swapped).mean())

    def loss(self, batch: Batch, out: Any, targets: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        assert self.offset is not None
        chosen, rejected = batch.pairs(self.beta * (batch.sum_tokens(out.logp) - targets.logp))
        return torch.nn.functional.softplus(self.offset - (chosen - rejected)).sum(), {"rewards/chosen": chosen}

    def at_start(self) -> dict[str, float]:
        assert self.offset is not None
        return {"loss": math.log1p(math.exp(self.offset)), "rewards/chosen": 0.0}


def test_options_that_follow_from_the_training_rows_are_filled_in_and_said(model_dir, pairs, tmp_path, capsys):
    result = run(Offset(), model_dir, pairs, tmp_path / "run")
    rows = result.summary["data"]["rows"]
    assert (rows, result.summary["held_out_rows"]) == (18, 6)
    assert f"offset: {1 / rows}, from the training rows" in capsys.readouterr().err
    assert strict_json((tmp_path / "run" / "summary.json").read_text())["settled"] == {"offset": 1 / rows}
    assert f"From the training rows: `offset={1 / rows}`." in (result.model_dir / "README.md").read_text()
    # on other rows the recipe settles it anew
    assert "offset: null" in (tmp_path / "run" / "config.yaml").read_text()
    assert result.summary["start"]["eval/loss"] == pytest.approx(math.log1p(math.exp(1 / rows)), abs=1e-4)
    given = run(Offset(offset=0.5), model_dir, pairs, tmp_path / "given")
    assert "from the training rows" not in capsys.readouterr().err and given.summary["settled"] == {}
    assert "From the training rows" not in (given.model_dir / "README.md").read_text()
    assert given.summary["start"]["eval/loss"] == pytest.approx(math.log1p(math.exp(0.5)), abs=1e-4)


def test_rows_that_an_option_cannot_follow_from_stop_before_anything_is_loaded(tmp_path, model_dir, nothing_loads):
    row = {"prompt": "red " * 40 + ":", "chosen": " good", "rejected": " bad"}
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for _ in range(4)), encoding="utf-8")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: too long"):
        run(Offset(), model_dir, tmp_path / "rows.jsonl", tmp_path / "run", eval_fraction=0.0)


def test_a_reference_asked_about_texts_in_no_row_is_live(model_dir, pairs, tmp_path, nothing_loads, monkeypatch):
    with pytest.raises(InputError, match="reference: cache cannot serve offset"):
        run(Offset(), model_dir, pairs, tmp_path / "cache", reference="cache")
    monkeypatch.undo()
    copied = run(Offset(), model_dir, pairs, tmp_path / "copy")
    assert copied.summary["reference"] == "a frozen copy in memory"
    adapted = run(Offset(), model_dir, pairs, tmp_path / "adapter", lora_rank=2)
    assert adapted.summary["reference"] == "this model with its adapter off or at its start"


def test_an_update_never_has_fewer_prompts_than_the_objective_needs(model_dir, tmp_path):
    """5 rows in batches of 3: all 5, never 2; and as many updates as were asked for."""
    data = write_rows(tmp_path / "five.jsonl", "pairs", 5)
    options = {"batch_size": 3, "eval_fraction": 0.0, "max_steps": 9, "preflight": "on"}
    result = run(Offset(), model_dir, data, tmp_path / "run", **options)
    assert result.summary["steps"] == 9 and max(updates(tmp_path / "run")) == 9
    other = write_rows(tmp_path / "other.jsonl", "pairs", 4, seed=3)
    run(Offset(), model_dir, data, tmp_path / "other", **options, eval_data=other)


@pytest.mark.parametrize(
    ("num", "options", "message"),
    [
        (24, {"batch_size": 2}, "batch_size: offset needs at least 3 prompts in an update, got 2"),
        (2, {"eval_fraction": 0.0}, "offset needs at least 3 rows, got 2"),
        (5, {}, "3 of 5 rows are held out, and offset needs at least 3 on either side; .* or eval_fraction=0"),
        (3, {"keep": "best"}, r"keep: best needs held-out rows and there are too few to hold any out \(3\)"),
    ],
)
def test_too_few_rows_for_the_objective_are_refused_before_anything_is_loaded(
    num, options, message, model_dir, tmp_path, nothing_loads
):
    data = write_rows(tmp_path / "rows.jsonl", "pairs", num)
    with pytest.raises(InputError, match=message):
        run(Offset(), model_dir, data, tmp_path / "run", **options)


def test_a_few_rows_hold_out_as_many_as_the_objective_needs_or_none_and_say_so(model_dir, tmp_path, capsys):
    """5 % of 24 rows is one, which is no update of an objective that needs three."""
    for num, held_out in ((24, 3), (6, 3), (3, 0)):
        data = write_rows(tmp_path / f"{num}.jsonl", "pairs", num)
        options = {"eval_fraction": 0.05, "batch_size": 3, "max_steps": 1}
        result = run(Offset(), model_dir, data, tmp_path / str(num), **options)
        assert (result.summary["data"]["rows"], result.summary["held_out_rows"]) == (num - held_out, held_out)
    assert capsys.readouterr().err.count("held out: none of so few rows (3); give eval_data") == 1


def test_labels_of_one_class_may_be_evaluated_on_and_not_trained_on(model_dir, tmp_path):
    """What a labels objective would be given: `_read` refuses one class to train on, and not as held-out rows."""
    both = [
        {"prompt": f"red {word} :", "completion": " good", "label": word == "cat"} for word in ("cat", "dog", "one")
    ]
    for name, rows in (("both", both), ("bad", both[1:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    paths = {"model": str(model_dir), "out": "o"}
    labels = SimpleNamespace(facts=replace(DPO.facts, data="labels"))

    def read(data: str, eval_data: str | None) -> Any:
        given = {"data": f"{tmp_path}/{data}.jsonl", "eval_data": eval_data and f"{tmp_path}/{eval_data}.jsonl"}
        settings = config.resolve(config.SECTIONS, {**paths, **given, "eval_fraction": 0.0})
        return recipe._read(labels, settings, word_tokenizer())

    train, held_out = read("both", "bad")
    assert (len(train), len(held_out)) == (3, 2)
    with pytest.raises(InputError, match="all 2 answers are labelled bad and none good"):
        read("bad", None)
