"""The command line: what it teaches, what it refuses, and what it survives."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefopt import catalogue, cli, config, terminal
from prefopt.commands import sample, train

HEAVY = {"torch", "transformers", "datasets", "pandas", "pyarrow", "peft", "accelerate"}
HELP = [["--help"], ["--version"], ["train", "--help"], ["train", "dpo", "--help"], ["quickstart", "--help"]]
HELP += [["sample", "--help"], ["objectives"], ["objectives", "dpo"], ["explain"], ["explain", "loss"]]


def prefopt(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """`prefopt WORDS` in a process of its own."""
    more = {"capture_output": True, "text": True, "timeout": 120, **more}
    return subprocess.run([sys.executable, "-m", "prefopt", *words], **more)


def refused(capsys: Any, *words: str) -> str:
    """The message of a command that ends in exit code 2, on stderr alone."""
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err and err.count("\n") == 1
    return str(err.rstrip("\n"))


def said(capsys: Any, *words: str) -> str:
    """What a command that succeeds prints."""
    assert cli.main(words) == 0
    return str(capsys.readouterr().out)


# ---------------------------------------------------------------- help


@pytest.mark.parametrize("words", HELP, ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys; from prefopt.cli import main; main({words!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *shown, modules = done.stdout.splitlines()
    assert shown and HEAVY & set(modules.split()) == set()


def test_help_without_a_word_or_with_any_of_its_names_lists_the_commands(capsys: Any) -> None:
    for words in ([], ["-h"], ["--help"], ["help"]):
        text = said(capsys, *words)
        assert all(f"prefopt {name}" in text for name in cli.COMMANDS)


def test_version(capsys: Any) -> None:
    from prefopt import __version__

    assert said(capsys, "--version") == f"prefopt {__version__}\n"


@pytest.mark.parametrize("objective", config.objectives())
def test_help_of_an_objective_lists_every_option_with_default_and_comment(capsys: Any, objective: str) -> None:
    text = said(capsys, "train", objective, "--help")
    assert f"prefopt train {objective} --model DIR" in text
    flowing = " ".join(text.split())
    for row in config.describe(config.sections(objective)):
        assert f"\n  {row.key}={catalogue.written(row.default)} " in text
        assert " ".join(row.comment.replace("None", "null").split()) in flowing


def test_help_of_train_lists_the_objectives(capsys: Any) -> None:
    text = said(capsys, "train", "--help")
    known = config.objectives().items()
    assert all(f"\n  {name} " in text and source.facts["title"] in text for name, source in known)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("float | None", "number or null"),
        ("Literal['drop', 'truncate']", "drop, truncate"),
        ("Literal['auto'] | int", "auto or whole number"),
        ("dict[str, str] | None", "mapping[text, text] or null"),
        ("tuple[str, ...]", "list[text, any number]"),
        ("bool", "true or false"),
        ("Path", "path"),
    ],
)
def test_types_are_said_in_words(source: str, words: str) -> None:
    assert catalogue.kind_in_words(source) == words


@pytest.mark.parametrize(
    ("default", "text"), [("None", "null"), ("True", "true"), ("'linear'", "linear"), ("1e-06", "1e-06"), ("", "")]
)
def test_defaults_are_written_as_one_would_type_them(default: str, text: str) -> None:
    assert catalogue.written(default) == text


# ---------------------------------------------------------------- refusals


def test_an_unknown_command_names_the_nearest(capsys: Any) -> None:
    assert refused(capsys, "trian") == "error: 'trian' is not a command; did you mean train?"
    assert refused(capsys, "zzz").startswith("error: 'zzz' is not a command; choose one of train, ")


def test_an_unknown_flag_names_the_nearest_or_how_options_are_written(capsys: Any) -> None:
    assert "--modle: no such flag; did you mean --model?" in refused(capsys, "train", "dpo", "--modle", "x")
    message = refused(capsys, "train", "dpo", "--learning_rate", "1e-5")
    assert "options are written without dashes, such as learning_rate=VALUE" in message
    assert "--mod: no such flag" in refused(capsys, "train", "dpo", "--mod", "x"), "no abbreviation is guessed"


def test_train_without_an_objective_says_what_there_is(capsys: Any) -> None:
    for words in (["train"], ["train", "beta=1"], ["train", "--model", "x"]):
        assert f"objectives: {', '.join(config.objectives())}" in refused(capsys, *words)


def test_an_unknown_objective_names_the_nearest(capsys: Any) -> None:
    assert refused(capsys, "train", "dop") == "error: objective: 'dop' is not one; did you mean dpo?"
    assert refused(capsys, "train", "dop", "--help") == "error: objective: 'dop' is not one; did you mean dpo?"


def test_a_recipe_without_an_objective_is_refused(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("beta: 0.2\n")
    assert f"{path}: objective: missing" in refused(capsys, "train", str(path))
    assert "cannot read this recipe" in refused(capsys, "train", str(tmp_path / "none.yaml"))


def test_a_wrong_value_is_refused_where_it_stands(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: dpo\nbeta: strong\n")
    assert refused(capsys, "train", str(path)) == f"error: {path}:2: beta: expected a number, got 'strong'"
    assert refused(capsys, "train", "dpo", "beta=strong") == "error: beta: expected a number, got 'strong'"
    assert "not an option here; it belongs to dpo" in refused(capsys, "train", "sft", "f_divergence=js")


# ---------------------------------------------------------------- layers


def printed(capsys: Any, folder: Path, *words: str) -> config.Layer:
    """What --print-config prints, read as the recipe it is."""
    path = folder / "printed.yaml"
    path.write_text(said(capsys, "train", *words, "--print-config"))
    return config.read_recipe(path)


def test_the_command_line_wins_over_the_recipe_and_mappings_are_merged(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: dpo\nmodel: here\nbeta: 0.2\nmax_length: 64\nmap: {prompt: question}\n")
    flags = [
        "--model",
        "7",
        "--data",
        "pairs.jsonl",
        "--out",
        "o",
        "--map",
        "chosen=good",
        "--map",
        "rejected=bad",
        "--skip-bad",
    ]
    found = printed(capsys, tmp_path, str(path), *flags, "beta=1e-2")
    wanted = {"objective": "dpo", "model": "7", "data": "pairs.jsonl", "beta": 0.01, "max_length": 64}
    wanted |= {"skip_bad": True, "map": {"prompt": "question", "chosen": "good", "rejected": "bad"}}
    assert {key: found[key] for key in wanted} == wanted


def test_flags_and_options_may_come_in_any_order(capsys: Any, tmp_path: Path) -> None:
    one = printed(capsys, tmp_path, "dpo", "beta=0.3", "--model", "m", "max_length=9", "--out", "o", "data=d")
    other = printed(capsys, tmp_path, "--out", "o", "--model", "m", "dpo", "max_length=9", "beta=0.3", "data=d")
    assert one == other and (one["beta"], one["max_length"]) == (0.3, 9)


@pytest.mark.parametrize("objective", config.objectives())
def test_a_printed_configuration_is_a_recipe_that_prints_itself(capsys: Any, tmp_path: Path, objective: str) -> None:
    words = ["--model", "m", "--data", "d", "--out", "o"]
    first = said(capsys, "train", objective, *words, "--print-config")
    path = tmp_path / "rate=1" / "recipe.yaml"
    path.parent.mkdir()
    path.write_text(first)
    assert said(capsys, "train", str(path), "--print-config") == first


# ---------------------------------------------------------------- sample


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    """The folder of a tiny random Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["</s>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=0,
    )
    folder = Path(tmp_path_factory.mktemp("model"))
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sampled(capsys: Any, model: Path, *words: str) -> list[dict[str, Any]]:
    text = said(capsys, "sample", "--model", str(model), "--max-tokens", "4", "--json", *words)
    return [json.loads(line) for line in text.splitlines()]


