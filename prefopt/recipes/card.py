"""The model card: what was trained, on what, how, and with what result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt import config
from prefopt.data import Dataset
from prefopt.models.heads import AUTO, LABELS, HeadKind


def written_text(head: HeadKind, data: Dataset, tokenizer: Any) -> list[str]:
    """Lines of code that make of a row the text that was trained on, and its inputs; none of a language model."""
    if head == "language":
        return []
    chat = not isinstance(data.rows[0].prompt, str)
    rest = ", add_special_tokens=False" if chat else ""
    inputs = f'inputs = tokenizer([text], padding=True{rest}, return_tensors="pt")'
    if head == "steps":
        asked = "tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)"
        about = "the prompt's messages" if chat else "the prompt"
        return [
            f"# {about}, and a solution with its separators",
            f"text = {asked if chat else 'prompt'} + solution",
            inputs,
        ]
    if not chat:
        return ["# prompt and answer with the end token", "text = prompt + answer + tokenizer.eos_token", inputs]
    end = " + tokenizer.eos_token" if _ends_added(data, tokenizer) else ""
    text = f"text = tokenizer.apply_chat_template(prompt + answer, tokenize=False){end}"
    return ["# two lists of messages: the prompt's and the answer's", text, inputs]


def _ends_added(data: Dataset, tokenizer: Any) -> bool:
    """Whether the rows of a conversation end with an end token that the chat template does not write."""
    for record, example in zip(data.rows[:20], data.examples, strict=False):  # some may have been cut
        text = tokenizer.apply_chat_template(
            [*(record.prompt or []), *record.completions[0]], tools=record.tools, tokenize=False, **record.template
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if [*example.prompt, *example.completions[0]] == [*ids, tokenizer.eos_token_id]:
            return True
    return False


def _use(head: HeadKind, name: str, is_adapter: bool, text: list[str]) -> str:
    """Code that loads the result, and of a reward model that scores a text with it."""
    auto = AUTO[head].replace("AutoModel", "AutoPeftModel") if is_adapter else AUTO[head]
    lines = [f"from {'peft' if is_adapter else 'transformers'} import {auto}", "from transformers import AutoTokenizer"]
    lines += ["", f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    labels = f", num_labels={len(LABELS[head])}" if is_adapter and head in LABELS else ""
    lines.append(f'model = {auto}.from_pretrained("{name}"{labels})')
    if labels:
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    return "\n".join([*lines, *text, *_READ[head]])


_READ: dict[HeadKind, list[str]] = {
    "language": [],
    "completion": ["score = model(**inputs).logits[0, 0].item()"],
    "steps": ["right = model(**inputs).logits.softmax(-1)[0, :, 1].detach()  # read it at each step's last token"],
}


def _settled(options: dict[str, Any]) -> str:
    """A line that names the options which followed from the training rows; nothing where there are none."""
    named = ", ".join(f"`{name}={config.shown(value)}`" for name, value in options.items())
    return f"\nFrom the training rows: {named}.\n" if options else ""


def write_card(
    folder: Path, objective: Any, settings: dict[str, Any], summary: dict[str, Any], reading: list[str]
) -> None:
    """README.md of the model directory, with the metadata that the hub reads. reading: as `written_text` has it."""
    run = settings["run"]
    before, after = summary["start"], summary["end"]
    rows = [
        f"| {name} | {before[name]:.4g} | {after[name]:.4g} |"
        for name in sorted(after)
        if name in before and name.startswith("eval/")
    ]
    results = ["| held-out metric | before | after |", "|---|---|---|", *rows] if rows else ["No rows were held out."]
    tags = ["prefopt", objective.facts.name]
    data = summary["data"]
    dropped = "".join(f"\n- dropped {count:,}: {reason}" for reason, count in data["dropped"].items())
    is_adapter = (folder / "adapter_config.json").exists()
    hub_base = "" if Path(run.model).exists() else f"base_model: {run.model}\n"
    text = f"""---
library_name: {"peft" if is_adapter else "transformers"}
{hub_base}tags: [{", ".join(tags)}]
---

# {folder.parent.name}

`{run.model}` trained with {objective.facts.title.lower()} ({objective.facts.source}) by prefopt.

## Data
- source: `{data["source"]}`
- {data["rows"]:,} rows for training, {summary["held_out_rows"]:,} held out ({data["shape"]}){dropped}

## Results
{chr(10).join(results)}

## Use
```python
{_use(objective.facts.head, folder.name, is_adapter, reading)}
```

## Settings
```yaml
{config.to_yaml(settings).strip()}
```
{_settled(summary["settled"])}"""
    (folder / "README.md").write_text(text, encoding="utf-8")
