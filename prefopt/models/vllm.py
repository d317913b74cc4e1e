"""Completions from vLLM: an engine in this process or a server beside it, with weights that are known to be current."""

from __future__ import annotations

import importlib
import logging
import math
import os
import random
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from prefopt import ranks
from prefopt.endpoint import Endpoint, Patience, Reply, key_from, require_name
from prefopt.models.policy import Policy
from prefopt.models.sampling import Completion, Sampling
from prefopt.models.weights import fingerprint, named_weights
from prefopt.records import InputError

T = TypeVar("T")
log = logging.getLogger("prefopt")
OLDEST, NEWEST = (0, 22), (0, 32)  # versions of vLLM whose interfaces are used as they are
EXTENSION = "prefopt.models.vllm_worker.Weights"
START = f"VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --worker-extension-cls {EXTENSION} --logprobs-mode processed_logprobs"
CERTAIN = 1e-3  # nats: what a token that alone can be drawn may differ from log-prob 0


class EngineError(InputError):
    """The engine failed, again after its retries: nothing was sampled, and nothing is made up for it."""


@dataclass(frozen=True)
class VllmOptions:
    """vLLM as the sampler (Kwon et al. 2023, arXiv:2309.06180)."""

    # colocated: in this process, on its GPU; server: one that was started beside it
    vllm_mode: Literal["colocated", "server"] = "colocated"
    # server: its address, without /v1
    vllm_url: str = "http://127.0.0.1:8000"
    # server: environment variable that holds its key; empty sends none
    vllm_key_variable: str = ""
    # server: folder through which weights are handed over, seen under the same path by both; one in memory
    # (/dev/shm) is fastest on one machine
    vllm_folder: str = ""
    # colocated: share of the GPU's memory for the engine; more samples more at once and leaves less for training
    vllm_memory: float = 0.3
    # colocated: longest prompt with its completion in tokens; None takes the model's own, which may need much memory
    vllm_max_length: int | None = None
    # colocated: put the engine's memory aside while training; leaves room for training and costs seconds per rollout
    vllm_sleep: bool = False
    # weights: compare every value the engine holds with the policy's; version: only their number, for engines that
    # change values on the way (quantised, split over several GPUs)
    vllm_check: Literal["weights", "version"] = "weights"
    # further tries of prompts that got no completions
    vllm_retries: int = 2
    # server: seconds for one request; longer helps long completions
    vllm_timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.vllm_mode not in ("colocated", "server"):
            raise ValueError(f"vllm_mode must be colocated or server, got {self.vllm_mode!r}")
        if self.vllm_check not in ("weights", "version"):
            raise ValueError(f"vllm_check must be weights or version, got {self.vllm_check!r}")
        if not 0 < self.vllm_memory <= 1:
            raise ValueError(f"vllm_memory must be above 0 and at most 1, got {self.vllm_memory}")
        if self.vllm_retries < 0 or not self.vllm_timeout > 0:
            raise ValueError("vllm_retries must not be negative, and vllm_timeout above 0")
        require_name("vllm_key_variable", self.vllm_key_variable)


class Drawn(NamedTuple):
    """What an engine says it drew for a prompt: the prompt's tokens as it saw them, and its completions, or `why` there
    are none.
    """

    prompt: Sequence[int]
    completions: list[Completion]
    why: str = ""


class Engine(Protocol):
    def state(self) -> Mapping[str, Any]:
        """version, fingerprint and dtype of the weights that are loaded."""
        ...

    def take(self, weights: Iterator[tuple[str, Tensor]], version: str) -> Mapping[str, Any]:
        """Load weights, forget what was computed with the old ones, and say the new state."""
        ...

    def draw(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Drawn]: ...

    def close(self) -> None: ...


