"""What this machine has: memory that is free, and how fast it multiplies and reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Speed(NamedTuple):
    """products: floating-point operations a second of a large matrix product. reading: bytes a second."""

    products: float
    reading: float


def free_memory() -> int | None:
    """Bytes that a process may still take: what the system says is available, or a container's limit if that is less.

    None where neither can be read.
    """
    found = [value for value in (_available(Path("/proc/meminfo")), *map(_limit, LIMITS)) if value is not None]
    return min(found, default=None)


def _available(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kilobytes[0]) * 1024 if kilobytes else None


def _limit(path: str) -> int | None:
    """A control group's limit less what it uses now; None without one."""
    try:
        text = Path(path).read_text(encoding="ascii").strip()
        used = Path(path).with_name("memory.current")
        now = int(used.read_text(encoding="ascii")) if used.exists() else 0
        return int(text) - now if text.isdigit() else None
    except (OSError, ValueError):
        return None


def device_memory() -> tuple[str, int | None]:
    """The device that a run here would use, and the bytes free on it."""
    import torch

    if torch.cuda.is_available():
        return "cuda", int(torch.cuda.mem_get_info()[0])
    return "cpu", free_memory()


def speed(dtype: str, device: str, size: int = 1024) -> Speed:
    """Measured now, best of a few: a square matrix product, and a sum over what no cache holds. A second or less."""
    import torch

    size = 8192 if device == "cuda" else size
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    b = torch.ones(2**26, device=device, dtype=torch.float32)  # 256 MiB
    products = min(_timed(lambda: a @ a, device) for _ in range(5))
    reading = min(_timed(b.sum, device) for _ in range(3))
    return Speed(2 * size**3 / products, b.numel() * 4 / reading)


def _timed(work: object, device: str) -> float:
    import torch

    began = time.perf_counter()
    work()  # type: ignore[operator]
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
