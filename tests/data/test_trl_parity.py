"""The token ids and completion masks of TRL 1.16's own trainers, on 1,000 rows and four chat templates.

Where the two differ, a test below says how and why.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from chat_styles import MARKED, STYLES, assistant, build, sentence, user

from prefopt.data import DataOptions, load
from prefopt.data.columns import Record
from prefopt.data.template import Encoder

trl = pytest.importorskip("trl", reason="parity needs TRL: pip install trl==1.16.*")
datasets = pytest.importorskip("datasets")

ROWS = 1000


def conversations() -> list[tuple[list[dict[str, str]], str, str]]:
    """Prompts of one or two user turns, a better and a worse answer."""
    random_, rows = random.Random(0), []
    for _ in range(ROWS):
        turns = [user(sentence(random_))]
        if random_.random() < 0.4:
            turns += [assistant(sentence(random_)), user(sentence(random_))]
        better = sentence(random_)
        rows.append((turns, better, better + " no"))
    return rows


def pairs(conversational: bool) -> list[dict[str, Any]]:
    wrap = (lambda text: [assistant(text)]) if conversational else (lambda text: text)
    prompt = (lambda turns: turns) if conversational else (lambda turns: turns[0]["content"] + " ")
    return [{"prompt": prompt(t), "chosen": wrap(a), "rejected": wrap(b)} for t, a, b in conversations()]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def tiny(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **shape))


def trl_sft(
    rows: list[dict[str, Any]], tokenizer: Any, path: Path, **options: Any
) -> list[tuple[list[int], list[bool]]]:
    """TRL's token ids and, per token, whether its loss is taken."""
    settings = {"report_to": [], "max_length": None, "use_cpu": True, "bf16": False, **options}
    made = trl.SFTTrainer(
        model=tiny(tokenizer),
        args=trl.SFTConfig(output_dir=str(path), **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset
    return [(row["input_ids"], [label != -100 for label in row["labels"]]) for row in made]


def trl_dpo(rows: list[dict[str, Any]], tokenizer: Any, path: Path) -> list[tuple[list[int], list[int], list[int]]]:
    settings = {"report_to": [], "max_length": None, "use_cpu": True, "bf16": False}
    made = trl.DPOTrainer(
        model=tiny(tokenizer),
        ref_model=tiny(tokenizer),
        args=trl.DPOConfig(output_dir=str(path), **settings),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in made]


def ours_sft(path: Path, tokenizer: Any, **options: Any) -> list[tuple[list[int], list[bool]]]:
    data = load(path, tokenizer, "demonstrations", DataOptions(max_length=None, **options))
    return [
        (example.prompt + example.completions[0], [False] * len(example.prompt) + example.trained[0])
        for example in data.examples
    ]


def ours_dpo(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int], list[int]]]:
    data = load(path, tokenizer, "pairs", DataOptions(max_length=None))
    assert all(all(flags) for example in data.examples for flags in example.trained)
    return [(example.prompt, *example.completions) for example in data.examples]  # type: ignore[misc]


@pytest.mark.parametrize("style", STYLES)
def test_dpo_prompt_chosen_and_rejected_ids_are_those_of_trl(style: str, tmp_path: Path) -> None:
    tokenizer, rows = build(STYLES[style]), pairs(conversational=True)
    assert ours_dpo(written(tmp_path / "rows.jsonl", rows), tokenizer) == trl_dpo(rows, tokenizer, tmp_path)


@pytest.mark.parametrize("style", STYLES)
def test_sft_ids_and_completion_masks_are_those_of_trl(style: str, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs(conversational=True)]
    tokenizer = build(STYLES[style])
    assert ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer) == trl_sft(rows, tokenizer, tmp_path)


@pytest.mark.parametrize("style", STYLES)
def test_messages_with_train_on_all_are_those_of_trl_but_for_the_first_token(style: str, tmp_path: Path) -> None:
    """TRL labels the first token too; nothing predicts it, and its shift drops that label. Here it is the prompt."""
    rows = [{"messages": row["prompt"] + row["chosen"]} for row in pairs(conversational=True)]
    tokenizer = build(STYLES[style])
    theirs = [(ids, [False, *flags[1:]]) for ids, flags in trl_sft(rows, tokenizer, tmp_path)]
    assert ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer, train_on="all") == theirs


def test_messages_under_a_marking_template_have_the_assistant_masks_of_trl(tmp_path: Path) -> None:
    """Nothing is kept after the last trained token here; TRL keeps the template's last line break, untrained."""
    rows = [{"messages": row["prompt"] + row["chosen"]} for row in pairs(conversational=True)]
    tokenizer = build(MARKED)
    theirs = trl_sft(rows, tokenizer, tmp_path, assistant_only_loss=True)
    ours = ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer, train_on="assistant")
    line_break = tokenizer.encode("\n")
    assert ours == [(ids[:-1], flags[:-1]) for ids, flags in theirs]
    assert all(ids[-1:] == line_break and not flags[-1] for ids, flags in theirs)


