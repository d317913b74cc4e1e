"""vLLM as a sampler, against engines of our own: what they draw is checked, and their weights are the policy's or none.

No vLLM is needed: a module in its place has an engine whose layers are fused and padded as vLLM's are, and a local
server answers as vLLM's does.
"""

from __future__ import annotations

import copy
import math
import sys
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_server import Answer, closed_port, serving
from laws import save_model
from peft import LoraConfig, get_peft_model
from tiny import build
from torch import nn
from transformers import AutoModelForCausalLM

from prefopt.batch import Batch
from prefopt.models import vllm as engines
from prefopt.models.adapters import LoraOptions, adapt
from prefopt.models.policy import Policy
from prefopt.models.sampling import Sampling
from prefopt.models.vllm import EngineError, Vllm, VllmOptions, check_version, mixed
from prefopt.models.vllm_worker import Weights
from prefopt.models.weights import fingerprint, named_weights
from prefopt.records import Example, InputError

PROMPTS = [[5, 6, 7], [8], [9, 10]]
SEEDS = [1, 2, 3]
SAMPLING = Sampling(max_tokens=6)


class FusedLayers(nn.Module):
    """The weights of a Llama as vLLM keeps them: query, key and value in one matrix, the vocabulary padded to 128."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.tensors = nn.ParameterDict()
        self.load_weights(named_weights(model, torch.float32))

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in weights:
            where, part = name.replace(".", "/"), "whole"
            for fused, own in {
                "qkv_proj": ("q_proj", "k_proj", "v_proj"),
                "gate_up_proj": ("gate_proj", "up_proj"),
            }.items():
                for one in own:
                    if f"/{one}/" in where:
                        where, part = where.replace(one, fused), one
            parts.setdefault(where, {})[part] = tensor
        for where, own in parts.items():
            whole = torch.cat([own[part] for part in sorted(own)])
            if "embed_tokens" in where or "lm_head" in where:
                whole = torch.cat([whole, whole.new_zeros(128 - len(whole), whole.shape[1])])
            self.tensors[where] = nn.Parameter(whole.clone(), requires_grad=False)


class FakeLLM:
    """An engine that draws from the weights it was last given, whole or not, as `fault` says."""

    def __init__(self, model: str, worker_extension_cls: str, **settings: Any) -> None:
        assert worker_extension_cls == "prefopt.models.vllm_worker.Weights"
        self.settings, self.fault, self.calls, self.asleep, self.cached = settings, "", 0, False, False
        self.own = AutoModelForCausalLM.from_pretrained(model).eval()
        self.worker = Weights()
        self.worker.model_runner = types.SimpleNamespace(model=FusedLayers(self.own))
        self.log: list[str] = []

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "prefopt_take":
            weights, version = args
            given = [weights] if isinstance(weights, str) else list(weights)
            if self.fault == "dropped":
                self.worker._prefopt_has = {
                    "version": version,
                    "fingerprint": self.worker.prefopt_state()["fingerprint"],
                }
                return [self.worker.prefopt_state()]
            if self.fault == "half":
                self.worker.prefopt_take(given[: len(given) // 2], version)
                return [self.worker.prefopt_state()]
            if self.fault == "dies":
                self.worker.prefopt_take(self.dying(given), version)
            self.own.load_state_dict(dict(given), strict=False)
            self.cached = True
            args = (given, version)
        return [getattr(self.worker, method)(*args)]

    @staticmethod
    def dying(given: list[Any]) -> Any:
        yield given[0]
        raise RuntimeError("CUDA error: an illegal memory access")

    def reset_prefix_cache(self) -> bool:
        self.cached = False
        return self.fault != "keeps its cache"

    def sleep(self, level: int) -> None:
        assert level == 1, "level 2 loses the weights"
        self.asleep = True

    def wake_up(self) -> None:
        self.asleep = False

    def generate(self, prompts: list[Any], sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        assert not self.asleep and not self.cached
        self.calls += 1
        if self.fault == "dies" or (self.fault == "dies once" and self.calls == 1):
            raise RuntimeError("EngineCore died")
        found = [
            self.one(prompt["prompt_token_ids"], how) for prompt, how in zip(prompts, sampling_params, strict=True)
        ]
        if self.fault == "loses one" and self.calls == 1:
            found = found[1:]
        return found

    def one(self, prompt: list[int], how: Any) -> Any:
        outputs = [draw(self.own, prompt, how, how.seed + number) for number in range(how.n)]
        seen = list(prompt)
        if self.fault == "other prompt":
            seen = [*seen[:-1], seen[-1] + 1]
        if self.fault == "one short":
            outputs = outputs[1:]
        if self.fault == "empty":
            outputs[0].token_ids, outputs[0].logprobs = [], []
        if self.fault == "not a number":
            outputs[0].logprobs[0][outputs[0].token_ids[0]].logprob = math.nan
        if self.fault == "other tokens":
            outputs[0].token_ids = [token + 1 for token in outputs[0].token_ids]
        if self.fault == "aborted":
            outputs[0].finish_reason = "abort"
        return types.SimpleNamespace(prompt_token_ids=seen, outputs=outputs)


def draw(model: Any, prompt: list[int], how: Any, seed: int) -> Any:
    """A completion drawn as vLLM's settings say, with the log-probs of the distribution drawn from."""
    random, tokens, logprobs, ended = torch.Generator().manual_seed(seed), [], [], False
    while len(tokens) < how.max_tokens and not ended:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, -1] / (how.temperature or 1.0)
        if how.top_k:
            logits = logits.masked_fill(logits < logits.topk(how.top_k).values[-1], -torch.inf)
        logp = logits.log_softmax(-1)
        token = int(logp.argmax()) if how.temperature == 0 else int(torch.multinomial(logp.exp(), 1, generator=random))
        tokens.append(token)
        logprobs.append({token: types.SimpleNamespace(logprob=float(logp[token]))})
        ended = token == 2
    return types.SimpleNamespace(token_ids=tokens, logprobs=logprobs, finish_reason="stop" if ended else "length")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    model = build("llama", tie_word_embeddings=False)
    where = tmp_path_factory.mktemp("start")
    model.save_pretrained(where)
    return where


