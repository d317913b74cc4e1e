"""Fuzz every target for so many seconds each: `python tests/fuzz/fuzz.py [SECONDS [TARGET ...]]`.

With atheris where it is installed, which follows what the code does with its input; else with hypothesis. What crashes
is kept in tests/fuzz/cases/TARGET, where the tests read it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = Path(__file__).parent / "cases"
LATEST = "latest"  # a file with the input that hypothesis is at; what is left of it has crashed
LONGEST = 20_000  # bytes of an input


def follow(name: str, seconds: int) -> None:
    """With atheris, which ends the process: so roughly where torch is loaded that it does not always keep the input."""
    import atheris

    with atheris.instrument_imports(include=["prefopt", "yaml", "json", "csv"]):
        from seeds import SEEDS, WORDS
        from targets import TARGETS
    for seed in SEEDS[name]:
        TARGETS[name](seed)  # imports what is imported late
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS[name]):
            Path(corpus, f"seed-{number}").write_bytes(seed)
        words = Path(corpus).with_suffix(".dict")
        escaped = ("".join(f"\\x{byte:02x}" for byte in word) for word in WORDS[name] if len(word) < 100)
        words.write_text("".join(f'"{word}"\n' for word in escaped))
        options = [
            f"-max_total_time={seconds}",
            f"-max_len={LONGEST}",
            f"-dict={words}",
            "-timeout=20",
            "-rss_limit_mb=4096",
        ]

        def kept(data: bytes) -> None:
            try:
                TARGETS[name](data)
            except BaseException:
                keep(name, data)
                raise

        atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={CASES / name}/", corpus], kept)
        atheris.Fuzz()


def keep(name: str, data: bytes) -> None:
    """Write an input that crashed to a file of its own, named as atheris names what it keeps."""
    (CASES / name / f"crash-{hashlib.sha1(data).hexdigest()}").write_bytes(data)


def search(name: str, seconds: int) -> None:
    """With hypothesis."""
    from hypothesis import HealthCheck, Phase, given, settings
    from targets import TARGETS
    from test_fuzz import inputs

    until, seen = time.monotonic() + seconds, 0
    phases = (Phase.generate, Phase.shrink)

    @settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=phases)
    @given(inputs(name))
    def fuzz(data: bytes) -> None:
        nonlocal seen
        seen += 1
        latest.write_bytes(data)
        TARGETS[name](data)
        latest.unlink()

    latest = CASES / name / LATEST
    while time.monotonic() < until:
        fuzz()
    print(f"{name}: {seen:,} inputs in {seconds} s, none crashed")


def main(words: list[str]) -> int:
    """Every target in a process of its own. Exit code: 1 where one crashed."""
    if words[:1] == ["--one"]:
        try:
            import atheris  # noqa: F401
        except ImportError:
            search(words[1], int(words[2]))
        else:
            follow(words[1], int(words[2]))
        return 0
    from targets import TARGETS

    seconds, failed = int(words[0]) if words else 600, []
    for name in words[1:] or TARGETS:
        (CASES / name).mkdir(parents=True, exist_ok=True)
        print(f"{name}: {seconds} s", flush=True)
        if subprocess.run([sys.executable, __file__, "--one", name, str(seconds)]).returncode:
            failed.append(name)
        latest = CASES / name / LATEST
        if latest.exists():
            keep(name, latest.read_bytes())
            latest.unlink()
        if not any((CASES / name).iterdir()):
            (CASES / name).rmdir()
    print(f"crashed: {', '.join(failed)}; see {CASES}" if failed else "nothing crashed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
