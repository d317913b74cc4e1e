"""The model card: what was trained, on what, how, and with what result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefopt import config


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
    loading = (
        f'model = AutoPeftModelForCausalLM.from_pretrained("{folder.name}")'
        if is_adapter
        else f'model = AutoModelForCausalLM.from_pretrained("{folder.name}")'
    )
    package = (
        "from peft import AutoPeftModelForCausalLM" if is_adapter else "from transformers import AutoModelForCausalLM"
    )
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
{package}
from transformers import AutoTokenizer

{loading}
tokenizer = AutoTokenizer.from_pretrained("{folder.name}")
```

## Settings
```yaml
{config.to_yaml(settings).strip()}
```
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
