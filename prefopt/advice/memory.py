"""What a run holds in memory, part by part, worked out before anything is loaded.

Arithmetic alone: the numbers of a model (`Net`), of the largest forward pass (`Pass`) and of the options. Each part is
what the code that runs keeps; benchmarks/memory.py compares the sum with measured peaks. Bytes throughout.

Letters: T tokens of a pass, K completion tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from prefopt.advice.passes import Pass
from prefopt.advice.sizes import Net

SIZE = {"float32": 4, "bfloat16": 2, "float64": 8}
CHUNK = 256 * 2**20  # of logits held at once: prefopt.models.head; a test holds them equal
PACKED = 2 * 2**30  # of weights laid out for sampling, at most: prefopt.models.packed
HELD = 16_384  # tokens that the sampler holds at once on a CPU: prefopt.models.sampler
COLUMNS = 64  # the step in which its caches grow: prefopt.models.decode
# resident memory of Python with torch, transformers and what they load on first use, measured on Linux on a CPU
BASE = 400 * 10**6
WORD = 600  # bytes of a tokenizer for each word of its vocabulary, measured
# On a CPU freed blocks stay with the process, and those that lie between others are not always of use: what is resident
# over what is in use. Fitted to some points of benchmarks/memory.py (docs/estimate.md says which).
APART = {"float32": 1.1, "bfloat16": 1.3, "float64": 1.1}
APART_WITH_ADAPTER = 1.35
SMALL = 200_000_000  # parameters of a model that is copied to float32 for a probe: prefopt.models.policy

Where = Literal["none", "cache", "adapter", "copy"]


@dataclass(frozen=True)
class Sampling:
    """What is sampled together. prompts, longest: how many prompts, and tokens of the longest; num: completions of
    each; max_tokens: the longest completion.
    """

    prompts: int
    longest: int
    num: int
    max_tokens: int


@dataclass(frozen=True)
class Setup:
    """The options that decide memory. reference: where its log-probs come from. critic: a model of its own, or a layer.
    head: a language-model head (False: a score). scorers: bytes of reward models held beside. entropy: the head
    computes it. several: passes of one update add up their gradients. gpu: peaks are the allocator's there.
    saved: a checkpoint is copied before it is written (save_async).
    """

    dtype: str = "float32"
    lora_rank: int = 0
    checkpointing: bool = False
    quantised: bool = False
    reference: Where = "none"
    critic: Literal["none", "own", "shared"] = "none"
    head: bool = True
    scorers: int = 0
    entropy: bool = False
    several: bool = True
    gpu: bool = False
    saved: bool = False
    sampling: Sampling | None = None

    @property
    def size(self) -> int:
        """Bytes of one number in the weights."""
        return SIZE[self.dtype]


@dataclass(frozen=True)
class Moment:
    """What is held at one time. parts: name -> bytes."""

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """The moments at which a run may hold most."""

    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def moment(self, name: str) -> Moment:
        """The moment of this name. KeyError."""
        return {moment.name: moment for moment in self.moments}[name]


def memory(net: Net, largest: Pass, setup: Setup) -> Memory:
    """Everything a run holds: while it loads, at the end of the forward pass, at the end of the backward pass, while it
    samples, and while a checkpoint is written.
    """
    base = {} if setup.gpu else {"python and torch": BASE, "tokenizer": WORD * net.vocabulary}
    still = lasting(net, setup)
    gradients = {"gradients": gradient_bytes(net, setup)}
    forward = {
        **still,
        **(gradients if setup.several else {}),
        "activations": activations(net, largest, setup),
        "head": head(net, largest, setup),
    }
    backward = {**still, **gradients, "head": head_gradients(net, setup), "activations": layer(net, largest, setup)}
    busy = {"forward": forward, "backward": backward}
    if setup.sampling is not None:
        busy["sampling"] = {**still, **caches(net, setup, setup.sampling), **laid_out(net, setup)}
    if setup.saved:  # copied between two updates
        busy["checkpoint"] = {**still, "checkpoint": checkpoint_bytes(net, setup)}
    found = [Moment(name, {**base, **parts, **apart(parts, setup)}) for name, parts in busy.items()]
    return Memory((*found, Moment("loading", {**base, **loading(net, setup)})))


def checkpoint_bytes(net: Net, setup: Setup) -> int:
    """The copy of masters and moments that is written while training goes on."""
    number = trained(net, setup) + (net.body if setup.critic == "own" else 0)
    return 3 * number * master_size(setup)


def apart(parts: Mapping[str, int], setup: Setup) -> dict[str, int]:
    """What the process holds beyond what is in use."""
    if setup.gpu:
        return {}
    factor = APART_WITH_ADAPTER if setup.lora_rank else APART[setup.dtype]
    return {"freed, between others": round((factor - 1) * sum(parts.values()))}


# ---------------------------------------------------------------- what stays


def trained(net: Net, setup: Setup) -> int:
    """Weights of the policy that are trained."""
    if setup.lora_rank:
        return setup.lora_rank * net.rank_width
    return net.parameters if setup.head else net.body


def master_size(setup: Setup) -> int:
    """Bytes of one number in masters, gradients that are added up, and AdamW's moments: float32 or wider."""
    return max(4, setup.size)


def lasting(net: Net, setup: Setup) -> dict[str, int]:
    """What a run holds all the time."""
    weights = net.parameters if setup.head else net.body
    number, wide = trained(net, setup), master_size(setup)
    held = weights // 2 if setup.quantised else weights * setup.size
    parts = {"weights": held, "masters": 0, "moments": 2 * number * wide}
    if setup.lora_rank:
        parts["adapter"] = number * wide  # peft keeps adapters in float32
    elif setup.size < wide:
        parts["masters"] = number * wide
    if setup.reference == "copy":
        parts["reference"] = held + (parts.get("adapter", 0))
    if setup.critic == "own":  # trained whole, also beside an adapter
        parts["critic"] = net.body * (setup.size + wide * (3 if setup.size < wide else 2))
    if setup.scorers:
        parts["reward model"] = setup.scorers
    return {name: value for name, value in parts.items() if value}