def test_samples_are_rows_of_prompt_and_completion(capsys: Any, model: Path) -> None:
    rows = sampled(capsys, model, "--prompt", "ab", "--prompt", "c", "--n", "2")
    assert [row["prompt"] for row in rows] == ["ab", "ab", "c", "c"]
    assert all(row["tokens"] <= 4 and (row["finished"] or row["tokens"] == 4) for row in rows)
    assert rows == sampled(capsys, model, "--prompt", "ab", "--prompt", "c", "--n", "2"), "equal seeds, equal samples"
    assert rows != sampled(capsys, model, "--prompt", "ab", "--prompt", "c", "--n", "2", "--seed", "1")


def test_a_prompt_is_a_turn_where_there_is_a_chat_template(capsys: Any, model: Path) -> None:
    (row,) = sampled(capsys, model, "--prompt", "ab", f"chat_template={CHAT}")
    assert row["prompt"] == [{"role": "user", "content": "ab"}]
    assert [turn["role"] for turn in row["completion"]] == ["assistant"]


def test_samples_written_to_a_file_can_be_trained_on(capsys: Any, tmp_path: Path, model: Path) -> None:
    from prefopt.data import load
    from prefopt.models.load import load_tokenizer

    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "samples.jsonl"
    prompts.write_text('{"question": "ab"}\n{"question": "c"}\n')
    words = ["--data", str(prompts), "--map", "prompt=question", "--out", str(out), "--max-tokens", "4"]
    assert said(capsys, "sample", "--model", str(model), *words) == ""
    dataset = load(out, load_tokenizer(model), "demonstrations")
    assert [example.prompt for example in dataset.examples] == [
        load_tokenizer(model)(p)["input_ids"] for p in ("ab", "c")
    ]


