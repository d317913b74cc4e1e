from __future__ import annotations

import io
import json
import math
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from prefopt.data import load
from prefopt.evaluate.kl import KL
from prefopt.evaluate.statistics import Estimate
from prefopt.recipes import quickstart
from prefopt.recipes.quickstart.files import judge, prompt_ids
from prefopt.recipes.quickstart.measure import BeforeAfter, Findings
from prefopt.recipes.quickstart.model import build_model, build_tokenizer
from prefopt.recipes.quickstart.recipe import HEADER, Parts, Settings, claim
from prefopt.recipes.quickstart.screen import Screen, conclusion
from prefopt.recipes.quickstart.task import (
    MOODS,
    WHO,
    Instruction,
    Stars,
    instructions,
    stars,
    write,
    write_carelessly,
)
from prefopt.records import InputError

FOX = Instruction(who="fox", where="sea", mood="cheerful", length=9)


def test_instruction_reads_like_a_sentence():
    assert FOX.text == "Write a cheerful line about a fox by the sea in 9 words."
    owl = Instruction("owl", "moon", "spooky", 8)
    assert owl.text == "Write a spooky line about an owl on the moon in 8 words."


@pytest.mark.parametrize(
    ("line", "who", "where", "mood", "length", "form"),
    [
        ("The merry fox dances happily by the sunny sea.", 1, 1, 1, 1, 1),
        # an owl instead; 8 words
        ("The merry owl dances by the sunny sea.", 0, 1, 1, 2 / 3, 1),
        # the moon instead, one gloomy word of three: (2 - 1) / 3; 7 words
        ("The merry fox weeps happily on the moon.", 1, 0, 1 / 3, 2 / 3, 1),
        # 6 words: three too few; one word of mood
        ("The fox dances by the sea.", 1, 1, 1, 0, 1),
        # says dances twice
        ("The fox dances by the sea and dances happily.", 1, 1, 1, 1, 0.5),
        # only gloomy words; adjective missing its noun order: no sentence; 7 words
        ("fox the weeps sadly by the sea", 1, 1, 0, 1 / 3, 0),
        # every animal and place named: half of who and where; no words of mood
        ("The fox owl by the sea moon.", 0.5, 0.5, 0, 1 / 3, 0),
        ("", 0, 0, 0, 0, 0),
        # no full stop
        ("The merry fox dances happily by the sunny sea", 1, 1, 1, 1, 0),
    ],
)
def test_gold_reward_by_hand(line, who, where, mood, length, form):
    found = stars(FOX, line)
    assert found == Stars(who, where, pytest.approx(mood), pytest.approx(length), form)
    assert found.total == pytest.approx(who + where + mood + length + form)


def test_every_instruction_has_faultless_lines():
    random = Random(0)
    every = instructions(random)
    assert len(every) == len(set(every)) == 10_752
    lines = [write(one, random) for one in every]
    assert all(stars(one, line).total == 5 for one, line in zip(every, lines, strict=True))
    assert len(set(lines)) > 0.8 * len(lines)


def test_careless_writers_err_and_leave_room_to_improve():
    random = Random(1)
    every = instructions(random)[:3000]
    mean = sum(stars(one, write_carelessly(one, random, 0.7)).total for one in every) / len(every)
    assert 3.7 < mean < 4.3
    assert all(stars(one, write_carelessly(one, random, 1.0)).total == 5 for one in every[:200])


def test_longer_or_shorter_lines_earn_no_more():
    # the best reward a fixed line length can earn, over instructions, is the same 4 rules and a length that misses
    random = Random(2)
    every = instructions(random)[:2000]
    best = sum(stars(one, write(one, random)).total for one in every) / len(every)
    for length in (6, 9, 12):
        fixed = [Instruction(one.who, one.where, one.mood, length) for one in every]
        earned = [stars(one, write(other, random)).total for one, other in zip(every, fixed, strict=True)]
        assert sum(earned) / len(earned) < best - 0.4


