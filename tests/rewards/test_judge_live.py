"""The judge, and a server as a source of completions, against `transformers serve` with a model built here.

Skipped where the server's own packages (fastapi, openai, uvicorn) are missing: `pip install "transformers[serving]"`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefopt.records import InputError, Sample, Score
from prefopt.rewards.judge import Judge, JudgeOptions, preference

MISSING = [name for name in ("fastapi", "openai", "uvicorn") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}")

VERDICT = ['{"reason": "it is clear', ', and short", ', '"score": 8}']
STARTS = 120.0  # seconds within which the server must answer


def recite(folder: Path, said: list[str]) -> Path:
    """A chat model that answers everything with these words: each token's embedding points at the next token.

    Attention and feed-forward layers add nothing (their last matrices are zero), so that the head sees the embedding of
    the last token alone.
    """
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|answer|>"]})
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in said])
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}<|answer|>"
    chain = tokenizer.convert_tokens_to_ids(["<|answer|>", *said, "<|end|>"])
    size = len(tokenizer)
    sizes = {"hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=size, max_position_embeddings=8192, eos_token_id=chain[-1], **sizes)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, 512))
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any) -> Iterator[tuple[str, str]]:
    """The address of a running server with such a model, and the model's name."""
    home = tmp_path_factory.mktemp("serving")
    model = recite(home / "judge", VERDICT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "hub").mkdir()
    log = (home / "log.txt").open("w")
    words = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(home / "hub"), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", *words], stdout=log, stderr=log, env=environment
    )
    try:
        wait(server, port, Path(log.name))
        yield f"http://127.0.0.1:{port}/v1", str(model)
    finally:
        server.kill()
        server.wait()
        log.close()


def wait(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server listens; an error with its log where it ends, or never does."""
    until = time.monotonic() + STARTS
    while time.monotonic() < until and server.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(0.2)
    raise AssertionError(f"transformers serve does not listen ({server.poll()}): {log.read_text()[-2000:]}")


def test_a_real_server_judges_and_what_it_cannot_say_is_no_score(served):
    url, model = served
    options = {"judge_url": url, "judge_model": model, "judge_timeout": 60.0}
    judge = Judge(JudgeOptions(**options))
    assert judge.ping() == model
    samples = [Sample("Name a colour.", "red", group=0), Sample("Name a colour.", "Red is a colour.", group=0)]
    assert judge(samples) == [Score(0.8)] * 2
    assert judge.asker.served.startswith(model) and judge.counts["questions"] == 2
    judge.close()

    pairs = Judge(JudgeOptions(judge_mode="pairwise", **options))
    found = pairs(samples)  # the model recites a rubric's verdict, which compares nothing
    assert [score.value for score in found] == [None, None] and "better" in found[0].why
    assert pairs.counts["asked again"] == 2
    [undecided] = preference(pairs, [tuple(samples)])
    assert undecided.better is None and undecided.why
    pairs.close()

    short = Judge(JudgeOptions(judge_max_tokens=2, **options))
    [cut] = short(samples[:1])
    assert cut.value is None and "judge_max_tokens" in cut.why
    short.close()

    wrong = Judge(JudgeOptions(**{**options, "judge_model": model + "-2"}))
    with pytest.raises(InputError, match="does not speak"):
        wrong.ping()
    wrong.close()


def test_a_real_server_is_a_source_of_completions(served):
    from prefopt.models.sampling import Sampling
    from prefopt.models.server import Server, ServerOptions

    url, model = served
    sampler = Server(ServerOptions(server_url=url, server_model=model))
    turns = [{"role": "user", "content": "Name a colour."}]
    [two, [cut, _]] = sampler.sample([turns, turns], 2, Sampling(max_tokens=16, temperature=0.0), [0, 1])
    assert [json.loads(written.text)["score"] for written in two] == [8, 8] and all(own.finished for own in two)
    assert cut.text == two[0].text and cut.model.startswith(model)
    [[short]] = sampler.sample(["<|answer|>"], 1, Sampling(max_tokens=1, temperature=0.0), [0])
    assert short.text == VERDICT[0] and not short.finished
    sampler.close()
