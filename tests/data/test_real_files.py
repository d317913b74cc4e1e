"""Real preference files, read whole, with their counts. They lie at ../shared; where they do not, this is skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_styles import CHATML

from prefopt.data import DataOptions, Dataset, load
from prefopt.data.convert import COMPARED
from prefopt.records import InputError

SHARED = Path(__file__).resolve().parents[3] / "shared"
pytestmark = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the real data is not at ../shared/data")

IMPLICIT = "chosen/rejected with an implicit prompt, text, cut after the last common turn"
FILES: list[tuple[str, str, str, int, dict[str, int]]] = [
    # 2,312 pairs, 4 of them with an empty chosen answer
    ("hh-rlhf/test.jsonl.gz", "pairs", IMPLICIT, 2308, {"empty completion": 4}),
    ("hh-rlhf/test.jsonl.gz", "ratings", IMPLICIT, 2308, {"empty completion": 4}),
    # 1,100 pairs, 6 of them with the same text twice
    (
        "llms-from-scratch/instruction-data-with-preference.json",
        "pairs",
        "instruction/chosen/rejected, conversational",
        1094,
        {"chosen and rejected are equal": 6},
    ),
    (
        "llms-from-scratch/instruction-data-with-preference.json",
        "demonstrations",
        "instruction/chosen/rejected, conversational",
        1100,
        {},
    ),
    ("llms-from-scratch/instruction-data.json", "demonstrations", "instruction/output, conversational", 1100, {}),
    ("llama-factory/dpo_en_demo.json", "pairs", "conversations/chosen/rejected, conversational", 299, {}),
    ("llama-factory/kto_en_demo.json", "labels", "messages/label, conversational", 300, {}),
    (
        "llama-factory/kto_en_demo.json",
        "demonstrations",
        "messages/label, conversational",
        150,
        {"labelled bad, not a demonstration": 150},
    ),
    ("llama-factory/alpaca_en_demo.json", "demonstrations", "instruction/output, conversational", 999, {}),
    ("llama-factory/glaive_toolcall_en_demo.json", "demonstrations", "messages, conversational, with tools", 300, {}),
    # every pair of ranked siblings
    ("oasst-sample/en_100_tree.jsonl", "pairs", "an OpenAssistant message tree, conversational", 754, {}),
    ("oasst-sample/en_100_tree.jsonl", "ratings", "an OpenAssistant message tree, conversational", 212, {}),
    ("oasst-sample/en_100_message.jsonl", "pairs", "an OpenAssistant message tree, conversational", 754, {}),
    ("gsm8k/train.jsonl", "demonstrations", "question/answer, conversational", 7473, {}),
    # 1,319 questions with 4 answers each: 731 have both a right and a wrong one
    (
        "gsm8k/example_model_solutions.jsonl",
        "pairs",
        "question and solutions with is_correct, conversational",
        731,
        {"tied scores": 588},
    ),
    # to a reward model they are groups of 4
    (
        "gsm8k/example_model_solutions.jsonl",
        "ratings",
        "question and solutions with is_correct, conversational",
        731,
        {"tied scores": 588},
    ),
    # 432 questions have no right answer to imitate
    (
        "gsm8k/example_model_solutions.jsonl",
        "demonstrations",
        "question and solutions with is_correct, conversational",
        887,
        {"no answer is right, not a demonstration": 432},
    ),
    (
        "gsm8k/example_model_solutions.jsonl",
        "labels",
        "question and solutions with is_correct, conversational",
        5276,
        {},
    ),
    ("tinystories-1k/tinystories_1000.json", "demonstrations", "text, text", 1000, {}),
    ("ifeval/input_data.jsonl", "prompts", "prompt, text", 541, {}),
    ("humaneval/HumanEval.jsonl.gz", "prompts", "prompt, text", 164, {}),
]


@pytest.fixture(scope="module")
def gpt2() -> Any:
    """GPT-2's vocabulary with ChatML's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    files = [str(SHARED / "data" / "gpt2-tokenizer" / name) for name in ("gpt2_vocab.json", "gpt2_merges.txt")]
    inner = Tokenizer(models.BPE.from_file(*files))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    extra = ["<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=extra, **ends)
    tokenizer.chat_template = CHATML
    return tokenizer


def read(name: str, tokenizer: Any, kind: Any, **options: Any) -> Dataset:
    return load(SHARED / "data" / name, tokenizer, kind, DataOptions(max_length=None, **options))


@pytest.mark.parametrize(("name", "kind", "shape", "num", "dropped"), FILES, ids=[f"{f[0]}-{f[1]}" for f in FILES])
def test_a_real_file_is_read_whole(
    name: str, kind: str, shape: str, num: int, dropped: dict[str, int], gpt2: Any
) -> None:
    data = read(name, gpt2, kind, **({"ties": "drop"} if kind in COMPARED else {}))
    assert (data.shape, len(data), data.dropped) == (shape, num, dropped)
    assert all(example.prompt and all(example.completions) for example in data.examples)


def test_a_question_that_all_answers_fail_or_solve_stops_the_comparison(gpt2: Any) -> None:
    with pytest.raises(InputError, match=r"example_model_solutions.jsonl:3: tied scores: all 4 completions score 0"):
        read("gsm8k/example_model_solutions.jsonl", gpt2, "ratings")


def test_hh_pairs_end_their_prompt_at_the_assistant_s_turn(gpt2: Any) -> None:
    data = read("hh-rlhf/test.jsonl.gz", gpt2, "pairs")
    assert all(gpt2.decode(example.prompt).endswith("\n\nAssistant:") for example in data.examples)
    assert all(tokens[-1] == gpt2.eos_token_id for example in data.examples for tokens in example.completions)
    assert all(all(flags) for example in data.examples for flags in example.trained)


def test_tool_calls_are_trained_and_tool_answers_are_not(gpt2: Any) -> None:
    data = read("llama-factory/glaive_toolcall_en_demo.json", gpt2, "demonstrations")
    calls = trained = 0
    for example, record in zip(data.examples, data.rows, strict=True):
        tokens, flags = example.completions[0], example.trained[0]
        said = gpt2.decode([token for token, flag in zip(tokens, flags, strict=True) if flag])
        messages: Any = record.completions[0]
        calls += sum(len(item.get("tool_calls", [])) for item in messages)
        trained += said.count("<call>")
        assert "<|im_start|>" not in said
        assert said.count("<|im_end|>") == sum(item["role"] == "assistant" for item in messages)
    assert calls == trained == 211


def test_stories260k_reads_a_story_as_its_reference_does() -> None:
    """Every text of this tokenizer starts with a space mark, and BOS is its own."""
    import json

    from transformers import AutoTokenizer

    folder = SHARED / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = json.loads((folder / "REFERENCE.json").read_text())
    whole = tokenizer(reference["nll_sentence"])["input_ids"]
    data = read("tinystories-1k/tinystories_1000.json", tokenizer, "demonstrations")
    assert {example.prompt[0] for example in data.examples} == {tokenizer.bos_token_id} == {whole[0]}
    stories = json.loads((SHARED / "data" / "tinystories-1k" / "tinystories_1000.json").read_text())
    for example, story in zip(data.examples, stories, strict=True):
        assert example.prompt + example.completions[0] == [*tokenizer(story)["input_ids"], tokenizer.eos_token_id]