def test_parts_share_no_instruction():
    parts = Parts.of(Settings())
    everything = parts.held_out + parts.demonstrations + parts.pairs
    assert len(everything) == len(set(everything)) == 256 + 6000 + 2500
    assert Parts.of(Settings(seed=1)).held_out != parts.held_out


def test_judge_follows_bradley_terry_and_leaves_ties_out():
    good, bad = "The merry fox dances happily by the sunny sea.", "The merry owl dances happily by the sunny sea."
    random, draws = Random(0), 4000
    pairs = [judge(FOX, *order, random, sharpness=2.0) for order in [(good, bad), (bad, good)] * (draws // 2)]
    # one star apart: wrong with probability 1 / (1 + e^2) = 0.119
    wrong = sum(pair.wrong for pair in pairs if pair) / draws
    assert wrong == pytest.approx(1 / (1 + math.e**2), abs=4 * math.sqrt(0.119 * 0.881 / draws))
    for pair in pairs:
        assert (pair.chosen, pair.rejected) == ((bad, good) if pair.wrong else (good, bad))
        assert pair.stars_chosen == stars(FOX, pair.chosen).total
    assert judge(FOX, good, good, random, 2.0) is None
    assert not any(judge(FOX, bad, good, random, math.inf).wrong for _ in range(100))


def test_tokenizer_gives_words_one_token_reads_back_and_keeps_prompts_stable():
    random = Random(0)
    every = instructions(random)[:2000]
    tokenizer = build_tokenizer([text for one in every for text in (one.text, write(one, random))])
    text = write(FOX, random)
    assert len(tokenizer.tokenize(text)) == len(text.split()) + 1  # and the full stop
    for other in (text, "Grüße, 世界! <b>\t\n"):
        assert tokenizer.decode(tokenizer(other)["input_ids"]) == other
    prompt = prompt_ids(tokenizer, [FOX])[0]
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": FOX.text}, {"role": "assistant", "content": text}], return_dict=False
    )
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id and whole.count(tokenizer.eos_token_id) == 2
    assert sum(p.numel() for p in build_model(tokenizer, seed=0).parameters()) < 1_000_000


def test_a_seed_fixes_the_random_model():
    tokenizer = build_tokenizer([FOX.text])
    weights = [build_model(tokenizer, seed).lm_head.weight for seed in (0, 0, 1)]
    assert weights[0].equal(weights[1]) and not weights[0].equal(weights[2])


def test_only_a_folder_of_its_own_is_cleared(tmp_path):
    folder = tmp_path / "run"
    claim(folder)
    (folder / "config.yaml").write_text(HEADER)
    (folder / "data").mkdir()
    (folder / "data" / "sft.jsonl").touch()
    (folder / "notes.txt").write_text("mine")
    assert claim(folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt"]
    with pytest.raises(InputError, match="no quickstart wrote"):
        claim(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="is a file"):
        claim(folder / "notes.txt")


def test_what_could_not_be_measured_is_said_in_the_table():
    missing, rules = (
        Estimate(None, None, None, 0, "nothing"),
        dict.fromkeys(("who", "where", "mood", "length", "form"), 0.5),
    )
    none = SimpleNamespace(value=None)
    found = Findings(
        win_rate=Estimate(0.61, 0.55, 0.67, 20),
        preference_accuracy=missing,
        kl=KL(None, None, None, 0, "no samples"),
        perplexity=BeforeAfter(SimpleNamespace(value=3.25), none),
        perplexity_without_mistakes=BeforeAfter(none, none),
        reward=BeforeAfter(missing, Estimate(4.5, 4.0, 4.8, 20)),
        rules=BeforeAfter(rules, rules),
        words=BeforeAfter(9.0, 8.0),
    )
    screen, text = Screen(), io.StringIO()
    screen.out = Console(file=text, width=140)
    screen.findings(found)
    assert "0.61 [0.55, 0.67]" in text.getvalue() and "3.25" in text.getvalue() and "4.50" in text.getvalue()
    assert text.getvalue().count("not measured") == 6


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.51, 0.7, "better"),
        (0.5, 0.7, "No difference"),
        (0.4, 0.49, "worse"),
        (0.4, 0.6, "No difference"),
        (None, None, "no interval"),
    ],
)
def test_the_conclusion_claims_no_more_than_the_interval(low, high, said):
    assert said in conclusion(Estimate(0.6, low, high, 9, "" if low else "one item"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, quickstart.run(folder, seed=3, quick=True)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_quick_run_leaves_what_it_promises(quick):
    folder, summary = quick
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert set(summary["win_rate"]) >= {"value", "low", "high", "n"} and summary["win_rate"]["n"] == 32
    assert summary["win_rate"]["low"] <= summary["win_rate"]["value"] <= summary["win_rate"]["high"]
    assert 0 <= summary["preference_accuracy"] <= 1
    assert set(summary["perplexity"]) == {"before", "after"}
    assert math.isfinite(summary["kl"])
    phases = [row["phase"] for row in rows(folder / "metrics.jsonl")]
    assert {"sft", "dpo"} == set(phases) and phases == sorted(phases, reverse=True)
    assert (folder / "config.yaml").read_text().startswith(HEADER)


def test_quick_run_numbers_agree_with_the_samples_and_files_it_wrote(quick):
    folder, summary = quick
    samples = rows(folder / "samples.jsonl")
    every = {one.text: one for one in instructions(Random(0))}
    shares = []
    for row in samples:
        for name in ("sft", "dpo"):
            assert row[f"stars_{name}"] == [stars(every[row["instruction"]], line).total for line in row[name]]
        games = [(a > b) + (a == b) / 2 for a in row["stars_dpo"] for b in row["stars_sft"]]
        shares.append(sum(games) / len(games))
    assert summary["win_rate"]["value"] == pytest.approx(sum(shares) / len(shares))
    after = sum(sum(row["stars_dpo"]) / len(row["stars_dpo"]) for row in samples) / len(samples)
    assert summary["reward"]["after"]["value"] == pytest.approx(after)
    assert sum(summary["rules"]["after"].values()) == pytest.approx(after)
    pairs = rows(folder / "data" / "pairs.jsonl")
    assert len(pairs) == summary["pairs"]["trained"]
    assert len(pairs) + summary["pairs"]["left_out"] == Settings.quick(3).pairs
    assert sum(row["stars"][0] < row["stars"][1] for row in pairs) == summary["pairs"]["judged_wrong"]
    held_out = {row["instruction"] for row in samples}
    assert not held_out & {row["prompt"][0]["content"] for row in pairs}
    assert not held_out & {row["messages"][0]["content"] for row in rows(folder / "data" / "sft.jsonl")}


def test_quick_run_models_load_in_plain_transformers_and_agree_with_the_summary(quick):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, summary = quick
    for key, model_dir in (("before", summary["sft_model"]), ("after", summary["model"])):
        model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        examples = load(folder / "data" / "sft_held_out.jsonl", tokenizer, "demonstrations").examples
        nll = tokens = 0.0
        for row in rows(folder / "data" / "sft_held_out.jsonl"):
            ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
            prompt = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False)
            with torch.no_grad():
                logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            nll -= sum(float(logp[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
            tokens += len(ids) - len(prompt)
        assert sum(sum(flags) for example in examples for flags in example.trained) == tokens
        assert summary["perplexity"][key] == pytest.approx(math.exp(nll / tokens), rel=1e-4)


def test_quick_run_learns_from_the_demonstrations(quick):
    folder, summary = quick
    nll = [row["eval/nll"] for row in rows(folder / "metrics.jsonl") if row["phase"] == "sft" and "eval/nll" in row]
    assert nll[-1] < nll[0] / 2
    assert math.exp(nll[-1]) == pytest.approx(summary["perplexity"]["before"], rel=1e-3)


def test_words_of_the_task_belong_to_one_mood():
    words = [word for mood in MOODS.values() for part in mood for word in part]
    assert len(words) == len(set(words)) and not set(words) & set(WHO)
