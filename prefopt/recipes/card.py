"""The model card: what was trained, on what, how, and with what result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt import config
from prefopt.models.heads import AUTO, LABELS, HeadKind


def _use(head: HeadKind, name: str, is_adapter: bool) -> str:
    """Code that loads the result, and of a reward model that scores a text with it."""
    auto = AUTO[head].replace("AutoModel", "AutoPeftModel") if is_adapter else AUTO[head]
    lines = [f"from {'peft' if is_adapter else 'transformers'} import {auto}", "from transformers import AutoTokenizer"]
    lines += ["", f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    labels = f", num_labels={len(LABELS[head])}" if is_adapter and head in LABELS else ""
    lines.append(f'model = {auto}.from_pretrained("{name}"{labels})')
    if labels:
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    if head == "completion":
        lines += ["# prompt and answer as they were trained on, the end token included", *_SCORE]
    if head == "steps":
        lines += ["# prompt and solution; read the probability at each step's last token", *_STEPS]
    return "\n".join(lines)


_SCORE = [
    'inputs = tokenizer([prompt + answer + tokenizer.eos_token], padding=True, return_tensors="pt")',
    "scores = model(**inputs).logits[:, 0]",
]
_STEPS = [
    'inputs = tokenizer([prompt + solution], padding=True, return_tensors="pt")',
    "right = model(**inputs).logits.softmax(-1)[:, :, 1]",
]


def write_card(folder: Path, objective: Any, settings: dict[str, Any], summary: dict[str, Any]) -> None:
    """README.md of the model directory, with the metadata that the hub reads."""
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
{_use(objective.facts.head, folder.name, is_adapter)}
```

## Settings
```yaml
{config.to_yaml(settings).strip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
