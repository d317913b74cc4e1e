"""The estimate of memory beside what tensors really take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from prefopt.advice import memory as estimate
from prefopt.advice import passes
from prefopt.advice.memory import Sampling, Setup, activations, head, lasting, layer, memory
from prefopt.advice.passes import Row, pass_of
from prefopt.advice.sizes import Net, of_config
from prefopt.batch import Batch
from prefopt.batch import parts as cut_batch
from prefopt.loop import LoopOptions, budget_for
from prefopt.models import attention, decode, packed, policy, sampler
from prefopt.models import head as head_module
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.layouts import TreeRow
from prefopt.models.load import save_memory
from prefopt.models.policy import Policy
from prefopt.optimizer import Updater
from prefopt.records import Example

VOCABULARY = 400
ROWS = [Row(100, (60, 80)), Row(50, (120, 40)), Row(30, (200, 64))]


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def gpt_neox() -> Any:
    settings: Any = GPTNeoXConfig
    config = settings(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
    )
    return GPTNeoXForCausalLM(config)


def batch(rows: list[Row]) -> Batch:
    examples = [
        Example(
            list(range(row.prompt)),
            [list(range(size)) for size in row.completions],
            [1.0, 0.0],
            [[True] * size for size in row.completions],
        )
        for row in rows
    ]
    return Batch.of(examples)


def kept_for_backward(model: Any) -> int:
    """Bytes that a forward pass over ROWS keeps, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, Any] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages.setdefault(x.untyped_storage().data_ptr(), x)  # held: an address is not given away twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = Policy(model)(batch(ROWS))
    size = sum(x.untyped_storage().nbytes() for at, x in storages.items() if at not in weights)
    assert out.logp.requires_grad
    return size


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [llama, gpt2, gpt_neox])
def test_activations_are_what_autograd_keeps(make: Any, dtype: str, rank: int, checkpointing: bool) -> None:
    model = make().to(getattr(torch, dtype)).eval()
    if checkpointing:
        save_memory(model)
    net = of_config(model.config.to_dict())
    adapted = adapt(model, LoraOptions(lora_rank=rank))
    setup, largest = Setup(dtype=dtype, lora_rank=rank, checkpointing=checkpointing), pass_of(ROWS, net.head_width)
    expected = activations(net, largest, setup)
    if checkpointing:
        expected -= layer(net, largest, setup)  # computed again in backward, not kept
    # what the head keeps: its hidden states, and one chunk of probabilities
    expected += largest.completion * (net.width + VOCABULARY) * setup.size
    assert kept_for_backward(adapted) == pytest.approx(expected, rel=0.08)


@pytest.mark.parametrize(("dtype", "rank"), [("float32", 0), ("bfloat16", 0), ("bfloat16", 8), ("float64", 0)])
def test_what_lasts_is_what_weights_and_optimiser_hold(dtype: str, rank: int) -> None:
    model = llama().to(getattr(torch, dtype))
    net = of_config(model.config.to_dict())
    weights = sum(p.nbytes for p in model.parameters())
    model = adapt(model, LoraOptions(lora_rank=rank))
    updater = Updater(model.parameters())
    for pair in updater.pairs:
        pair.master.grad = torch.zeros_like(pair.master)
    gradients = sum(pair.master.grad.nbytes for pair in updater.pairs)
    updater.step(0.0, None)
    moments = sum(x.nbytes for state in updater.adam.state.values() for x in state.values() if x.ndim)
    masters = sum(pair.master.nbytes for pair in updater.pairs if pair.master is not pair.weight)
    setup = Setup(dtype=dtype, lora_rank=rank)
    parts = lasting(net, setup)
    assert (parts["weights"], parts["moments"], parts.get("masters", 0)) == (weights, moments, masters)
    assert estimate.gradient_bytes(net, setup) == gradients
    if rank:
        assert parts["adapter"] == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_the_attention_of_a_pass_is_counted_block_by_block() -> None:
    rows = [Row(300, (290, 31)), Row(5, (1, 1))]
    row = TreeRow.of(batch(rows), torch.device("cpu"))
    blocks = [block for segment in row.segments for block in attention._blocks_of(segment)]
    found = pass_of(rows, head_width=64)
    assert found.seen == sum(block.size * block.seen for block in blocks)
    assert found.kept == sum(block.size * block.seen for block in blocks if block.seen <= attention.KEEP * 64)
    assert (found.tokens, found.completion) == (len(row.ids), len(row.at))
    assert 0 < found.kept < found.seen


