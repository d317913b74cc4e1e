from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.models.adapters import START, LoraOptions, adapt
from prefopt.models.policy import Policy
from prefopt.models.reference import (
    AdapterOff,
    Cached,
    Copied,
    ReferenceOptions,
    _settings,
    cache_folder,
    keys,
    pick,
    weights_key,
)
from prefopt.records import Example

LORA = LoraOptions(lora_rank=4)
ROWS = tiny.examples([(7, [5, 9]), (1, [3, 1]), (9, [2, 8]), (4, [6, 6])])


class Forwards:
    """Counts the calls of a model."""

    def __init__(self, policy: Policy) -> None:
        self.count = 0
        policy.backbone.register_forward_pre_hook(self.one)

    def one(self, *_: Any) -> None:
        self.count += 1


def filled(policy: Policy, folder: Path, rows: list[Example] = ROWS) -> Cached:
    cached = Cached(policy, folder)
    cached.fill(rows, Budget(25))
    return cached


def live(policy: Policy, rows: list[Example] = ROWS) -> Tensor:
    with torch.no_grad():
        return policy(Batch.of(rows)).logp


def train(model: torch.nn.Module, steps: int = 3) -> None:
    """Move the trainable weights far enough that log-probs change by whole nats."""
    policy = Policy(model)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        policy(Batch.of(ROWS)).logp.mean().neg().backward()
        optimiser.step()
        optimiser.zero_grad()