@pytest.mark.parametrize("name", ["cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "qwen3_instruct_2507"])
def test_answers_found_without_marks_are_those_that_trl_marks(name: str) -> None:
    """TRL has copies of some models' templates with `{% generation %}` marks; here the plain one does."""
    import re

    folder = Path(trl.__file__).parent / "chat_templates"
    files = [folder / f"{name}.jinja", folder / f"{name}_training.jinja"]
    assert all(file.is_file() for file in files), f"the pinned TRL has no marked copy of the {name} template"
    tokenizer = build()
    special = sorted(set(re.findall(r"<[|]?[A-Za-z0-9_]+[|]?>", files[0].read_text())))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    messages = [user("a fox"), assistant("the key"), user("old tree"), assistant("shiny sun")]
    record = Record("r:1", None, [messages], [1.0])
    plain, marked = (Encoder(tokenizer, chat_template=file.read_text()) for file in files)
    assert marked.marks_assistant and not plain.marks_assistant
    assert plain.encode([plain.render(record, "demonstrations")]) == marked.encode(
        [marked.render(record, "demonstrations")]
    )


@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_rows_are_those_of_trl_boundary_merges_included(adds_bos: bool, tmp_path: Path) -> None:
    tokenizer, rows = build(adds_bos=adds_bos), pairs(conversational=False)
    ours, theirs = ours_dpo(written(tmp_path / "rows.jsonl", rows), tokenizer), trl_dpo(rows, tokenizer, tmp_path)
    merged = [
        row for row, mine in zip(rows, ours, strict=True) if len(mine[0]) < len(tokenizer(row["prompt"])["input_ids"])
    ]
    assert ours == theirs
    assert len(merged) > 100


@pytest.mark.parametrize("adds_bos", [False, True])
def test_text_prompt_and_completion_are_those_of_trl(adds_bos: bool, tmp_path: Path) -> None:
    rows = [{"prompt": "Q: " + row["prompt"], "completion": row["chosen"]} for row in pairs(conversational=False)]
    tokenizer = build(adds_bos=adds_bos)
    assert ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer) == trl_sft(rows, tokenizer, tmp_path)


def test_plain_text_is_that_of_trl_but_for_the_first_token(tmp_path: Path) -> None:
    rows = [{"text": row["prompt"] + row["chosen"]} for row in pairs(conversational=False)]
    tokenizer = build(adds_bos=True)
    theirs = [(ids, [False, *flags[1:]]) for ids, flags in trl_sft(rows, tokenizer, tmp_path)]
    assert ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer) == theirs


def test_a_prompt_that_merges_whole_into_the_answer_is_bos_here_and_empty_in_trl(tmp_path: Path) -> None:
    rows, tokenizer = [{"prompt": " ", "chosen": "fox", "rejected": "key"}], build()
    [(prompt, *answers)] = trl_dpo(rows, tokenizer, tmp_path)
    assert prompt == []
    assert ours_dpo(written(tmp_path / "rows.jsonl", rows), tokenizer) == [([tokenizer.bos_token_id], *answers)]


def test_a_text_that_spells_its_bos_keeps_one_where_trl_has_two(tmp_path: Path) -> None:
    rows, tokenizer = [{"prompt": "<s>the fox", "completion": " found a key"}], build(adds_bos=True)
    [(theirs, _)] = trl_sft(rows, tokenizer, tmp_path)
    [(ours, _)] = ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer)
    assert theirs[:2] == [tokenizer.bos_token_id] * 2
    assert ours == theirs[1:]


def test_a_tool_s_answer_inside_a_completion_is_trained_by_trl_and_not_here(tmp_path: Path) -> None:
    completion = [assistant("the key"), {"role": "tool", "content": "old tree"}, assistant("under the tree")]
    rows, tokenizer = [{"prompt": [user("a fox")], "completion": completion}], build(STYLES["chatml"])
    [(theirs, their_flags)] = trl_sft(rows, tokenizer, tmp_path)
    [(ours, flags)] = ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer)
    assert ours == theirs
    start = their_flags.index(True)
    untrained = [token for token, flag in zip(ours[start:], flags[start:], strict=True) if not flag]
    assert all(their_flags[start:])
    assert tokenizer.decode(untrained) == "<|im_start|>tool\nold tree<|im_end|>\n<|im_start|>assistant\n"


def test_a_template_without_a_stop_token_gets_eos_here_and_none_from_trl(tmp_path: Path) -> None:
    from chat_styles import NO_STOP

    rows, tokenizer = [{"prompt": [user("a fox")], "completion": [assistant("the key")]}], build(NO_STOP)
    [(theirs, their_flags)] = trl_sft(rows, tokenizer, tmp_path)
    [(ours, flags)] = ours_sft(written(tmp_path / "rows.jsonl", rows), tokenizer)
    assert (ours, flags) == ([*theirs, tokenizer.eos_token_id], [*their_flags, True])