@pytest.mark.parametrize("budget", [1, 300, 700, 10_000])
def test_passes_are_cut_as_the_loop_cuts_them(budget: int) -> None:
    whole = batch(ROWS)
    theirs = [part.num_prompts for part, _ in cut_batch(whole, (), budget)]
    assert [len(part) for part in passes.cut(ROWS, budget)] == theirs


def test_the_numbers_repeated_here_are_those_of_the_code_that_runs() -> None:
    assert (passes.BLOCK, passes.LANES, passes.KEEP) == (attention.BLOCK, attention.LANES, attention.KEEP)
    assert estimate.CHUNK == head_module.CHUNK_BYTES
    assert estimate.PACKED == packed.MOST
    assert estimate.HELD == sampler.TOKENS
    assert estimate.COLUMNS == decode.COLUMNS
    assert estimate.SMALL == policy.SMALL
    for device, tokens in passes.TOKENS.items():
        assert budget_for(LoopOptions(), torch.device(device)).tokens == tokens


def test_caches_grow_as_the_sampler_grows_them() -> None:
    for length in (1, 64, 65, 300):
        store, column = decode.Store(), 0
        while column < length:
            if column >= store.columns:
                store.reserve(1, max(decode.COLUMNS, column + max(decode.COLUMNS, column // 2)))
            column += 1
        assert estimate.grown(length) == store.columns


NET = Net(
    width=10, inner=20, layers=2, heads=2, key_heads=1, head_width=5, vocabulary=100, parameters=3000, linear=1800,
    rank_width=300, tied=True, gated=True, products=4, root_norm=True,
)  # fmt: skip
LARGEST = pass_of([Row(10, (5, 5))], 5)


def test_by_hand() -> None:
    parts = memory(NET, LARGEST, Setup(several=True)).moment("forward").parts
    assert parts["weights"] == 3000 * 4
    assert parts["moments"] == 3000 * 8
    assert parts["gradients"] == 3000 * 4
    # hidden states [10, 10] twice, one chunk of logits [10, 100], the gradient of the head [100, 10], float32
    assert parts["head"] == 4 * (2 * 10 * 10 + 10 * 100 + 100 * 10)
    # a layer, a token: 2 norms of 3 x 10; queries and result 2 x 10, keys and values 2 x 5; 4 products of 20
    per_token = 4 * (2 * 30 + 20 + 10 + 80)
    # attention of 15 rows (prompt and first answer) and of 5 rows (second), on 32 keys each, for 2 heads
    scores = 4 * 2 * (15 + 5) * 32
    assert layer(NET, LARGEST, Setup()) == 20 * per_token + scores
    # and the last norm's input and quotient, [20, 10] each
    assert parts["activations"] == 2 * (20 * per_token + scores) + 2 * 20 * 10 * 4


def test_each_option_moves_memory_the_way_it_should() -> None:
    def peak(**changes: Any) -> int:
        return memory(NET, LARGEST, replace(Setup(), **changes)).peak.total

    usual = peak()
    assert peak(reference="copy") > usual > peak(checkpointing=True)
    assert peak(lora_rank=1) < usual
    assert peak(critic="own") > peak(critic="shared") == usual
    assert peak(several=False) < usual
    assert peak(entropy=True) > usual
    assert peak(sampling=Sampling(8, 50, 8, 1000)) > usual
    assert peak(gpu=True) < usual - estimate.BASE


def test_a_large_vocabulary_is_cut_into_chunks() -> None:
    wide = replace(NET, vocabulary=200_000)
    rows = estimate.CHUNK // (200_000 * 4)
    many = replace(LARGEST, completion=10 * rows)
    logits = head(wide, many, Setup()) - 2 * 10 * rows * 10 * 4 - 200_000 * 10 * 4
    assert logits == 2 * rows * 200_000 * 4
