"""`prefopt sample --as`: rows that the reader takes, what is left out is counted, and a killed run goes on exactly."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_server import Answer, chat, serving
from laws import WORDS, save_model, word_tokenizer

from prefopt import cli, config
from prefopt.commands import sample as commands
from prefopt.data import DataOptions, load
from prefopt.data.columns import Record
from prefopt.models.sampling import Sampling
from prefopt.recipes.sample import RowOptions, Task, preferences
from prefopt.recipes.sample.ledger import Ledger, Tally
from prefopt.recipes.sample.options import READ_BY, TRAINS
from prefopt.recipes.sample.pick import (
    BELOW,
    EQUAL,
    TIED,
    TOO_CLOSE,
    TOO_FEW,
    ahead,
    best,
    labels,
    pairs,
    ranked,
)
from prefopt.recipes.sample.pick import (
    Answer as Scored,
)
from prefopt.recipes.sample.writers import Asked, Prompts, in_form
from prefopt.records import InputError, Sample
from prefopt.rollout.prompts import Prompt

TURNS = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + '</s>' }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
KINDS = {"pairs": "pairs", "labels": "labels", "ranked": "ratings", "best": "demonstrations"}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- which completions become rows


def answers(*scores: float, texts: str = "abcdefgh") -> list[Scored]:
    return [Scored(number, texts[number], score) for number, score in enumerate(scores)]


def two(found: Any) -> list[tuple[str, str]]:
    return [(row.columns["chosen"], row.columns["rejected"]) for row in found.rows]


def test_the_best_is_paired_with_the_worst() -> None:
    found = pairs(answers(0.5, 2.0, -1.0, 1.0), RowOptions())
    assert two(found) == [("b", "c")] and found.rows[0].numbers == [1, 2]
    assert (found.rows[0].columns["score_chosen"], found.rows[0].columns["score_rejected"]) == (2.0, -1.0)


def test_all_pairs_are_those_that_differ_by_the_margin() -> None:
    # 3 > 2 = 2 > 0: of six comparisons one is a tie
    found = pairs(answers(2.0, 0.0, 3.0, 2.0), RowOptions(pair="all"))
    assert two(found) == [("c", "a"), ("c", "d"), ("c", "b"), ("a", "b"), ("d", "b")] and found.ties == 1
    assert two(pairs(answers(2.0, 0.0, 3.0, 2.0), RowOptions(pair="all", margin=3.0))) == [("c", "b")]


def test_no_pair_is_made_of_equals() -> None:
    assert pairs(answers(1.0, 1.0), RowOptions())[:3] == ([], TIED, 1)
    assert pairs(answers(1.0, 1.5), RowOptions(margin=1.0))[:3] == ([], TOO_CLOSE, 0)
    assert pairs(answers(1.0), RowOptions())[:2] == ([], TOO_FEW)
    assert pairs(answers(1.0, 2.0, texts="aa"), RowOptions())[:2] == ([], EQUAL), "a judge that wavers"
    assert two(pairs(answers(1.0, 2.0, 2.0, texts="abb"), RowOptions(pair="all"))) == [("b", "a")], "one text, one pair"


def test_a_margin_holds_in_single_precision() -> None:
    assert 0.3 - 0.1 < 0.2 and ahead(0.3, 0.1, 0.2)
    assert not ahead(0.3, 0.1, 0.21) and not ahead(1.0, 1.0, 0.0) and not ahead(0.0, 1.0, 0.0)
    assert ahead(3e38, -3e38, 1e38), "a difference that single precision cannot hold"


def test_labels_are_by_the_threshold_or_the_mean() -> None:
    def said(found: Any) -> list[tuple[str, bool]]:
        return [(row.columns["completion"], row.columns["label"]) for row in found.rows]

    assert said(labels(answers(0.0, 0.5, 1.0), RowOptions(threshold=0.5))) == [("a", False), ("b", True), ("c", True)]
    found = labels(answers(0.1, 0.2, 0.3), RowOptions())
    assert said(found) == [("a", False), ("c", True)], "the one at the mean says nothing"
    assert found.left_out == {"at the mean of its prompt": 1}
    assert labels(answers(1.0, 1.0), RowOptions())[:3] == ([], TIED, 1)
    assert said(labels(answers(1.0), RowOptions(threshold=1.0))) == [("a", True)]
    assert labels(answers(1.0), RowOptions())[1] == TOO_FEW


def test_a_ranking_holds_all_the_best_first() -> None:
    [row] = ranked(answers(0.0, 2.0, 1.0), RowOptions()).rows
    assert row.columns == {"completions": ["b", "c", "a"], "scores": [2.0, 1.0, 0.0]} and row.numbers == [1, 2, 0]
    assert ranked(answers(1.0, 1.0), RowOptions())[1] == TIED
    assert ranked(answers(1.0), RowOptions())[1] == TOO_FEW
    assert not ranked(answers(1.0, 2.0, texts="aa"), RowOptions()).rows


def test_the_best_are_kept_above_a_threshold_and_equal_texts_once() -> None:
    five = answers(1.0, 3.0, 3.0, 2.0, 0.0, texts="abbde")

    def said(**options: Any) -> list[str]:
        return [row.columns["completion"] for row in best(five, RowOptions(**options)).rows]

    assert said() == ["b"] and said(keep=2) == ["b", "d"] and said(keep=9, threshold=1.0) == ["b", "d", "a"]
    found = best(five, RowOptions(keep=1, threshold=1.0))
    assert found.left_out == {"below the threshold": 1, "equal to a kept text": 1, "beyond keep": 2}
    assert best(five, RowOptions(threshold=4.0))[:2] == ([], BELOW)


# ---------------------------------------------------------------- a writer whose completions are known


class Scripted:
    """Writes words, by seed and number alone: 1 to 9 of them. cut: share that does not end by itself."""

    def __init__(self, rows: list[dict[str, Any]], cut: float = 0.0) -> None:
        self.about = {"model": "scripted", "weights": "0"}
        self.rows, self.cut, self.calls, self.closed = rows, cut, list[int](), False

    def read(self, source: Any, options: DataOptions) -> Prompts:
        records = [Record("row", row["prompt"], [], [], extra=row) for row in self.rows]
        asked = [Asked(Prompt((), record.prompt or "", record.extra), {}) for record in records]
        return Prompts(asked, {"some reason": 2}, [])

    def write(self, prompts: Any, n: int, sampling: Sampling, seeds: Any) -> list[list[Sample | str]]:
        self.calls.append(len(prompts))
        return [
            [self.one(prompt, place, f"{seed}/{number}") for number in range(n)]
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def one(self, prompt: Prompt, place: int, seed: str) -> Sample | str:
        draw = random.Random(seed)
        words = draw.choices(WORDS, k=draw.randint(1, 9))
        said = in_form(prompt.asked, " ".join(words))
        return Sample(prompt.asked, said, range(len(words)), draw.random() >= self.cut, prompt.columns, place)

    def close(self) -> None:
        self.closed = True


def prompts(num: int, turns: bool = False) -> list[dict[str, Any]]:
    texts = [f"{WORDS[number % 14]} {WORDS[number // 14]} :" for number in range(num)]
    return [{"prompt": [{"role": "user", "content": text}] if turns else text, "id": n} for n, text in enumerate(texts)]


def task(kind: str, n: int = 4, seed: int = 0, **options: Any) -> Task:
    """Completions are rewarded for coming near five words, unless options name another reward."""
    usual = {"reward": "length", "length_target": 5, "prompts_at_once": 3} if kind != "revised" else {}
    sections = {**{name: config.SECTIONS[name] for name in ("model", "data")}, **commands.SAMPLED}
    sections.pop("server")
    return Task(kind, n, Sampling(max_tokens=9), seed, config.resolve(sections, {**usual, **options}))  # type: ignore


def made(out: Path, given: Task, writer: Scripted, say: Any = len) -> dict[str, Any]:
    return preferences(lambda: writer, "p.jsonl", out, given, say=say)


# ---------------------------------------------------------------- rows that can be trained on


@pytest.mark.parametrize("turns", [False, True], ids=["text", "messages"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reader_takes_every_row(kind: str, turns: bool, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    summary = made(out, task(kind, **({"keep": 2} if kind == "best" else {})), Scripted(prompts(12, turns)))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TURNS
    data = load(out, tokenizer, KINDS[kind])  # type: ignore[arg-type]
    assert len(data) == summary["rows"] == len(lines(out)) > 10 and not data.dropped
    assert data.shape.endswith("conversational" if turns else "text")
    for row, example in zip(lines(out), data.examples, strict=True):
        if kind == "ranked":
            assert example.scores == row["scores"] == sorted(row["scores"], reverse=True)
        if kind == "labels":
            assert example.scores == [float(row["label"])]


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_command_reads_them(kind: str, tmp_path: Path, capsys: Any) -> None:
    out, model = tmp_path / "rows.jsonl", save_model(tmp_path / "model")
    made(out, task(kind), Scripted(prompts(30)))
    words = ["train", TRAINS[kind], "--model", str(model), "--data", str(out), "--dry-run", "--json"]
    assert cli.main([*words, "eval_fraction=0"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["rows"] == len(lines(out))


def test_columns_are_carried_along_unless_the_reader_would_take_them_for_its_own(tmp_path: Path) -> None:
    row = {"prompt": "red :", "id": 7, "answer": "blue", "label": True, "chosen": "x", "scores": [1], "text": "y"}
    made(tmp_path / "rows.jsonl", task("best"), Scripted([row]))
    [found] = lines(tmp_path / "rows.jsonl")
    assert found.keys() == {"prompt", "completion", "score", "id", "answer", "provenance"}
    assert load(tmp_path / "rows.jsonl", word_tokenizer(), "demonstrations").shape == "prompt/completion, text"


def test_every_row_says_where_it_is_from(tmp_path: Path) -> None:
    made(tmp_path / "rows.jsonl", task("pairs", seed=3), Scripted(prompts(4)))
    for row in lines(tmp_path / "rows.jsonl"):
        told = row["provenance"]
        assert (told["as"], told["model"], told["weights"], told["rewards"]) == ("pairs", "scripted", "0", ["length"])
        assert (told["sampling"]["n"], told["sampling"]["seed"], told["sampling"]["max_tokens"]) == (4, 3, 9)
        chosen, rejected = told["completions"]
        assert len(told["scores"]) == 4 and told["prefopt"]
        assert told["scores"][chosen] == row["score_chosen"] == max(told["scores"])
        assert told["scores"][rejected] == row["score_rejected"] == min(told["scores"])
        assert row["score_chosen"] == pytest.approx(1 - abs(len(row["chosen"].split()) - 5) / 5)


def test_equal_prompts_get_completions_of_their_own(tmp_path: Path) -> None:
    made(tmp_path / "rows.jsonl", task("ranked"), Scripted([*prompts(1), *prompts(1)]))
    one, other = lines(tmp_path / "rows.jsonl")
    assert one["prompt"] == other["prompt"] and one["completions"] != other["completions"]


# ---------------------------------------------------------------- what is left out is counted


def test_the_summary_adds_up(tmp_path: Path) -> None:
    writer = Scripted(prompts(20), cut=0.3)
    summary = made(tmp_path / "rows.jsonl", task("pairs", n=2), writer)
    rows = lines(tmp_path / "rows.jsonl")
    cut = summary["left_out"]["cut at 9 tokens"]
    assert (summary["prompts"], summary["completions"], summary["skipped"]) == (20, 40, {"some reason": 2})
    assert summary["rows"] == len(rows) == summary["kept"] / 2 and 0 < cut < 40
    assert len(rows) + sum(summary["dropped"].values()) == 20
    assert summary["ties"] == summary["dropped"].get(TIED, 0)
    assert summary["reward"]["scored"] == 40 - cut
    assert writer.closed
    kept = made(tmp_path / "all.jsonl", task("pairs", n=2, unfinished="keep"), Scripted(prompts(20), cut=0.3))
    assert kept["left_out"] == {} and kept["rows"] > len(rows)


def test_a_completion_without_a_score_is_left_out_and_never_0(tmp_path: Path) -> None:
    reward = tmp_path / "short.py"
    reward.write_text("def short(completions, **c):\n    return [-len(t) if 'a' in t else None for t in completions]\n")
    out = tmp_path / "rows.jsonl"
    summary = made(out, task("ranked", reward=f"{reward}:short", length_target=None), Scripted(prompts(12)))
    rows, missing = lines(out), sum(summary["unscored"].values())
    assert 0 < missing and summary["reward"]["scored"] == 48 - missing
    assert all("a" in text for row in rows for text in row["completions"])
    assert any(None in row["provenance"]["scores"] for row in rows)
    assert summary["reward"]["highest"] < 0 and all(score < 0 for row in rows for score in row["scores"])


def test_rewards_that_single_precision_finds_equal_tie(tmp_path: Path) -> None:
    reward = tmp_path / "hair.py"
    reward.write_text("def hair(completions, **c):\n    return [1 + len(t) * 1e-12 for t in completions]\n")
    with pytest.raises(InputError, match="not one row came of 3 prompts") as error:
        made(tmp_path / "rows.jsonl", task("pairs", reward=f"{reward}:hair", length_target=None), Scripted(prompts(3)))
    assert TIED in str(error.value)


def test_where_most_completions_are_cut_the_first_batch_says_so(tmp_path: Path) -> None:
    heard: list[str] = []
    made(tmp_path / "rows.jsonl", task("best"), Scripted(prompts(6), cut=0.7), say=heard.append)
    [warning] = [line for line in heard if "raise --max-tokens" in line]
    assert warning.endswith(
        "of the first 12 completions were cut at 9 tokens and are left out; raise --max-tokens, or set unfinished=keep"
    )
    made(tmp_path / "more.jsonl", task("best"), Scripted(prompts(6), cut=0.1), say=heard.append)
    assert sum("raise --max-tokens" in line for line in heard) == 1


def test_where_every_completion_is_cut_the_message_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8 completions cut at 9 tokens(.|\n)*raise --max-tokens"):
        made(tmp_path / "rows.jsonl", task("best"), Scripted(prompts(2), cut=2.0))


class Faulty(Scripted):
    """After so many calls nothing is written any more."""

    left = 2

    def one(self, prompt: Prompt, place: int, seed: str) -> Sample | str:
        return "the server is gone" if len(self.calls) > self.left else super().one(prompt, place, seed)


def test_a_server_that_is_gone_uses_up_no_prompts(tmp_path: Path) -> None:
    out, whole = tmp_path / "rows.jsonl", tmp_path / "whole.jsonl"
    with pytest.raises(InputError, match="12 of 12 completions were not written: the server is gone; the same command"):
        made(out, task("pairs"), Faulty(prompts(12)))
    made(out, task("pairs"), Scripted(prompts(12)))
    made(whole, task("pairs"), Scripted(prompts(12)))
    assert out.read_bytes() == whole.read_bytes()


# ---------------------------------------------------------------- interrupted, and gone on with


def test_cut_off_anywhere_the_same_command_writes_the_same_rows(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "rows.jsonl"
    summary = made(whole, task("pairs"), Scripted(prompts(12)))
    record = (tmp_path / "whole.jsonl.progress").read_bytes()
    rows, draw = whole.read_bytes(), random.Random(0)
    ends = [0, *(line["end"] for line in map(json.loads, record.splitlines()[1:]))]
    assert len(ends) == 5 and ends[-1] == len(rows)
    header = record.index(b"\n") + 1
    for cut in [0, 1, header - 1, header, *(draw.randrange(header, len(record)) for _ in range(25)), len(record)]:
        finished = max(record[:cut].count(b"\n") - 1, 0)
        left = draw.randint(ends[finished], ends[min(finished + 1, 4)]) if cut >= header else 0
        (tmp_path / "rows.jsonl.progress").write_bytes(record[:cut])
        out.write_bytes(rows[:left])
        writer = Scripted(prompts(12))
        again = made(out, task("pairs"), writer)
        assert out.read_bytes() == rows and (tmp_path / "rows.jsonl.progress").read_bytes() == record
        assert {**again, "out": ""} == {**summary, "out": ""}
        assert len(writer.calls) == 4 - finished


def test_a_killed_process_is_gone_on_with(tmp_path: Path, capsys: Any) -> None:
    model, data, out, whole = (tmp_path / name for name in ("model", "prompts.jsonl", "rows.jsonl", "whole.jsonl"))
    save_model(model)
    data.write_text("".join(json.dumps(row) + "\n" for row in prompts(100)))
    words = ["sample", "--model", str(model), "--data", str(data), "--as", "pairs", "--reward", "length", "--json"]
    words += ["--n", "3", "--max-tokens", "6", "length_target=2", "unfinished=keep", "prompts_at_once=1", "--out"]
    running = subprocess.Popen([sys.executable, "-m", "prefopt", *words, str(out)], stderr=subprocess.DEVNULL)
    record = tmp_path / "rows.jsonl.progress"
    until = time.monotonic() + 60
    while (not record.exists() or record.read_bytes().count(b"\n") < 6) and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    finished = record.read_bytes().count(b"\n") - 1
    assert 5 <= finished < 100, "killed in the middle"
    found = []
    for path in (out, whole):
        assert cli.main([*words, str(path)]) == 0
        found.append({**json.loads(capsys.readouterr().out), "out": ""})
    assert out.read_bytes() == whole.read_bytes() and found[0] == found[1]
    assert found[0]["prompts"] == 100 and found[0]["rows"] == len(lines(out)) > 10


def test_prompts_that_came_later_are_added(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    made(out, task("ranked"), Scripted(prompts(4)))
    before = out.read_bytes()
    writer = Scripted([*prompts(6)[::-1]])
    summary = made(out, task("ranked"), writer)
    assert out.read_bytes().startswith(before) and sum(writer.calls) == 2 and summary["prompts"] == 6


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    made(out, task("pairs"), Scripted(prompts(4)))
    before = out.read_bytes()
    with pytest.raises(InputError) as error:
        made(out, task("pairs", seed=5, margin=0.5), Scripted(prompts(4)))
    told = str(error.value)
    assert "\n  seed: 0 -> 5\n" in told and "\n  margin: 0.0 -> 0.5\n" in told and told.count("->") == 2
    assert "another --out" in told and "delete rows.jsonl and rows.jsonl.progress" in told
    assert out.read_bytes() == before
    made(out, task("pairs", reward_deadline=5.0, prompts_at_once=1), Scripted(prompts(4)))  # patience alone


def test_a_reward_whose_text_changed_is_another_reward(tmp_path: Path) -> None:
    reward, out = tmp_path / "own.py", tmp_path / "rows.jsonl"
    for number, text in enumerate(("len(t)", "-len(t)")):
        reward.write_text(f"def own(completions, **c):\n    return [{text} for t in completions]\n")
        given = task("pairs", reward=f"{reward}:own", length_target=None)
        if number == 0:
            made(out, given, Scripted(prompts(2)))
    with pytest.raises(InputError, match="versions"):
        made(out, given, Scripted(prompts(2)))


def test_a_file_that_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("mine\n")
    with pytest.raises(InputError, match="was not begun by this command; give another --out"):
        made(out, task("pairs"), Scripted(prompts(2)))
    assert out.read_text() == "mine\n" and not (tmp_path / "rows.jsonl.progress").exists()
    out.unlink()
    made(out, task("pairs"), Scripted(prompts(4)))
    out.write_text("mine\n")
    with pytest.raises(InputError, match="was changed since it was written"):
        made(out, task("pairs"), Scripted(prompts(4)))
    assert out.read_text() == "mine\n"
    (tmp_path / "rows.jsonl.progress").write_text("{}\n[\n")
    with pytest.raises(InputError, match=r"rows.jsonl.progress cannot be read .* to begin anew, delete"):
        made(out, task("pairs"), Scripted(prompts(4)))


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "rows.jsonl", {"n": 1}), pytest.raises(InputError, match="another process is writing it"):
        Ledger(tmp_path / "rows.jsonl", {"n": 1})
    with Ledger(tmp_path / "rows.jsonl", {"n": 1}) as ledger:
        assert ledger.done == set()


def test_reasons_without_end_do_not_fill_the_record() -> None:
    whole = Tally()
    for number in range(100):
        whole.add(Tally(completions=1, unscored={f"line {number}": 1}))  # type: ignore[arg-type]
    assert len(whole.unscored) == 21 and whole.unscored.total() == 100 == whole.completions
    assert Tally.of(json.loads(json.dumps(vars(whole)))) == whole


# ---------------------------------------------------------------- critique and revise


def judge(revise: Any) -> Any:
    """A judge that criticises, and rewrites the answer it finds in the question."""

    def respond(request: Any) -> Answer:
        if request.path.endswith("/models"):
            return Answer({"data": [{"id": "judge-1"}]})
        if "improve answers" not in request.body["messages"][0]["content"]:
            return chat("hello")
        text = request.body["messages"][1]["content"].split("<answer")[1].split(">\n")[1].split("\n</")[0]
        revised = revise(text)
        return chat("no" if revised is None else json.dumps({"critique": "too calm", "revision": revised}))

    return respond


def test_a_revision_is_chosen_over_what_it_revises(tmp_path: Path) -> None:
    principles, out = tmp_path / "principles.txt", tmp_path / "rows.jsonl"
    principles.write_text("# ours\nBe loud.\nBe kind.\n")
    with serving(judge(lambda text: text if len(text) < 12 else f"{text} yes")) as server:
        told = {"judge_url": server.url, "principles": str(principles), "judge_retries": 0}
        summary = made(out, task("revised", n=2, **told), Scripted(prompts(10)))
        principles.write_text("Be loud.\n")
        with pytest.raises(InputError, match=r'principles: \["Be loud.", "Be kind."\] -> \["Be loud."\]'):
            made(out, task("revised", n=2, **told), Scripted(prompts(10)))
    rows = lines(out)
    assert all(row["chosen"] == f"{row['rejected']} yes" for row in rows)
    assert summary["left_out"] == {"the revision changes nothing": 20 - len(rows)} and 5 < len(rows) < 20
    steps = [row["provenance"]["steps"][0] for row in rows]
    assert {step["principle"] for step in steps} == {"Be loud.", "Be kind."}
    assert steps[0]["critique"] == "too calm" and steps[0]["model"] == "judge-1"
    assert rows[0]["provenance"]["judge"] == {"model": "judge-1", "rounds": 1}
    assert len(load(out, word_tokenizer(), "pairs")) == len(rows)


def test_a_revision_has_the_form_of_its_prompt(tmp_path: Path) -> None:
    with serving(judge(lambda text: f"{text} yes")) as server:
        made(tmp_path / "rows.jsonl", task("revised", n=1, judge_url=server.url), Scripted(prompts(2, turns=True)))
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TURNS
    data = load(tmp_path / "rows.jsonl", tokenizer, "pairs")
    assert len(data) == 2 and data.shape.endswith("conversational")
    assert lines(tmp_path / "rows.jsonl")[0]["chosen"][0]["role"] == "assistant"


def test_with_a_reward_only_revisions_that_score_better_are_kept(tmp_path: Path) -> None:
    reward = tmp_path / "long.py"
    reward.write_text("def long(completions, **c):\n    return [len(t) for t in completions]\n")
    with serving(judge(lambda text: f"{text} yes" if len(text) % 2 else "no")) as server:
        options = {"judge_url": server.url, "reward": f"{reward}:long", "margin": 4.0}
        summary = made(tmp_path / "rows.jsonl", task("revised", n=2, **options), Scripted(prompts(8)))
    rows = lines(tmp_path / "rows.jsonl")
    assert rows and all(row["score_chosen"] == row["score_rejected"] + 4 for row in rows)
    assert summary["left_out"] == {"the revision does not score better": 16 - len(rows)}
    assert summary["reward"]["scored"] == 32


def test_a_judge_that_does_not_revise_stops_the_run(tmp_path: Path) -> None:
    with (
        serving(judge(lambda text: None)) as server,
        pytest.raises(InputError, match="4 of 4 completions were not rev"),
    ):
        made(tmp_path / "rows.jsonl", task("revised", judge_url=server.url), Scripted(prompts(1)))
    with pytest.raises(InputError, match="does not answer"):
        made(tmp_path / "rows.jsonl", task("revised", judge_url="http://127.0.0.1:9/v1"), Scripted(prompts(1)))


# ---------------------------------------------------------------- the command


def refused(capsys: Any, *words: str) -> str:
    assert cli.main(["sample", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return str(err)


def test_what_would_not_be_read_is_refused_before_anything_is_loaded(capsys: Any, tmp_path: Path) -> None:
    here = ["--model", "m", "--prompt", "a", "--as", "pairs", "--out", str(tmp_path / "rows.jsonl")]
    plain = ["--model", "m", "--prompt", "a"]
    assert "no reward is named" in refused(capsys, *here)
    assert "give --out FILE" in refused(capsys, *here[:-2])
    assert "give --n of at least 2" in refused(capsys, *here, "--reward", "repetition", "--n", "1")
    assert "--temperature 0 writes 8 equal" in refused(capsys, *here, "--reward", "repetition", "--temperature", "0")
    assert "keep is read with --as best only" in refused(capsys, *here, "--reward", "repetition", "keep=2")
    assert "did you mean length?" in refused(capsys, *here, "--reward", "lenght")
    assert "length_target is missing" in refused(capsys, *here, "--reward", "length")
    assert "principles is read with --reward judge" in refused(capsys, *here, "--reward", "math", "principles=x")
    assert "server_timeout is read with --sampler URL" in refused(capsys, *plain, "server_timeout=1")
    assert "reward is read with --as only" in refused(capsys, *plain, "--reward", "math")
    assert "margin is read with --as only" in refused(capsys, *plain, "margin=1")
    assert "give a server's address" in refused(capsys, *plain, "--sampler", "vllm")
    server = ["--sampler", "http://127.0.0.1:9/v1", "--prompt", "a"]
    assert "max_length is of no use with --sampler URL" in refused(capsys, *server, "max_length=8")
    assert "adapter is of no use with --sampler URL" in refused(capsys, *server, "--adapter", "x")
    assert "no server answers" in refused(capsys, *server)
    assert "min_p must be" in refused(capsys, *plain, "--min-p", "2")
    assert list(tmp_path.iterdir()) == []


def test_every_option_of_rows_is_for_some_kind() -> None:
    assert {kind for kinds in READ_BY.values() for kind in kinds} <= set(commands.ROWS) == set(TRAINS)
    assert set(READ_BY) <= set(vars(RowOptions()))


def completing(request: Any) -> Answer:
    """A server whose completions are a function of prompt and seed, of one to five words."""
    if request.path.endswith("/models"):
        return Answer({"data": [{"id": "writer"}]})
    text = " ".join("ab"[: 1 + request.body["seed"] % 2] for _ in range(1 + request.body["seed"] % 5))
    said = {"text": text} if "prompt" in request.body else {"message": {"role": "assistant", "content": text}}
    return Answer({"model": "writer-1", "choices": [{"index": 0, "finish_reason": "stop", **said}]})


def test_a_server_writes_rows_too(capsys: Any, tmp_path: Path) -> None:
    data, out = tmp_path / "prompts.jsonl", tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"{n}?", "answer": "a"}) + "\n" for n in range(5)))
    with serving(completing) as server:
        words = ["--sampler", server.url, "--data", str(data), "--as", "labels", "--reward", "exact"]
        assert cli.main(["sample", *words, "--n", "6", "threshold=1", "--out", str(out), "--json"]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert cli.main(["sample", "--sampler", server.url, "--prompt", "Hi", "--json"]) == 0
        [row] = map(json.loads, capsys.readouterr().out.splitlines())
    rows = lines(out)
    assert len(rows) == 30 == summary["labels"]["good"] + summary["labels"]["bad"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "0?"}] and rows[0]["completion"][0]["role"] == "assistant"
    assert all(row["label"] is (row["completion"][0]["content"] == "a") for row in rows)
    assert rows[0]["provenance"]["model"] == "writer" and rows[0]["provenance"]["server"] == server.url
    assert row["prompt"] == [{"role": "user", "content": "Hi"}] and row["tokens"] is None


def test_what_is_drawn_from_can_be_narrowed(capsys: Any, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")

    def said(*words: str) -> list[str]:
        given = ["sample", "--model", str(model), "--prompt", "red cat", "--max-tokens", "8", "--json", *words]
        assert cli.main(given) == 0
        return [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]

    greedy = said("--temperature", "0")
    assert said("--top-k", "1", "--seed", "4") == greedy == said("--min-p", "0.999", "--seed", "5")
    assert said("--seed", "4") != greedy
    first = greedy[0].split()[0]
    stopped = said("--temperature", "0", "--stop", first)
    assert stopped[0].split() == [first] and len(greedy[0].split()) > 1