@pytest.fixture
def fake(monkeypatch: Any) -> Any:
    module = types.ModuleType("vllm")
    module.__version__, module.LLM = "0.30.1", FakeLLM
    module.SamplingParams = lambda **settings: types.SimpleNamespace(**settings)
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


@pytest.fixture
def started(fake: Any, folder: Path) -> Vllm:
    return Vllm.start(str(folder), VllmOptions())


def trained(folder: Path, by: float = 0.05) -> Any:
    """The policy some updates later."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(by * torch.randn_like(weight))
    return model


# ---------------------------------------------------------------- weights arrive, or nobody samples


def test_nothing_is_sampled_before_weights_were_given(started):
    with pytest.raises(EngineError, match="no weights of this policy yet; call update"):
        started.sample(PROMPTS, 2, SAMPLING, SEEDS)


def test_completions_come_from_the_weights_of_the_update_with_their_log_probs(started, folder):
    model = trained(folder)
    policy = Policy(model)
    started.update(policy)
    found = started.sample(PROMPTS, 3, SAMPLING, SEEDS)
    assert [len(own) for own in found] == [3, 3, 3]
    rows = [
        Example(prompt, [own.tokens for own in several], [0.0] * 3, [[True] * len(own.tokens) for own in several])
        for prompt, several in zip(PROMPTS, found, strict=True)
    ]
    logp = policy(Batch.of(rows)).logp
    drawn = torch.tensor([value for several in found for own in several for value in own.logp])
    torch.testing.assert_close(logp.detach(), drawn, atol=1e-5, rtol=0)
    assert all(own.finished == (own.tokens[-1] == 2) for several in found for own in several)


def test_the_same_seeds_give_the_same_completions_whatever_stands_beside_them(started, folder):
    started.update(trained(folder))
    whole = started.sample(PROMPTS, 2, SAMPLING, SEEDS)
    assert started.sample(PROMPTS[1:2], 2, SAMPLING, SEEDS[1:2]) == whole[1:2]
    assert started.sample(PROMPTS[1:2], 3, SAMPLING, SEEDS[1:2])[0][:2] == whole[1]
    assert len({mixed(seed) + place for seed in range(100) for place in range(64)}) == 6400


def test_every_update_has_a_version_of_its_own(started, folder):
    versions = []
    for _ in range(3):
        started.update(trained(folder))
        versions.append(started.version)
    assert len(set(versions)) == 3
    assert versions[-1] == started.engine.state()["version"]


@pytest.mark.parametrize("fault", ["dropped", "half", "dies", "keeps its cache"])
@pytest.mark.fault(29)
def test_weights_that_did_not_arrive_are_noticed_and_nobody_samples_from_the_old_ones(started, folder, fault):
    started.update(trained(folder))
    started.engine.engine.fault = fault
    with pytest.raises(EngineError, match="did not take over the weights"):
        started.update(trained(folder, by=0.1))
    with pytest.raises(EngineError, match="call update first"):
        started.sample(PROMPTS, 1, SAMPLING, SEEDS)
    started.engine.engine.fault = ""
    started.update(trained(folder, by=0.1))
    assert started.sample(PROMPTS, 1, SAMPLING, SEEDS)


@pytest.mark.fault(29)
def test_an_engine_that_was_started_anew_is_noticed(started, folder):
    started.update(trained(folder))
    del started.engine.engine.worker._prefopt_has
    with pytest.raises(EngineError, match=r"has weights 'of its checkpoint', not .*restarted"):
        started.sample(PROMPTS, 1, SAMPLING, SEEDS)


def test_an_engine_that_changes_values_is_compared_by_version_alone_if_told_so(fake, folder):
    exact, loose = Vllm.start(str(folder), VllmOptions()), Vllm.start(str(folder), VllmOptions(vllm_check="version"))
    for sampler in (exact, loose):
        layers = sampler.engine.engine.worker.model_runner.model
        layers.tensors["scale"] = nn.Parameter(torch.ones(3), requires_grad=False)
    loose.update(trained(folder))
    with pytest.raises(EngineError, match="vllm_check=version"):
        exact.update(trained(folder))


def test_an_engine_sleeps_while_the_policy_trains_and_keeps_its_weights(fake, folder):
    sampler = Vllm.start(str(folder), VllmOptions(vllm_sleep=True))
    sampler.update(trained(folder))
    first = sampler.sample(PROMPTS, 1, SAMPLING, SEEDS)
    assert sampler.engine.engine.asleep
    assert sampler.sample(PROMPTS, 1, SAMPLING, SEEDS) == first
    sampler.update(trained(folder, by=0.1))
    assert sampler.sample(PROMPTS, 1, SAMPLING, SEEDS) != first


# ---------------------------------------------------------------- engines that fail


@pytest.mark.parametrize("fault", ["dies once", "loses one"])
@pytest.mark.fault(28)
def test_a_fault_that_passes_costs_a_retry(started, folder, fault):
    started.update(trained(folder))
    expected = started.sample(PROMPTS, 2, SAMPLING, SEEDS)
    started.engine.engine.fault, started.engine.engine.calls = fault, 0
    assert started.sample(PROMPTS, 2, SAMPLING, SEEDS) == expected
    assert started.engine.engine.calls == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("dies", "EngineCore died"),
        ("other prompt", "read a prompt of"),
        ("one short", "1 completions where 2 were asked for"),
        ("empty", "an empty completion"),
        ("aborted", "an empty completion"),
        ("not a number", "a log-prob that is not finite"),
        ("other tokens", "a log-prob that is not finite"),
    ],
)
@pytest.mark.fault(28)
def test_a_fault_that_stays_ends_in_an_error_after_the_retries(started, folder, fault, said):
    started.update(trained(folder))
    started.engine.engine.fault, started.engine.engine.calls = fault, 0
    with pytest.raises(EngineError, match=rf"no completions for 3 prompts in 3 tries.*{said}"):
        started.sample(PROMPTS, 2, SAMPLING, SEEDS)
    assert started.engine.engine.calls == 3


def test_an_empty_prompt_is_refused(started, folder):
    started.update(trained(folder))
    with pytest.raises(ValueError, match="no tokens"):
        started.sample([[]], 1, SAMPLING, [0])


def test_greedy_completions_have_log_prob_zero(started, folder):
    started.update(trained(folder))
    [[one, other]] = started.sample([[5, 6]], 2, Sampling(max_tokens=4, temperature=0.0), [0])
    assert one == other and one.logp == [0.0] * len(one.tokens)


def test_every_setting_of_the_distribution_reaches_the_engine():
    how = Sampling(max_tokens=9, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, stop=("\n",))
    found = engines.settings(4, how, 11)
    assert found["include_stop_str_in_output"] is True and found["stop"] == ["\n"]
    assert (found["n"], found["seed"], found["max_tokens"], found["logprobs"]) == (4, 11, 9, 0)
    assert (found["temperature"], found["top_k"], found["top_p"], found["min_p"]) == (0.7, 5, 0.9, 0.1)
    assert found["repetition_penalty"] == 1.0 and "stop" not in engines.settings(1, SAMPLING, 0)


# ---------------------------------------------------------------- versions and options


@pytest.mark.parametrize("version", ["0.22.0", "0.30.1.dev3+gabc", "0.32.9"])
def test_versions_within_the_window_are_taken(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.21.9", "0.33.0", "1.0.0", "dev", ""])
def test_versions_outside_the_window_are_refused_with_what_to_install(version):
    with pytest.raises(InputError, match=r"install vllm>=0\.22,<0\.33"):
        check_version(version)


def test_without_vllm_it_is_said_what_to_install(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"vLLM cannot be imported.*pip install 'vllm>=0\.22,<0\.33'"):
        Vllm.start(str(folder), VllmOptions())


@pytest.mark.parametrize(
    "options", [{"vllm_mode": "cloud"}, {"vllm_check": "no"}, {"vllm_memory": 0.0}, {"vllm_retries": -1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VllmOptions(**options)


# ---------------------------------------------------------------- weights and their fingerprint


def test_a_fingerprint_is_of_values_not_of_their_layout():
    torch.manual_seed(0)
    one, two = torch.randn(6, 4), torch.randn(3, 4)
    expected = fingerprint([one, two])
    assert fingerprint([torch.cat([two, one])]) == expected
    assert fingerprint([one.t(), two]) == expected
    assert fingerprint([torch.cat([one, torch.zeros(5, 4)]), two]) == expected
    assert fingerprint([one.bfloat16()]) == fingerprint([one.bfloat16().float()])


def test_one_changed_value_changes_the_fingerprint():
    torch.manual_seed(0)
    whole = torch.randn(1000).bfloat16()
    expected, seen = fingerprint([whole]), set()
    for place in range(0, 1000, 50):
        other = whole.clone()
        other.view(torch.int16)[place] += 1  # the smallest step that there is
        seen.add(fingerprint([other]))
    assert expected not in seen and len(seen) == 20
    swapped = whole.clone()
    swapped[0] = -swapped[0]
    assert fingerprint([swapped]) != expected


def test_a_fingerprint_in_pieces_is_that_of_the_whole(monkeypatch):
    whole = torch.randn(100)
    expected = fingerprint([whole])
    monkeypatch.setattr("prefopt.models.weights.CHUNK", 7)
    assert fingerprint([whole]) == expected


def test_names_are_those_of_the_checkpoint(folder, tmp_path):
    from safetensors.torch import load_file

    for tied in (False, True):
        model = build("llama", tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        saved = load_file(tmp_path / "model.safetensors")
        found = dict(named_weights(model, torch.float32))
        assert found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_experts_are_named_one_by_one_as_in_the_checkpoint(tmp_path):
    from safetensors.torch import load_file

    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    found = dict(named_weights(model, torch.float32))
    assert found.keys() == saved.keys() and any(".experts.0." in name for name in found)
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "embed_tokens"]])
def test_an_adapter_is_merged_without_touching_the_model(targets):
    torch.manual_seed(0)
    base = build("llama")
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = dict(named_weights(model, torch.float32))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    merged = copy.deepcopy(model).merge_and_unload()
    expected = dict(named_weights(merged, torch.float32))
    assert found.keys() == expected.keys() == dict(named_weights(base, torch.float32)).keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=0)


def test_a_continued_adapter_is_merged_once_and_its_start_left_out(folder, tmp_path):
    first = adapt(AutoModelForCausalLM.from_pretrained(folder), LoraOptions(lora_rank=2))
    with torch.no_grad():
        for name, weight in first.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.1)
    first.save_pretrained(tmp_path)
    going_on = adapt(AutoModelForCausalLM.from_pretrained(folder), LoraOptions(), tmp_path)
    expected, found = (dict(named_weights(model, torch.float32)) for model in (first, going_on))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# ---------------------------------------------------------------- a server


class FakeVllmServer:
    """vLLM's routes over a local server: what the trainer sends is checked, what it gets is drawn by a model."""

    def __init__(self, folder: Path) -> None:
        self.llm = FakeLLM(str(folder), "prefopt.models.vllm_worker.Weights")
        self.version, self.dev, self.processed, self.fault = "0.31.0", True, True, ""
        self.failed = 0

    def __call__(self, request: Any) -> Answer:
        routes = {
            "/version": lambda body: {"version": self.version},
            "/v1/models": lambda body: {"data": [{"id": "served"}]},
            "/collective_rpc": self.rpc,
            "/reset_prefix_cache": self.reset,
            "/v1/completions": self.complete,
        }
        if request.path in ("/collective_rpc", "/reset_prefix_cache") and not self.dev:
            return Answer({"detail": "Not Found"}, 404)
        if request.path == "/v1/completions" and self.fault == "500 once" and not self.failed:
            self.failed += 1
            return Answer({}, 500)
        if request.path == "/v1/completions" and self.fault == "hang":
            return Answer({}, fault="hang")
        return Answer(routes[request.path](request.body))

    def rpc(self, body: Any) -> Any:
        assert all(isinstance(argument, str) for argument in body["args"])  # vLLM passes nothing else on
        state = getattr(self.llm.worker, body["method"])(*body["args"])
        if body["method"] == "prefopt_take":
            from safetensors.torch import load_file

            self.llm.own.load_state_dict(load_file(body["args"][0]), strict=False)
        others = [{**state, "version": "other"}] if self.fault == "half of the workers" else []
        return {"results": [state, *others]}

    def reset(self, body: Any) -> Any:
        return {"success": self.fault != "keeps its cache"}

    def complete(self, body: Any) -> Any:
        assert body["model"] == "served" and body["return_token_ids"] is True
        how = types.SimpleNamespace(**body)
        choices = []
        for index in range(body["n"]):
            own = draw(self.llm.own, body["prompt"], how, body["seed"] + index)
            logp = [next(iter(of.values())).logprob for of in own.logprobs]
            if not self.processed:
                logp = [value - 0.5 for value in logp]
            choice = {"index": index, "token_ids": own.token_ids, "prompt_token_ids": body["prompt"]}
            choice |= {"finish_reason": own.finish_reason, "logprobs": {"token_logprobs": logp}}
            choices.append(choice)
        if self.fault == "one short":
            choices = choices[1:]
        return {"choices": choices[::-1]}