def gradient_bytes(net: Net, setup: Setup) -> int:
    """Gradients of everything that is trained, as they are added up."""
    return (trained(net, setup) + (net.body if setup.critic == "own" else 0)) * master_size(setup)


def loading(net: Net, setup: Setup) -> dict[str, int]:
    """The file's pages beside the weights read from it; then a float32 copy for a probe of small 16-bit models."""
    weights = lasting(net, setup)["weights"]
    probe = 4 * net.parameters if setup.size < 4 and net.parameters <= SMALL else 0
    return {"weights": weights, "file or probe": max(0 if setup.gpu else net.file_bytes, probe)}


# ---------------------------------------------------------------- a forward pass


def activations(net: Net, largest: Pass, setup: Setup) -> int:
    """What the layers keep for backward, at the end of the forward pass; of a critic of its own as well."""
    stream = largest.tokens * net.width * setup.size
    if setup.checkpointing:
        kept = net.layers * stream + layer(net, largest, setup)
    else:
        kept = net.layers * layer(net, largest, setup)
    own = 2 if setup.critic == "own" else 1
    return own * (kept + largest.tokens * _last_norm(net, setup))


def layer(net: Net, largest: Pass, setup: Setup) -> int:
    """What one decoder layer keeps for backward.

    A norm: its input (in float32), what it is divided to, and its result, which the matrices behind it keep. Attention:
    queries, keys, values, its result, and the probabilities of short blocks. The feed-forward layer: each of its
    products. Frozen weights keep less, and an adapter keeps its inputs in float32.
    """
    each = _adapted(net, setup) if setup.lora_rank else _whole(net, setup)
    scores = 0 if setup.gpu else net.heads * largest.kept * setup.size
    return largest.tokens * each + scores


def _last_norm(net: Net, setup: Setup) -> int:
    """What the norm behind the last layer keeps of one token: its input, and what a trained weight multiplies."""
    if not net.root_norm:
        return net.width * setup.size
    return net.width * (max(4, setup.size) + (0 if setup.lora_rank else setup.size))


def _whole(net: Net, setup: Setup) -> int:
    """What a layer that is trained whole keeps of one token."""
    size, width = setup.size, net.width
    if not net.root_norm:
        norm = 2 * width * size
    else:  # in 16 bits its input stays as a float32 copy
        norm = (4 + 2 * size) * width if size < 4 else 3 * width * size
    return 2 * norm + 2 * (net.query_width + net.key_width) * size + net.products * net.inner * size


def _adapted(net: Net, setup: Setup) -> int:
    """What a layer with adapters on all of its matrices keeps of one token: each adapter keeps its input in float32."""
    size, width, queries = setup.size, net.width, net.query_width
    between = 7 * setup.lora_rank * 4
    attention = (queries + 2 * net.key_width) * size
    if size >= 4:  # the matrices behind a norm share its result
        return 4 * width * size + attention + (queries + net.products * net.inner) * size + between
    behind = 5 if net.gated else 2  # matrices behind a norm: a family without a gate has queries, keys, values as one
    inputs = 4 * (behind * width + queries + net.inner)
    return 2 * 4 * width + inputs + attention + (net.products - 1) * net.inner * size + between


def head(net: Net, largest: Pass, setup: Setup) -> int:
    """The head's hidden states, its chunks of logits, and the gradient of its weights, when backward begins."""
    if not setup.head:
        return largest.completion * net.width * 4
    rows = max(1, CHUNK // (net.vocabulary * setup.size))
    chunk = min(rows, largest.completion) * net.vocabulary
    if setup.entropy:
        logits = 5 * chunk * 4
    else:
        logits = chunk * setup.size * (1 if largest.completion <= rows else 2)
    weight = 0 if setup.lora_rank else net.head * setup.size
    return logits + 2 * largest.completion * net.width * setup.size + weight


def head_gradients(net: Net, setup: Setup) -> int:
    """At the end of backward: a tied matrix's gradient from the head and from the embeddings, before they are one."""
    if setup.lora_rank or not setup.head:
        return 0
    return net.head * setup.size * (2 if net.tied else 1)


# ---------------------------------------------------------------- sampling


def caches(net: Net, setup: Setup, sampling: Sampling) -> dict[str, int]:
    """Keys and values of prompts and completions that are written together, and the logits of a step."""
    rows = sampling.prompts * sampling.num
    room = max(1, (HELD - sampling.prompts * sampling.longest) // sampling.max_tokens)
    together = rows if setup.gpu else min(rows, max(room, 1))
    columns = grown(sampling.max_tokens)
    own_size = setup.size if setup.gpu else max(4, setup.size)  # a CPU holds the completions' in float32
    each = 2 * net.layers * net.key_width
    held = each * (together * columns * own_size + sampling.prompts * sampling.longest * setup.size)
    return {"caches": held, "logits": 4 * together * net.vocabulary * 4}


def grown(length: int) -> int:
    """Columns of a cache that grew to hold `length`: see prefopt.models.decode."""
    columns = 0
    while columns < length:
        columns = max(COLUMNS, columns + max(COLUMNS, columns // 2))
    return columns


def laid_out(net: Net, setup: Setup) -> dict[str, int]:
    """Copies of the matrices in the layout of a CPU's products, while samples are drawn."""
    if setup.gpu or setup.size > 4:
        return {}
    return {"laid-out weights": min(PACKED, (net.linear + net.head) * setup.size)}
