"""Reference log-probs from one of three places behind one call: a cache on disk, adapters switched off, a frozen copy.

Letters: N completions, K completion tokens.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from prefopt import ranks
from prefopt.batch import Batch
from prefopt.budget import Budget
from prefopt.models.adapters import START, at_start, is_adapted
from prefopt.models.policy import Policy
from prefopt.records import Example, InputError

log = logging.getLogger("prefopt")
Where = Literal["cache", "adapter", "copy"]


@dataclass(frozen=True)
class ReferenceOptions:
    """Where the reference's log-probs come from."""

    # cache: one pass before training, kept on disk (auto); adapter: the model with its adapter off or at its start;
    # copy: frozen weights in memory
    reference: Literal["auto", "cache", "adapter", "copy"] = "auto"
    # another model as the reference (directory or hub name); None: the model as it was before training
    reference_model: str | None = None
    # folder of the log-prob cache; None: PREFOPT_CACHE or ~/.cache/prefopt
    cache_dir: str | None = None
    # updates after which the reference moves towards the policy (TR-DPO; its paper has 512); None: it stays
    reference_sync_steps: int | None = None
    # share of the policy in a reference that moves: 1 replaces it, less moves it part of the way
    reference_mixup: float = 0.6

    def __post_init__(self) -> None:
        if self.reference_sync_steps is not None and self.reference_sync_steps < 1:
            raise ValueError(f"reference_sync_steps must be at least 1, got {self.reference_sync_steps}")
        if not 0 < self.reference_mixup <= 1:
            raise ValueError(f"reference_mixup must be above 0 and at most 1, got {self.reference_mixup}")


def score(policy: Policy, batch: Batch, budget: Budget) -> Tensor:
    """Log-probs of a batch without gradient, in passes of the budget; [K] nats."""

    def work(tokens: int) -> Tensor:
        with torch.no_grad():
            passes = [(policy(part).logp, counts) for part, _, counts in budget.passes(batch, (), tokens)]
            return torch.cat([logp for logp, counts in passes if counts])

    return budget.run(work, smallest=budget.smallest(batch))