@pytest.fixture
def server(folder: Path) -> Any:
    fake = FakeVllmServer(folder)
    with serving(fake) as running:
        fake.url = running.url.removesuffix("/v1")
        yield fake


def connected(server: Any, **options: Any) -> Vllm:
    settings = {"vllm_url": server.url, "vllm_timeout": 5.0, "vllm_retries": 1, **options}
    return Vllm.start("unused", VllmOptions(vllm_mode="server", **settings))


def test_a_server_draws_what_an_engine_in_this_process_draws(server, started, folder, tmp_path):
    sampler = connected(server, vllm_folder=str(tmp_path))
    for own in (sampler, started):
        own.update(trained(folder))
    for how in (SAMPLING, Sampling(max_tokens=4, temperature=0.7, top_k=5), Sampling(max_tokens=4, temperature=0.0)):
        expected = started.sample(PROMPTS, 3, how, SEEDS)
        found = sampler.sample(PROMPTS, 3, how, SEEDS)
        assert [[own[0] for own in several] for several in found] == [
            [own[0] for own in several] for several in expected
        ]
        for several, others in zip(found, expected, strict=True):
            for one, other in zip(several, others, strict=True):
                assert one.logp == pytest.approx(other.logp, abs=1e-6) and one.finished == other.finished
    assert not list(tmp_path.iterdir())  # the weights' file is gone
    sampler.close()


