"""Chat templates in the styles people use, and tokenizers built in code: what the data tests share."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for call in m['tool_calls'] or [] %}{{ '<call>' + call['function'] | tojson + '</call>' }}{% endfor %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
STYLES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL}

MARKED = (  # ChatML that says itself which tokens are the assistant's
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_WITHOUT_STOP = MARKED.replace(
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
    "{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}",
)
LAST_TURN_THINKS = (  # as Qwen 3: an empty thought block in the last turn only
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PROMPT_THINKS = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n\n</think>\n\n' }}{% endif %}")
COUNTS_TURNS = "{{ messages | length }}" + CHATML  # the first token changes with every turn: no prefix is stable
NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{{ 'assistant: ' if add_generation_prompt }}"
)

SPECIAL = [
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
SPECIAL += ["<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]

WORDS = "the a fox key tree under found shiny old day sun rain über naïve 猫 ご飯 don't I'm 12 345 x=1; (so)".split()


def sentence(random_: random.Random, num: int = 12) -> str:
    """Words with what upsets tokenizers: doubled spaces, line breaks, leading and trailing space, emoji."""
    text = " ".join(random_.choice(WORDS) for _ in range(random_.randint(1, num)))
    return random_.choice(["{}", "{}", "{}", "{}.", "{}\n", " {}", "{}  end", "🙂 {}", "a\n\n{}"]).format(text)


@lru_cache
def trained() -> str:
    """A byte-level BPE of 500 tokens with the special tokens of every style, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    texts = [sentence(random.Random(number)) for number in range(200)]
    tokenizer.train_from_iterator([*texts, "user system assistant model tool Human: Assistant:"], trainer)
    return tokenizer.to_str()


def build(template: str | None = None, *, bos: str | None = "<s>", adds_bos: bool = False, **more: Any) -> Any:
    """A tokenizer on `trained`, adding BOS to a text or not."""
    from tokenizers import Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer.from_str(trained())
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": bos, "eos_token": "</s>", "pad_token": "<pad>", **more}
    extra = [token for token in SPECIAL if token not in names.values()]
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=extra, **names)
    made.chat_template = template
    return made


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