class Copied:
    """A frozen copy of the policy, or another model: twice the weights in memory."""

    def __init__(self, policy: Policy, budget: Budget) -> None:
        self.policy, self.budget = policy, budget

    @classmethod
    def of(cls, policy: Policy, budget: Budget) -> Copied:
        """A deep copy of the policy as it is now."""
        model = copy.deepcopy(policy.model).requires_grad_(False)
        frozen = Policy(model, policy.layout, temperature=policy.temperature)
        frozen.plain_attention, frozen.fused_head = policy.plain_attention, policy.fused_head
        return cls(frozen, budget)

    def __call__(self, batch: Batch) -> Tensor:
        """[K] nats."""
        return score(self.policy, batch, self.budget)

    def state_dict(self) -> dict[str, Any]:
        """Its weights, of one that has moved."""
        return {"weights": list(self.policy.model.parameters())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for mine, saved in zip(self.policy.model.parameters(), state["weights"], strict=True):
                mine.copy_(saved)

    def follow(self, policy: Policy, mixup: float) -> None:
        """Move every weight: reference <- mixup * policy + (1 - mixup) * reference.

        Gorbatovski et al. 2024, arXiv:2404.09656.
        """
        with torch.no_grad():
            for mine, its in zip(self.policy.model.parameters(), policy.model.parameters(), strict=True):
                mine.lerp_(its.to(mine.dtype), mixup)


class AdapterOff:
    """The policy's own base model, with the adapter switched off or at the state it started in."""

    def __init__(self, policy: Policy, budget: Budget) -> None:
        if not is_adapted(policy.model):
            raise ValueError("reference: adapter needs lora_rank or an adapter directory; use reference: cache")
        self.policy, self.budget = policy, budget

    def __call__(self, batch: Batch) -> Tensor:
        """[K] nats."""
        with at_start(self.policy.model):
            return score(self.policy, batch, self.budget)


class Cached:
    """Log-probs computed once and kept on disk, one file per pass, in a folder named after the weights.

    An entry is found by its token ids, so a change of template, truncation or data is a miss, and a change of any
    weight, of the precision or of the model's configuration is another folder. Corrupt files are skipped and
    computed again.
    """

    def __init__(self, policy: Policy, folder: Path) -> None:
        self.policy: Policy | None = policy
        self.folder = folder / weights_key(policy.model)
        self.known: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.npz")):
            self._read(path)

    def release(self) -> None:
        """Let go of the model: from here on only rows that were filled can be asked for."""
        self.policy = None

    def __call__(self, batch: Batch) -> Tensor:
        """[K] nats. KeyError for a row that `fill` has not seen."""
        return torch.from_numpy(np.concatenate([self.known[key] for key in keys(batch)])).to(batch.trained.device)

    def fill(
        self, examples: Sequence[Example], budget: Budget, progress: Callable[[int], None] = lambda n: None
    ) -> int:
        """Compute what is missing, with the policy as it is now, shared out over the processes; returns how many
        rows.
        """
        self.known = ranks.from_main(self.known)  # every process must miss the same rows
        missing = [e for e in examples if any(key not in self.known for key in keys(Batch.of([e])))]
        missing.sort(key=lambda example: example.num_tokens)  # short with short: passes of equal size
        share = missing[ranks.rank() :: ranks.world()]
        found: dict[bytes, np.ndarray] = {}
        while ranks.all_max(len(share)):  # a sharded model needs every process in every pass
            size, total = 0, 0
            while size < len(share) and (not size or total + share[size].num_tokens <= budget.tokens):
                total, size = total + share[size].num_tokens, size + 1
            found |= self._compute(share[:size] or missing[:1], budget)
            share = share[size:]
            progress(size * ranks.world())
        everyone = ranks.gather(found)
        for one in everyone:
            self.known |= one
        if missing and ranks.is_main():
            self._write({key: value for one in everyone for key, value in one.items()})
        return len(missing)

    def _compute(self, examples: list[Example], budget: Budget) -> dict[bytes, np.ndarray]:
        batch, policy = Batch.of(examples), self.policy
        if policy is None:
            raise RuntimeError("this cache was released; rows it has not seen cannot be computed")
        with at_start(policy.model):
            logp = score(policy, batch, budget).cpu()
        if not torch.isfinite(logp).all():
            raise InputError("the reference gives log-probs that are not finite; try dtype: float32")
        rows = logp.split(batch.completions.lengths.tolist())
        return {key: row.numpy() for key, row in zip(keys(batch), rows, strict=True)}

    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                names, lengths, logp = file["keys"], file["lengths"], file["logp"]
            if lengths.sum() != len(logp) or len(names) != len(lengths):
                raise ValueError("sizes disagree")
        except Exception as error:  # a damaged archive fails in a dozen ways, and none may stop a run
            log.warning("%s: not a readable reference cache (%s); its rows are computed again", path, error)
            return
        rows = np.split(logp, np.cumsum(lengths)[:-1])
        self.known |= {name.tobytes(): row for name, row in zip(names, rows, strict=True)}

    def _write(self, found: dict[bytes, np.ndarray]) -> None:
        names = b"".join(found)
        path = self.folder / f"{xxhash.xxh3_128_hexdigest(names)}.npz"
        temporary = path.with_suffix(f".tmp{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                np.savez(
                    file,
                    keys=np.frombuffer(names, dtype=np.uint8).reshape(-1, 16),
                    lengths=np.array([len(row) for row in found.values()], dtype=np.int64),
                    logp=np.concatenate(list(found.values())),
                )
            os.replace(temporary, path)
        except OSError as error:
            log.warning("%s: the reference cache cannot be written (%s); training goes on without it", path, error)


def keys(batch: Batch) -> list[bytes]:
    """A 16-byte name for each completion, from the token ids of its prompt and its own, [N]."""
    prompts = [row.cpu().numpy().tobytes() for row in batch.prompts.rows()]
    names = []
    for g, row in zip(batch.group.tolist(), batch.completions.rows(), strict=True):
        digest = xxhash.xxh3_128(len(prompts[g]).to_bytes(8, "little"))
        digest.update(prompts[g])
        digest.update(row.cpu().numpy().tobytes())
        names.append(digest.digest())
    return names


def weights_key(model: Any) -> str:
    """Hash of everything that decides a log-prob besides the tokens: weights, their precision, configuration.

    The adapter that is being trained is left out, so the name holds through a run: a new one starts as a no-op, and a
    continued one counts by its frozen start.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not (is_adapted(model) and "default" in name.split(".")):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(_settings(model.config.to_dict()))
    if is_adapted(model) and START in model.peft_config:
        digest.update(_settings(model.peft_config[START].to_dict()))  # its scale is not in its weights
    return str(digest.hexdigest())


UNRELATED = {
    "_attn_implementation",
    "_name_or_path",
    "base_model_name_or_path",
    "dtype",  # the tensors carry theirs
    "inference_mode",
    "peft_version",
    "transformers_version",
    "use_cache",
}


def _settings(config: dict[str, Any]) -> bytes:
    """A configuration without what cannot move a log-prob, in a fixed order."""
    related = {name: value for name, value in config.items() if name not in UNRELATED}

    def spell(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    return json.dumps(related, sort_keys=True, default=spell).encode()


def cache_folder(options: ReferenceOptions) -> Path:
    chosen = options.cache_dir or os.environ.get("PREFOPT_CACHE") or "~/.cache/prefopt"
    return Path(chosen).expanduser() / "reference"


def pick(
    options: ReferenceOptions, policy: Policy, budget: Budget, other: Policy | None = None, live: bool = False
) -> tuple[Copied | AdapterOff | Cached, str]:
    """The reference for a run on a fixed data set, and in words which and why. other: the policy of
    `reference_model`. live: it will be asked about texts that are in no row, so a cache cannot serve.
    """
    where: str = options.reference
    if where == "auto" and options.reference_sync_steps:
        where = "copy"
    if where == "auto" and live:
        where = "adapter" if is_adapted(policy.model) and other is None else "copy"
    if where == "copy":
        return (Copied(other, budget) if other else Copied.of(policy, budget)), "a frozen copy in memory"
    if where == "adapter":
        if other is not None:
            raise ValueError("reference: adapter contradicts reference_model; use reference: cache or copy")
        return AdapterOff(policy, budget), "this model with its adapter off or at its start"
    cached = Cached(other or policy, cache_folder(options))
    reason = "log-probs cached on disk: one pass in all, no second copy of the weights"
    return cached, f"{reason} ({cached.folder})"