@pytest.mark.parametrize("fault", ["half of the workers", "keeps its cache"])
@pytest.mark.fault(29)
def test_a_server_that_did_not_take_the_weights_is_noticed(server, folder, fault):
    sampler = connected(server)
    server.fault = fault
    with pytest.raises(EngineError, match="did not take over the weights"):
        sampler.update(trained(folder))
    with pytest.raises(EngineError, match="call update first"):
        sampler.sample(PROMPTS, 1, SAMPLING, SEEDS)
    sampler.close()


@pytest.mark.fault(29)
def test_a_server_that_was_restarted_in_between_is_noticed(server, folder):
    sampler = connected(server)
    sampler.update(trained(folder))
    server.llm = FakeLLM(str(folder), "prefopt.models.vllm_worker.Weights")
    with pytest.raises(EngineError, match="restarted"):
        sampler.sample(PROMPTS, 1, SAMPLING, SEEDS)
    sampler.close()


@pytest.mark.fault(28)
def test_faults_of_a_server_are_retried_and_then_errors(server, folder):
    sampler = connected(server, vllm_timeout=1.0)
    sampler.update(trained(folder))
    server.fault = "500 once"
    assert len(sampler.sample(PROMPTS, 2, SAMPLING, SEEDS)) == 3
    server.fault = "one short"
    with pytest.raises(EngineError, match="1 completions where 2 were asked for"):
        sampler.sample(PROMPTS, 2, SAMPLING, SEEDS)
    server.fault = "hang"
    with pytest.raises(EngineError, match=r"no completions for 1 prompts in 2 tries.*(in time|within)"):
        sampler.sample(PROMPTS[:1], 2, SAMPLING, SEEDS[:1])
    sampler.close()