class Vllm:
    """A `Sampler` on a vLLM engine, which never samples from weights other than those of the last `update`.

    version: of the weights that the next completions come from; "" before the first update.
    """

    def __init__(self, engine: Engine, options: VllmOptions = VllmOptions()) -> None:
        self.engine, self.options, self.version = engine, options, ""
        self._run, self._count = ranks.from_main(uuid.uuid4().hex[:12]), 0

    @classmethod
    def start(cls, model: str, options: VllmOptions) -> Vllm:
        """The engine that the options name. model: the directory or hub name that training starts from."""
        engine: Engine = Served(options) if options.vllm_mode == "server" else Colocated(model, options)
        return cls(engine, options)

    def update(self, policy: Any) -> None:
        """Give the policy's weights to the engine and check that they arrived. EngineError where they did not.

        All processes call it together. A server takes them once, an engine in each process from its own.
        """
        model = policy.model if isinstance(policy, Policy) else policy
        self.version, self._count = "", self._count + 1
        version = f"{self._run}-{self._count}"
        dtype = _together(lambda: getattr(torch, str(self.engine.state()["dtype"])))
        pushes = ranks.is_main() or self.options.vllm_mode == "colocated"
        sent = _Watched(named_weights(model, dtype), pushes and self.options.vllm_check == "weights")

        def push() -> None:
            if pushes:
                self._check(self.engine.take(iter(sent), version), version, sent)
            for _ in sent:  # the others of a sharded model take part in gathering what one of them sends
                pass

        _together(push)
        self.version = version

    def _check(self, state: Mapping[str, Any], version: str, sent: _Watched) -> None:
        if state["version"] != version:
            raise EngineError(f"it says that it has version {state['version']!r}")
        if self.options.vllm_check == "weights" and state["fingerprint"] != sent.fingerprint:
            raise EngineError(
                f"it holds other values than the policy (fingerprint {state['fingerprint']}, not {sent.fingerprint}); "
                "if it quantises or splits weights, compare versions alone with vllm_check=version"
            )

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """n completions of every prompt. EngineError before the first `update`, where the engine's weights are no
        longer those, and where a prompt still has no n whole completions after the retries.
        """
        if any(not len(prompt) for prompt in prompts):
            raise ValueError("a prompt has no tokens; begin it with the model's start token")
        self._require_current()
        found: dict[int, list[Completion]] = {}
        why = ""
        for attempt in range(self.options.vllm_retries + 1):
            missing = [place for place in range(len(prompts)) if place not in found]
            if not missing:
                break
            if attempt:
                log.warning("vllm: %d of %d prompts again: %s", len(missing), len(prompts), why)
            asked = [list(prompts[place]) for place in missing]
            own = [mixed(seeds[place]) for place in missing]
            try:
                drawn = self.engine.draw(asked, n, sampling, own)
            except Exception as error:  # an engine raises what it likes when it dies
                why = f"{type(error).__name__}: {error}"
                continue
            found, why = self._whole(missing, asked, drawn, n, found, why)
        if len(found) < len(prompts):
            tries = self.options.vllm_retries + 1
            raise EngineError(
                f"vLLM gave no completions for {len(prompts) - len(found)} prompts in {tries} tries: {why}"
            )
        self._require_current()
        return [found[place] for place in range(len(prompts))]

    def _whole(
        self, places: list[int], asked: list[list[int]], drawn: list[Drawn], n: int, found: dict[int, Any], why: str
    ) -> tuple[dict[int, list[Completion]], str]:
        """What was found, with every prompt's completions that are whole; the last reason why some are not."""
        found = dict(found)
        if len(drawn) != len(asked):
            return found, f"{len(drawn)} results for {len(asked)} prompts"
        for place, prompt, own in zip(places, asked, drawn, strict=True):
            problem = own.why or _problem(prompt, own, n)
            if problem:
                why = problem
            else:
                found[place] = own.completions
        return found, why

    def _require_current(self) -> None:
        """EngineError unless the engine's weights are those of the last update: a server may have been started anew."""
        if not self.version:
            raise EngineError("vLLM has no weights of this policy yet; call update first")
        has = self.engine.state()["version"]
        if has != self.version:
            raise EngineError(
                f"vLLM has weights {has or 'of its checkpoint'!r}, not {self.version!r}; was it restarted?"
            )

    def close(self) -> None:
        self.engine.close()


def _together(work: Callable[[], T]) -> T:
    """`work()`; EngineError on all processes where that of any failed, or the others would wait for it without end."""
    found: list[T] = []
    why = ""
    try:
        found.append(work())
    except Exception as error:  # an engine raises what it likes when it dies
        why = f"{type(error).__name__}: {error}"
    problem = next((one for one in ranks.gather(why) if one), "")
    if problem:
        raise EngineError(f"vLLM did not take over the weights: {problem}")
    return found[0]


class _Watched:
    """Weights on their way, and the fingerprint of those that went."""

    def __init__(self, weights: Iterator[tuple[str, Tensor]], watch: bool) -> None:
        self.weights, self.watch, self.total = weights, watch, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            if self.watch:
                self.total = (self.total + int(fingerprint([tensor]), 16)) % (1 << 64)
            yield name, tensor

    @property
    def fingerprint(self) -> str:
        return f"{self.total:016x}"


def _problem(prompt: Sequence[int], drawn: Drawn, n: int) -> str:
    """What is wrong with a prompt's completions; empty where nothing is."""
    if list(drawn.prompt) != list(prompt):
        return f"it read a prompt of {len(drawn.prompt)} tokens, where {len(prompt)} others were sent"
    if len(drawn.completions) != n:
        return f"{len(drawn.completions)} completions where {n} were asked for"
    for completion in drawn.completions:
        if not completion.tokens:
            return "an empty completion"
        if len(completion.logp) != len(completion.tokens):
            return f"{len(completion.logp)} log-probs for {len(completion.tokens)} tokens"
        if not all(math.isfinite(logp) for logp in completion.logp):
            return "a log-prob that is not finite"
    return ""


