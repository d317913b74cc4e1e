"""What fuzzing starts from: small inputs that are read, of every kind, and pieces that others are made of."""

from __future__ import annotations

import gzip
import io
import json
from typing import Any

import pyarrow
import pyarrow.parquet
from targets import SUFFIXES

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {
        "chosen": TURNS,
        "rejected": [*TURNS[:1], {"role": "assistant", "content": "c"}],
        "score_chosen": 1,
        "score_rejected": 0,
    },
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "a", "completion": "b", "label": True},
    {"messages": TURNS, "label": False},
    {"messages": [*TURNS, {"role": "tool", "content": "{}"}], "tools": [{"name": "f"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "input": "x", "output": "b"},
    {
        "instruction": "a",
        "completions": [{"response": "b", "overall_score": 3.5}, {"response": "c", "overall_score": 1}],
    },
    {"prompt": "a", "completions": ["b", "c"], "scores": [1, 0.5]},
    {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]},
    {"question": "a", "answer": "b #### 4"},
    {"question": "a", "solutions": [{"solution": "b", "is_correct": True}, {"solution": "c", "is_correct": False}]},
    {"message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
    {"message_id": "2", "parent_id": "1", "text": "b", "role": "assistant", "rank": 0},
    {
        "message_tree_id": "1",
        "prompt": {
            "text": "a",
            "role": "prompter",
            "replies": [{"text": "b", "role": "assistant", "rank": 0, "replies": []}],
        },
    },
    {"text": "a"},
    {"prompt": "a", "answer": "4"},
]
RECIPES = [
    "objective: dpo\nbeta: 0.1\nlearning_rate: 1e-6\n",
    "beta=0.05\nlora_targets=[q_proj, v_proj]\nmap.chosen=good\nmap: {rejected: bad}\n",
    "eval_fraction: 0\nschedule: linear\nskip_bad: yes\nmax_steps: 1_000\n",
    "<<: {beta: 1}\n? a\n: b\n&x y: *x\n!!float 1: !!timestamp x\n",
    'chat_template: |\n  {{ x }}\nout: "a\\u0085b"\ntrack: [wandb]\n',
]
TREES: list[Any] = [
    ["d", ["a", 1], [["t", 1, ["i", "0x10"]], ["l", None, True]]],
    ["s", ["f", "0x1.8p+1"], ["f", "nan"], ["c", "0x0p+0", "inf"], ["b", "00ff"]],
    ["z", ["z"], ["t", ["f", "-0x0.0p+0"], 0]],
    ["l", *[["l"]] * 3],
]


def _parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[0]]), file)
    return file.getvalue()


def _files() -> list[bytes]:
    lines = "\n".join(json.dumps(row) for row in ROWS).encode()
    table = b'prompt,chosen,rejected\r\na,"b\nb","c""c"\r\n'
    contents = [
        lines,
        json.dumps(ROWS, indent=1).encode(),
        table,
        table.replace(b",", b"\t"),
        gzip.compress(lines),
        _parquet(),
    ]
    return [bytes([number]) + content for number, content in enumerate(contents[: len(SUFFIXES)])]


SEEDS: dict[str, list[bytes]] = {
    "files": _files(),
    "rows": [
        bytes([kind, 255 * (number % 2)]) + json.dumps(row).encode() + b"\n" + json.dumps(row).encode()
        for kind in range(7)
        for number, row in enumerate(ROWS)
    ],
    "recipe": [bytes([number]) + text.encode() for number, text in enumerate(RECIPES)],
    "messages": [json.dumps(tree).encode() for tree in TREES],
}

_columns = sorted({name for row in ROWS for name in row})
_values = [
    "a",
    "",
    "b #### 4",
    "\n\nHuman: a\n\nAssistant: b",
    None,
    True,
    0,
    1,
    -1,
    0.5,
    1e400,
    "\ud800",
    [],
    {},
    TURNS,
    ["b", "c"],
    [1, 0],
]
# what stands for something, to be put together in any order
WORDS: dict[str, list[bytes]] = {
    "files": [
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b'"',
        b"\n",
        b"\r\n",
        b"\t",
        b"\0",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b'"a":',
        b"NaN",
        b"1e999",
        b"\\ud800",
        b"[" * 2000,
    ],
    "rows": [json.dumps(name).encode() + b":" for name in _columns]
    + [json.dumps(value).encode() for value in _values]
    + [b"{", b"}", b",", b"\n", b'"role":', b'"content":', b"[", b"]"],
    "recipe": [
        b"beta",
        b"map",
        b"map.a",
        b"reward",
        b"track",
        b"eval_fraction",
        b"model",
        b": ",
        b"=",
        b"\n",
        b"[",
        b"]",
        b"{",
        b"}",
        b"&a ",
        b"*a",
        b"!!python/tuple ",
        b"!!binary ",
        b"!!set ",
        b"<<",
        b"null",
        b"true",
        b"1e-6",
        b".inf",
        b".nan",
        b"1_0",
        b"'",
        b'"',
        b"|\n ",
        b"---\n",
        b"# ",
        b"\xc2\x85",
        b"http://u:p@h/",
    ],
    "messages": [
        b"[",
        b"]",
        b",",
        b'"',
        b"null",
        b"true",
        b"1",
        b"-0",
        b"1e5",
        b"9" * 30,
        b'"d"',
        b'"l"',
        b'"t"',
        b'"s"',
        b'"z"',
        b'"i"',
        b'"f"',
        b'"c"',
        b'"b"',
        b'"0x1p+9999"',
        b'"nan"',
        b'"inf"',
        b'"0x10"',
        b'"ff"',
        b"{",
        b"}",
        b"\xff",
        b"[" * 2000,
    ],
}