def an_adapter(folder: Path) -> Path:
    """A trained adapter on disk, as an earlier run leaves it."""
    model = adapt(tiny.build("llama"), LORA)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def close(got: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(got, wanted, atol=1e-5, rtol=1e-5)


def test_cache_copy_and_live_model_agree(tmp_path):
    policy = Policy(tiny.build("llama"))
    wanted = live(policy)
    assert close(filled(policy, tmp_path)(Batch.of(ROWS)), wanted)
    assert torch.equal(Copied.of(policy, Budget(10**9))(Batch.of(ROWS)), wanted)


def test_a_new_adapters_reference_is_the_base_model_three_ways(tmp_path):
    base = live(Policy(tiny.build("llama")))
    policy = Policy(adapt(tiny.build("llama"), LORA))
    cached, copied, off = filled(policy, tmp_path), Copied.of(policy, Budget(10**9)), AdapterOff(policy, Budget(10**9))
    train(policy.model)
    assert (live(policy) - base).abs().max() > 0.1
    for reference in (cached, copied, off):
        assert close(reference(Batch.of(ROWS)), base)


def test_a_continued_adapters_reference_is_its_own_start_three_ways(tmp_path):
    adapter = an_adapter(tmp_path / "adapter")
    policy = Policy(adapt(tiny.build("llama"), LoraOptions(), adapter))
    start = live(policy)
    assert (start - live(Policy(tiny.build("llama")))).abs().max() > 0.1  # and not the base model
    cached, copied, off = filled(policy, tmp_path), Copied.of(policy, Budget(10**9)), AdapterOff(policy, Budget(10**9))
    # the same weights through the same layout: the margin at step 0 is exactly zero
    assert torch.equal(off(Batch.of(ROWS)), start)
    assert torch.equal(copied(Batch.of(ROWS)), start)
    train(policy.model)
    assert (live(policy) - start).abs().max() > 0.1
    assert torch.equal(off(Batch.of(ROWS)), start)
    assert torch.equal(copied(Batch.of(ROWS)), start)
    assert close(cached(Batch.of(ROWS)), start)


@pytest.mark.parametrize("continued", [False, True])
def test_a_cache_filled_after_training_still_holds_the_start(tmp_path, continued):
    """Rows may first be needed in the middle of a run, or after it is resumed."""
    adapter = an_adapter(tmp_path / "adapter") if continued else None
    policy = Policy(adapt(tiny.build("llama"), LORA, adapter))
    start, name = live(policy), weights_key(policy.model)
    train(policy.model)
    assert weights_key(policy.model) == name
    assert close(filled(policy, tmp_path)(Batch.of(ROWS)), start)


def test_a_hit_needs_no_forward_at_all(tmp_path):
    policy = Policy(tiny.build("llama"))
    first = filled(policy, tmp_path)(Batch.of(ROWS))
    again = Policy(tiny.build("llama"))
    forwards = Forwards(again)
    cached = Cached(again, tmp_path)
    assert cached.fill(ROWS, Budget(25)) == 0
    assert torch.equal(cached(Batch.of(ROWS)), first)
    assert forwards.count == 0


def test_only_what_is_missing_is_computed(tmp_path):
    policy = Policy(tiny.build("llama"))
    filled(policy, tmp_path, ROWS[:3])
    forwards, seen = Forwards(policy), []
    cached = Cached(policy, tmp_path)
    assert cached.fill(ROWS, Budget(1000), seen.append) == 1
    assert forwards.count == 1 and seen == [1]
    assert close(cached(Batch.of(ROWS)), live(policy))
    assert Cached(policy, tmp_path).fill(ROWS, Budget(1000)) == 0


def test_the_order_and_grouping_of_rows_do_not_matter(tmp_path):
    policy = Policy(tiny.build("llama"))
    filled(policy, tmp_path)
    cached = Cached(policy, tmp_path)
    turned = Batch.of(ROWS[::-1])
    assert close(cached(turned), live(policy, ROWS[::-1]))
    alone = [replace(ROWS[1], completions=c, scores=[1.0], trained=[[True] * len(c[0])]) for c in ([[5]], [[6, 7]])]
    with pytest.raises(KeyError):
        cached(Batch.of(alone))


def test_a_pass_that_runs_out_of_memory_gives_the_same_rows(tmp_path):
    policy = Policy(tiny.build("llama"))
    wanted = live(policy)
    budget, largest = Budget(1000), []

    def limited(batch: Batch, score: Any = policy.score) -> Any:
        size = sum(batch.tokens_per_prompt())
        if size > 25:
            raise torch.OutOfMemoryError("Tried to allocate")
        largest.append(size)
        return score(batch, "tree")

    policy.score = lambda batch, layout: limited(batch)
    cached = Cached(policy, tmp_path)
    cached.fill(ROWS, budget)
    assert max(largest) <= 25 and budget.tokens < 1000
    assert close(cached(Batch.of(ROWS)), wanted)


def rope_changed(model: Any) -> None:
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 777.0}