def mixed(seed: int) -> int:
    """A seed far from those of its neighbours: vLLM gives completion i of a prompt its seed plus i."""
    return random.Random(seed).getrandbits(48)


def settings(n: int, sampling: Sampling, seed: int) -> dict[str, Any]:
    """Every setting that changes the distribution: those left out would come from the model's generation defaults."""
    found: dict[str, Any] = {
        "n": n,
        "seed": seed,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logprobs": 0,  # that of the token drawn
        "skip_special_tokens": False,
    }
    return found | ({"stop": list(sampling.stop), "include_stop_str_in_output": True} if sampling.stop else {})


def check_version(found: str) -> None:
    """InputError, with what to install, for a version of vLLM outside the window that is known."""
    try:
        major, minor = (int(part) for part in found.split(".")[:2])
    except ValueError:
        raise InputError(f"vLLM {found!r} has no version that can be read; install {_window()}") from None
    if not OLDEST <= (major, minor) <= NEWEST:
        raise InputError(f"vLLM {found} is outside the versions that are known; install {_window()}, or sampler=local")


def _window() -> str:
    return f"vllm>={OLDEST[0]}.{OLDEST[1]},<{NEWEST[0]}.{NEWEST[1] + 1}"


class Colocated:
    """An engine in this process. It runs without a deadline: what hangs within it cannot be given up."""

    def __init__(self, model: str, options: VllmOptions) -> None:
        # the worker must live in this process: weights are handed to it as they are
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        try:
            self.vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise InputError(
                f"vLLM cannot be imported ({error}); pip install '{_window()}', or sampler=local"
            ) from None
        check_version(self.vllm.__version__)
        self.sleeps, self.asleep = options.vllm_sleep, False
        self.engine = self.vllm.LLM(
            model=model,
            load_format="safetensors",  # else it falls back to pickles
            worker_extension_cls=EXTENSION,
            logprobs_mode="processed_logprobs",
            gpu_memory_utilization=options.vllm_memory,
            max_model_len=options.vllm_max_length,
            enable_sleep_mode=options.vllm_sleep,
            distributed_executor_backend="external_launcher" if ranks.active() else "uni",
        )

    def state(self) -> Mapping[str, Any]:
        [state] = self.engine.collective_rpc("prefopt_state")
        return dict(state)

    def take(self, weights: Iterator[tuple[str, Tensor]], version: str) -> Mapping[str, Any]:
        self._wake()
        [state] = self.engine.collective_rpc("prefopt_take", args=(weights, version))
        if self.engine.reset_prefix_cache() is False:
            raise EngineError("it still holds keys and values of the old weights")
        return dict(state)

    def draw(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]) -> list[Drawn]:
        self._wake()
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        how = [
            self.vllm.SamplingParams(**settings(n, sampling, seed), detokenize=bool(sampling.stop)) for seed in seeds
        ]
        results = self.engine.generate(asked, sampling_params=how, use_tqdm=False)
        drawn = [
            Drawn(list(result.prompt_token_ids), [_completion(own, sampling) for own in result.outputs])
            for result in results
        ]
        if self.sleeps:
            self.engine.sleep(level=1)  # level 2 would lose the weights
            self.asleep = True
        return drawn

    def _wake(self) -> None:
        if self.asleep:
            self.engine.wake_up()
            self.asleep = False

    def close(self) -> None:
        self.engine = None


def _completion(output: Any, sampling: Sampling) -> Completion:
    tokens = list(output.token_ids)
    if sampling.temperature == 0:
        logp = [0.0] * len(tokens)
    else:
        pairs = zip(tokens, output.logprobs or [], strict=False)
        logp = [float(of[token].logprob) if token in of else math.nan for token, of in pairs]
    return Completion([] if output.finish_reason == "abort" else tokens, logp, output.finish_reason == "stop")