def test_a_completion_keeps_the_space_that_its_first_token_begins_with() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from prefopt.rollout.text import continuation

    inner = Tokenizer(models.WordLevel({"\u2581Lily": 0, "\u2581and": 1, "</s>": 2}, unk_token="</s>"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer.decode([1]) == "and", "decoded alone, the space is gone"
    assert continuation(tokenizer, [0], [1, 2]) == " and"


def test_a_reader_sees_where_a_sample_was_cut() -> None:
    row = {"prompt": "ab", "completion": " c", "tokens": 4, "finished": False}
    assert sample.sample_text(row) == "> ab\n c  [cut at 4 tokens]"
    turns = {"prompt": [{"role": "user", "content": "ab"}], "completion": [{"role": "assistant", "content": "c"}]}
    assert sample.sample_text({**turns, "finished": True}) == "> user: ab\nc"


def test_sampling_is_refused_in_one_message(capsys: Any, tmp_path: Path, model: Path) -> None:
    here = ("sample", "--model", str(model))
    assert "either --prompt or --data" in refused(capsys, *here)
    assert "either --prompt or --data" in refused(capsys, *here, "--prompt", "a", "--data", "b")
    assert "n must be at least 1, got 0" in refused(capsys, *here, "--prompt", "a", "--n", "0")
    assert "invalid int value: 'x'" in refused(capsys, *here, "--prompt", "a", "--n", "x")
    assert "adapter_config.json is missing" in refused(capsys, *here, "--prompt", "a", "--adapter", str(tmp_path))
    assert "cannot write: " in refused(capsys, *here, "--prompt", "a", "--out", str(tmp_path), "--max-tokens", "1")
    assert "did you mean dtype?" in refused(capsys, *here, "--prompt", "a", "dtyp=x")


# ---------------------------------------------------------------- train


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: Any) -> Path:
    """Twelve pairs, one of them equal, under column names of their own."""
    path = Path(tmp_path_factory.mktemp("pairs")) / "pairs.jsonl"
    rows = [{"prompt": f"{n} + 1 is", "good": f" {n + 1}.", "bad": " unknown."} for n in range(11)]
    rows.append({"prompt": "x", "good": " same", "bad": " same"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def dpo(model: Path, pairs: Path, *words: str) -> list[str]:
    flags = ["--model", str(model), "--data", str(pairs), "--map", "chosen=good", "--map", "rejected=bad"]
    return ["train", "dpo", *flags, "batch_size=4", "epochs=2", "eval_fraction=0.2", *words]


def test_a_dry_run_shows_counts_rows_and_steps_and_writes_nothing(
    capsys: Any, tmp_path: Path, monkeypatch: Any, model: Path, pairs: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    text = said(capsys, *dpo(model, pairs, "--dry-run"))
    assert "dropped 1: 1 chosen and rejected are equal" in text
    assert text.count("--- row ") == 3 and "prompt: '" in text and "6 steps would be taken" in text
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_for_machines_counts_the_same(capsys: Any, model: Path, pairs: Path) -> None:
    plan = json.loads(said(capsys, *dpo(model, pairs, "--dry-run", "--json")))
    assert plan["steps"] == 6
    assert (plan["data"]["rows"], plan["held_out"]["rows"]) == (9, 2)
    assert sum(plan["data"]["dropped"].values()) == 1
    # " 1." and " unknown." with their end token: 4 and 10 bytes are trained; "0 + 1 is" is a prompt of 8
    num_trained = sum(len(f" {n + 1}.") + 1 + len(" unknown.") + 1 for n in range(11))
    assert plan["data"]["trained_tokens"] + plan["held_out"]["trained_tokens"] == num_trained


def test_a_dry_run_refuses_what_the_run_refuses_and_shows_what_the_rows_settle(
    capsys: Any, tmp_path: Path, model: Path
) -> None:
    def kto(prompts: list[str], *words: str) -> list[str]:
        rows = [{"prompt": p, "completion": " yes", "label": n % 4 == 0} for n, p in enumerate(prompts)]
        (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--model", str(model), "--data", str(tmp_path / "labels.jsonl"), "--dry-run", "eval_fraction=0"]
        return ["train", "kto", *flags, *words]

    several = [f"{n} + 1 is" for n in range(8)]
    assert "at least 2 prompts in an update, got 1" in refused(capsys, *kto(several, "batch_size=1"))
    assert "eval_every needs held-out rows" in refused(capsys, *kto(several, "eval_every=1"))
    assert "and all rows have one; use bco" in refused(capsys, *kto(["1 + 1 is"] * 8))
    plan = json.loads(said(capsys, *kto(several, "--json")))
    assert plan["settled"].keys() == {"desirable_weight", "undesirable_weight"}
    weight = plan["settled"]["desirable_weight"]
    assert weight > 1 and f"desirable_weight: {weight}, from the training rows" in said(capsys, *kto(several))


def test_training_prints_only_its_summary_for_machines_and_the_model_loads(
    capsys: Any, tmp_path: Path, model: Path, pairs: Path
) -> None:
    from transformers import AutoModelForCausalLM

    words = dpo(model, pairs, "--out", str(tmp_path / "run"), "--json", f"cache_dir={tmp_path}/cache")
    assert cli.main([*words, "learning_rate=1e-3"]) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["steps"], summary["learning_rate"]) == (6, 1e-3)
    assert summary["start"]["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert summary["end"]["eval/loss"] < summary["start"]["eval/loss"]
    assert "9 pairs" in err
    AutoModelForCausalLM.from_pretrained(summary["model"])
    assert "already holds a run" in refused(capsys, *words)
    again = said(capsys, "train", str(tmp_path / "run" / "config.yaml"), "--print-config")
    assert again == (tmp_path / "run" / "config.yaml").read_text(), "the run's own configuration is a recipe"


# ---------------------------------------------------------------- what it survives


@pytest.mark.fault(34)
def test_a_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "prefopt", "train", "--help"], stdout=writing, stderr=subprocess.PIPE, timeout=120
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.fault(34)
def test_closed_streams_are_no_error() -> None:
    done = prefopt("train", "--help", preexec_fn=lambda: os.close(1), stdout=None, capture_output=False)
    assert done.returncode == 0
    done = prefopt("zzz", preexec_fn=lambda: os.close(2), stderr=None, stdout=subprocess.PIPE, capture_output=False)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.fault(34)
def test_a_locale_that_cannot_show_a_character_is_no_error(tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    path = tmp_path / "recipe.yaml"
    path.write_text("objective: sft\nmodel: m\ndata: d\nout: \N{GREEK SMALL LETTER BETA}\n", encoding="utf-8")
    done = prefopt("train", str(path), "--print-config", env={**os.environ, **plain})
    assert done.returncode == 0 and "\nout: \\u03b2\n" in done.stdout
    done = prefopt("train", "dpo", "beta=\N{GREEK SMALL LETTER BETA}", env={**os.environ, **plain})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: beta: expected a number, got '\\") and done.stderr.isascii()


def test_an_interrupt_ends_in_130_without_a_traceback(capsys: Any, monkeypatch: Any) -> None:
    def interrupted(words: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_bug_keeps_its_traceback(monkeypatch: Any) -> None:
    def broken(words: list[str]) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train"])


def test_for_machines_what_libraries_print_goes_to_stderr(capsys: Any) -> None:
    with terminal.libraries(machine=True):
        print("chatter")
    with terminal.libraries(machine=False):
        print("talk")
    assert capsys.readouterr() == ("talk\n", "chatter\n")


def test_a_summary_is_shown_as_lines() -> None:
    summary = {"steps": 3, "win_rate": {"value": 0.61234567, "n": 8}, "note": None, "dropped": {}, "layout": "tree"}
    assert terminal.summary_lines(summary) == ["steps   3", "win_rate", "  value  0.6123", "  n      8", "layout  tree"]


def test_a_report_sets_start_beside_end() -> None:
    summary = {"steps": 3, "start": {"loss": 9.0, "eval/loss": 0.693147}, "end": {"loss": 8.0, "eval/loss": 0.5}}
    assert train.report_lines(summary) == [
        "                start         end",
        "eval/loss      0.6931         0.5",
        "",
        "steps  3",
    ]