def test_a_server_that_was_started_otherwise_is_refused_with_how_to_start_it(server):
    for change, said in (
        ({"dev": False}, "workers do not take prefopt_state"),
        ({"processed": False}, "log-probs before temperature"),
        ({"version": "0.9.2"}, r"install vllm>=0\.22"),
    ):
        old = {name: getattr(server, name) for name in change}
        vars(server).update(change)
        with pytest.raises(InputError, match=said) as error:
            connected(server)
        assert "version" in change or "--logprobs-mode processed_logprobs" in str(error.value)
        vars(server).update(old)


@pytest.mark.fault(28)
def test_a_server_that_is_down_is_said_with_its_address():
    url = f"http://127.0.0.1:{closed_port()}"
    with pytest.raises(InputError, match=rf"{url}.*vllm serve MODEL"):
        Vllm.start("unused", VllmOptions(vllm_mode="server", vllm_url=url))


def test_a_worker_says_where_the_weights_are_missing(folder):
    worker = FakeLLM(str(folder), "prefopt.models.vllm_worker.Weights").worker
    with pytest.raises(FileNotFoundError, match="vllm_folder"):
        worker.prefopt_take("/nowhere/weights.safetensors", "v1")
    assert worker.prefopt_state()["version"] == ""


def test_a_directory_that_training_starts_from_works_too(fake, tmp_path):
    sampler = Vllm.start(str(save_model(tmp_path / "m")), VllmOptions())
    sampler.update(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))
    assert len(sampler.sample([[3, 4]], 2, SAMPLING, [0])[0]) == 2
    sampler.close()