class Served:
    """A server of vLLM. Its development routes must be open, and its port therefore closed to others."""

    def __init__(self, options: VllmOptions) -> None:
        patience = Patience(call=options.vllm_timeout, concurrency=256, retries=options.vllm_retries)
        self.timeout, self.folder = options.vllm_timeout, options.vllm_folder or None
        key = key_from(options.vllm_key_variable)
        self.endpoint = Endpoint(options.vllm_url.rstrip("/").removesuffix("/v1"), patience, key)
        self.model = self._ready()

    def _ready(self) -> str:
        """The name of the model that is served. InputError, with how to start it, where the server is not as needed."""
        version = self._asked("/version")
        check_version(str(version["version"]) if isinstance(version, dict) and "version" in version else "")
        listed = self._asked("/v1/models")
        try:
            name = str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise InputError(f"{self.endpoint.url} lists no model; start it with: {START}") from None
        try:
            self.state()
        except EngineError as error:
            raise InputError(f"{error}; start it with: {START}") from None
        self.model = name
        self._require_processed()
        return name

    def _asked(self, path: str) -> Any:
        reply = self.endpoint.ask(path, seconds=min(30.0, self.timeout), retries=1)
        if reply.body is None:
            raise InputError(f"vLLM does not answer: {reply.why}; start it with: {START}")
        return reply.body

    def _require_processed(self) -> None:
        """InputError unless log-probs are those of the distribution drawn from: with one token left they are 0."""
        [drawn] = self.draw([[0]], 1, Sampling(max_tokens=1, top_k=1), [0])
        if drawn.why:
            raise InputError(f"vLLM draws nothing: {drawn.why}")
        if not abs(drawn.completions[0].logp[0]) < CERTAIN:
            raise InputError(
                f"{self.endpoint.url} gives log-probs before temperature and top-k; start it with: {START}"
            )

    def state(self) -> Mapping[str, Any]:
        return self._rpc("prefopt_state", [])

    def take(self, weights: Iterator[tuple[str, Tensor]], version: str) -> Mapping[str, Any]:
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory(prefix="prefopt-weights-", dir=self.folder) as folder:
            Path(folder).chmod(0o755)  # the server may run as another user
            path = Path(folder) / f"{version}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in weights}, path)
            state = self._rpc("prefopt_take", [str(path), version])
        forgotten = self.endpoint.ask("/reset_prefix_cache", {})
        if forgotten.status != 200 or (isinstance(forgotten.body, dict) and forgotten.body.get("success") is False):
            raise EngineError(f"it still holds keys and values of the old weights: {forgotten.why or forgotten.body}")
        return state

    def _rpc(self, method: str, arguments: list[str]) -> Mapping[str, Any]:
        """What all workers say to a call; they must agree."""
        reply = self.endpoint.ask("/collective_rpc", {"method": method, "args": arguments, "timeout": self.timeout})
        try:
            first, *others = reply.body["results"]
            same = all(other["version"] == first["version"] for other in others)
            return {"version": str(first["version"]) if same else "", **_rest(first)}
        except (KeyError, TypeError, ValueError):
            why = reply.why or f"{reply.body!r:.200} is no answer"
            raise EngineError(f"its workers do not take {method}: {why}") from None

    def draw(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, seeds: Sequence[int]) -> list[Drawn]:
        def body(prompt: Sequence[int], seed: int) -> dict[str, Any]:
            asked = {"model": self.model, "prompt": list(prompt), "return_token_ids": True}
            return {**asked, **settings(n, sampling, seed)}

        bodies = [body(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        seconds = self.timeout * math.ceil(len(bodies) / self.endpoint.patience.concurrency)
        replies = self.endpoint.gather([_Send(self.endpoint, body) for body in bodies], seconds)
        late = Reply(None, f"no completions within {seconds:g} s")
        return [_read(reply or late, sampling) for reply in replies]

    def close(self) -> None:
        self.endpoint.close()


class _Send:
    """One request for completions, as a task."""

    def __init__(self, endpoint: Endpoint, body: dict[str, Any]) -> None:
        self.endpoint, self.body = endpoint, body

    def __call__(self) -> Any:
        return self.endpoint.send("/v1/completions", self.body)


def _rest(state: Mapping[str, Any]) -> dict[str, str]:
    return {"fingerprint": str(state["fingerprint"]), "dtype": str(state["dtype"])}


def _read(reply: Reply, sampling: Sampling) -> Drawn:
    """A server's answer to one prompt."""
    if reply.body is None:
        return Drawn([], [], reply.why)
    try:
        choices = sorted(reply.body["choices"], key=lambda choice: choice["index"])
        found = [_choice(choice, sampling) for choice in choices]
        return Drawn([int(token) for token in choices[0]["prompt_token_ids"]] if choices else [], found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Drawn([], [], f"an answer that is not vLLM's: {type(error).__name__}: {error}")


def _choice(choice: Mapping[str, Any], sampling: Sampling) -> Completion:
    tokens = [int(token) for token in choice["token_ids"]]
    if sampling.temperature == 0:
        logp = [0.0] * len(tokens)
    else:
        logp = [math.nan if value is None else float(value) for value in choice["logprobs"]["token_logprobs"]]
    if choice["finish_reason"] not in ("stop", "length"):
        tokens = []
    return Completion(tokens, logp, choice["finish_reason"] == "stop")