def weight_changed(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-6


def buffer_changed(model: Any) -> None:
    model.register_buffer("extra", torch.ones(1))


@pytest.mark.parametrize("change", [rope_changed, weight_changed, buffer_changed, torch.nn.Module.double])
def test_another_model_is_another_folder(change):
    model = tiny.build("llama")
    before = weights_key(model)
    assert weights_key(tiny.build("llama")) == before
    change(model)
    assert weights_key(model) != before


def test_a_cast_to_bfloat16_that_loses_nothing_is_still_another_folder():
    exact = tiny.build("llama", torch.bfloat16).float()
    assert weights_key(exact) != weights_key(copy.deepcopy(exact).bfloat16())


def test_the_same_bits_in_another_format_are_another_folder():
    model = tiny.build("llama", torch.bfloat16)
    before = weights_key(model)
    for weight in model.parameters():
        weight.data = weight.data.view(torch.float16)
    assert weights_key(model) != before


def test_how_the_model_is_run_is_not_part_of_its_name():
    policy = Policy(tiny.build("llama"))
    before = weights_key(policy.model)
    live(policy)  # leaves the packed tree's attention switched on
    assert weights_key(policy.model) == before
    policy.score(Batch.of(ROWS), "padded")
    policy.model.config._attn_implementation = "eager"
    policy.model.config.use_cache = False
    policy.model.config._name_or_path = "elsewhere"
    assert weights_key(policy.model) == before


def test_a_new_adapters_random_start_does_not_change_the_name():
    names = set()
    for seed in (1, 2):
        base = tiny.build("llama")
        torch.manual_seed(seed)
        names.add(weights_key(adapt(base, LORA)))
    assert len(names) == 1


def test_a_continued_adapters_weights_are_part_of_the_name(tmp_path):
    adapter = an_adapter(tmp_path / "a")
    one = weights_key(adapt(tiny.build("llama"), LoraOptions(), adapter))
    assert one == weights_key(adapt(tiny.build("llama"), LoraOptions(), adapter))
    assert one != weights_key(adapt(tiny.build("llama"), LORA))
    model = adapt(tiny.build("llama"), LORA)
    with torch.no_grad():
        next(w for name, w in model.named_parameters() if "lora_B" in name).fill_(0.3)
    model.save_pretrained(tmp_path / "b")
    assert one != weights_key(adapt(tiny.build("llama"), LoraOptions(), tmp_path / "b"))


def test_a_continued_adapters_scale_is_part_of_the_name(tmp_path):
    adapter = an_adapter(tmp_path)
    before = weights_key(adapt(tiny.build("llama"), LoraOptions(), adapter))
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    settings["lora_alpha"] *= 2
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert weights_key(adapt(tiny.build("llama"), LoraOptions(), adapter)) != before


def test_the_order_of_a_set_is_not_part_of_the_name():
    """Names of layers are a set, and a set's order differs between Python processes."""
    names = [f"layer {n}" for n in range(100)]
    one, other = set(names), {*names[::-1]}
    assert list(one) != list(other)
    assert _settings({"target_modules": one, "rank": 4}) == _settings({"rank": 4, "target_modules": other})
    assert _settings({"target_modules": one}) != _settings({"target_modules": one - {"layer 7"}})


def test_other_tokens_are_other_rows():
    """A chat template or a truncation shows in the token ids, and a moved boundary in the prompt's length."""

    def key(prompt: list[int], completion: list[int]) -> bytes:
        return keys(Batch.of([Example(prompt, [completion], [1.0], [[True] * len(completion)])]))[0]

    first = key([1, 2, 3], [4, 5])
    others = [
        key([9, 1, 2, 3], [4, 5]),  # a template that puts a token in front
        key([2, 3], [4, 5]),  # a prompt truncated from the left
        key([1, 2, 3], [4]),  # a completion truncated
        key([1, 2, 3], [4, 6]),
        key([1, 2], [3, 4, 5]),  # the same text, cut elsewhere
    ]
    assert len({first, *others}) == 6
    assert key([1, 2, 3], [4, 5]) == first


def test_scores_and_trained_flags_are_not_part_of_a_rows_name():
    row = Example([1, 2], [[3, 4]], [1.0], [[True, True]])
    other = replace(row, scores=[0.0], trained=[[False, True]], where="elsewhere.jsonl:7")
    assert keys(Batch.of([row])) == keys(Batch.of([other]))


def only_file(folder: Path) -> Path:
    (path,) = folder.rglob("*.npz")
    return path


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_skipped_with_a_warning_and_computed_again(tmp_path, share, caplog):
    policy = Policy(tiny.build("llama"))
    wanted = filled(policy, tmp_path)(Batch.of(ROWS))
    path = only_file(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with caplog.at_level(logging.WARNING, "prefopt"):
        cached = Cached(policy, tmp_path)
    assert f"{path}: not a readable reference cache" in caplog.text and "computed again" in caplog.text
    assert cached.fill(ROWS, Budget(25)) == len(ROWS)
    assert torch.equal(cached(Batch.of(ROWS)), wanted)
    assert Cached(policy, tmp_path).fill(ROWS, Budget(25)) == 0  # the broken file was replaced


def test_no_flipped_byte_ever_gives_a_wrong_number(tmp_path, caplog):
    policy = Policy(tiny.build("gpt2"))
    rows = ROWS[1:2]
    wanted = filled(policy, tmp_path, rows)(Batch.of(rows))
    path = only_file(tmp_path)
    whole = path.read_bytes()
    cached, skipped = Cached(policy, tmp_path), 0
    caplog.set_level(logging.CRITICAL, "prefopt")  # a thousand warnings say nothing more than one
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        cached.known = {}
        cached._read(path)
        if all(key in cached.known for key in keys(Batch.of(rows))):
            assert torch.equal(cached(Batch.of(rows)), wanted), place
        else:
            skipped += 1
    assert skipped > len(whole) / 4  # numbers, keys, lengths and headers; dates and padding may change


@pytest.mark.parametrize("content", [b"", b"not a cache", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_a_file_of_another_kind_is_skipped(tmp_path, content, caplog):
    policy = Policy(tiny.build("llama"))
    folder = tmp_path / weights_key(policy.model)
    folder.mkdir()
    (folder / "x.npz").write_bytes(content)
    assert Cached(policy, tmp_path).known == {}
    assert "not a readable reference cache" in caplog.text


def test_a_plain_array_in_a_caches_place_is_skipped(tmp_path, caplog):
    policy = Policy(tiny.build("llama"))
    folder = tmp_path / weights_key(policy.model)
    folder.mkdir()
    with (folder / "x.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert Cached(policy, tmp_path).known == {}
    assert "not a readable reference cache" in caplog.text


def test_a_folder_that_cannot_be_written_warns_and_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    policy = Policy(tiny.build("llama"))
    cached = filled(policy, tmp_path / "file" / "cache")
    assert "cannot be written" in caplog.text and "training goes on without it" in caplog.text
    assert close(cached(Batch.of(ROWS)), live(policy))


def test_no_temporary_file_is_left_behind(tmp_path):
    filled(Policy(tiny.build("llama")), tmp_path)
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".npz"]


def test_two_models_share_a_folder_without_meeting(tmp_path):
    one, other = Policy(tiny.build("llama")), Policy(tiny.build("llama"))
    with torch.no_grad():
        other.model.lm_head.weight.mul_(1.5)
    filled(one, tmp_path)
    assert Cached(other, tmp_path).fill(ROWS, Budget(25)) == len(ROWS)
    assert close(filled(other, tmp_path)(Batch.of(ROWS)), live(other))
    assert close(filled(one, tmp_path)(Batch.of(ROWS)), live(one))


def test_a_copy_is_frozen_and_does_not_follow_the_policy():
    policy = Policy(tiny.build("llama"))
    copied, start = Copied.of(policy, Budget(10**9)), live(policy)
    assert not any(p.requires_grad for p in copied.policy.model.parameters())
    train(policy.model)
    assert torch.equal(copied(Batch.of(ROWS)), start)


@pytest.mark.parametrize("mixup", [0.6, 1.0])
def test_a_reference_that_follows_is_the_mixture_of_every_weight(mixup):
    """By hand: reference <- mixup * policy + (1 - mixup) * reference, of the reference as it was left."""
    policy = Policy(tiny.build("llama"))
    copied = Copied.of(policy, Budget(10**9))
    wanted = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    for _ in range(2):  # from where the first move left it
        train(policy.model)
        policys = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
        copied.follow(policy, mixup)
        wanted = {name: mixup * policys[name] + (1 - mixup) * p for name, p in wanted.items()}
        for name, p in copied.policy.model.named_parameters():
            torch.testing.assert_close(p, wanted[name])
        for name, p in policy.model.named_parameters():  # which is left alone
            assert torch.equal(p, policys[name])
    assert not any(p.requires_grad for p in copied.policy.model.parameters())
    assert close(copied(Batch.of(ROWS)), live(policy)) is (mixup == 1.0)


def test_a_reference_that_moves_or_scores_new_texts_is_a_copy_unless_an_adapter_can_be_switched_off(tmp_path):
    policy, adapted = Policy(tiny.build("llama")), Policy(adapt(tiny.build("llama"), LORA))
    here = ReferenceOptions(cache_dir=str(tmp_path))
    moving, other = replace(here, reference_sync_steps=4), Policy(tiny.build("llama"))
    assert isinstance(pick(moving, policy, Budget(1000))[0], Copied)
    assert isinstance(pick(here, policy, Budget(1000), live=True)[0], Copied)
    assert isinstance(pick(here, adapted, Budget(1000), live=True)[0], AdapterOff)
    reference, _ = pick(here, adapted, Budget(1000), other, live=True)
    assert isinstance(reference, Copied) and reference.policy is other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference_sync_steps": 0}, "reference_sync_steps must be at least 1, got 0"),
        ({"reference_mixup": 0.0}, "reference_mixup must be above 0 and at most 1, got 0"),
        ({"reference_mixup": 1.1}, "reference_mixup must be above 0 and at most 1, got 1.1"),
    ],
)
def test_a_reference_that_would_never_or_overly_move_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReferenceOptions(**options)


def test_reference_log_probs_carry_no_gradient(tmp_path):
    policy = Policy(adapt(tiny.build("llama"), LORA))
    for reference in (filled(policy, tmp_path), Copied.of(policy, Budget(10**9)), AdapterOff(policy, Budget(10**9))):
        assert not reference(Batch.of(ROWS)).requires_grad


def test_the_choice_is_said_and_contradictions_are_refused(tmp_path):
    policy, adapted = Policy(tiny.build("llama")), Policy(adapt(tiny.build("llama"), LORA))
    here = ReferenceOptions(cache_dir=str(tmp_path))
    reference, words = pick(here, policy, Budget(1000))
    assert isinstance(reference, Cached) and str(tmp_path) in words and "cached on disk" in words
    reference, words = pick(replace(here, reference="copy"), policy, Budget(1000))
    assert isinstance(reference, Copied) and "copy" in words
    reference, words = pick(replace(here, reference="adapter"), adapted, Budget(1000))
    assert isinstance(reference, AdapterOff) and "adapter" in words
    with pytest.raises(ValueError, match="lora_rank or an adapter directory; use reference: cache"):
        pick(replace(here, reference="adapter"), policy, Budget(1000))
    with pytest.raises(ValueError, match="contradicts reference_model"):
        pick(replace(here, reference="adapter"), adapted, Budget(1000), other=policy)


def test_another_model_as_reference_is_the_one_that_scores(tmp_path):
    policy, other = Policy(tiny.build("llama")), Policy(tiny.build("gpt2"))
    for name in ("copy", "cache"):
        reference, _ = pick(ReferenceOptions(reference=name, cache_dir=str(tmp_path)), policy, Budget(1000), other)
        if isinstance(reference, Cached):
            reference.fill(ROWS, Budget(25))
        assert close(reference(Batch.of(ROWS)), live(other))


def test_the_cache_folder_comes_from_the_option_then_the_environment_then_home(monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", "/somewhere")
    assert cache_folder(ReferenceOptions(cache_dir="/given")) == Path("/given/reference")
    assert cache_folder(ReferenceOptions()) == Path("/somewhere/reference")
    monkeypatch.delenv("PREFOPT_CACHE")
    assert cache_folder(ReferenceOptions()) == Path.home() / ".cache/prefopt/reference"


def test_the_frozen_start_is_not_trainable_before_or_after_it_was_used(tmp_path):
    policy = Policy(adapt(tiny.build("llama"), LoraOptions(), an_adapter(tmp_path)))
    trainable = {name: p.requires_grad for name, p in policy.model.named_parameters()}
    assert not any(flag for name, flag in trainable.items() if START in name)
    AdapterOff(policy, Budget(10**9))(Batch.of(ROWS))
    assert {name: p.requires_grad for name, p in policy.model.named_parameters()} == trainable
