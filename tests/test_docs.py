"""The documentation says what the program does: its commands, options, links, examples and metrics are the code's."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from laws import save_model

from prefopt import catalogue, cli, config, metrics
from prefopt.commands import advise, audit, doctor, estimate, sample, score
from prefopt.data import load
from prefopt.data.shapes import KNOWN, SHAPES
from prefopt.objectives import EVERY
from prefopt.records import InputError

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(PAGES[page]) if found == language]


def inline(page: str) -> list[str]:
    """What stands in backticks outside fenced blocks."""
    return CODE.findall(FENCE.sub("", PAGES[page]))


def sections(objective: str) -> dict[str, str]:
    return config.sections(objective)


# ---------------------------------------------------------------- commands


def commands(page: str) -> Iterator[list[str]]:
    """The words after `prefopt` of every command line in a page's shell blocks and backticks."""
    lines = [line for body in blocks(page, "sh") for line in body.splitlines()]
    for line in [*lines, *inline(page)]:
        words = shlex.split(line, comments=True) if "prefopt" in line else []
        starts = [n for n, word in enumerate(words) if word == "prefopt" and (n == 0 or words[n - 1] == "-m")]
        if starts:
            yield [word for word in words[starts[0] + 1 :] if word != "..."]


def check_command(words: list[str], folder: Path) -> None:
    """AssertionError unless the command is one: its flags and options exist and their values are of the right type."""
    if words and words[0] == "train" and len(words) > 1 and "--help" not in words:
        first = words[1]
        if first == "--resume":
            (folder / "config.yaml").write_text("objective: dpo\nmodel: m\ndata: d\nout: o\n", encoding="utf-8")
            words = ["train", "--resume", str(folder), *words[3:]]
        elif first.endswith((".yaml", ".yml")):
            recipe = folder / "recipe.yaml"
            recipe.write_text("objective: dpo\nmodel: m\ndata: d\nout: o\n", encoding="utf-8")
            words = ["train", str(recipe), *words[2:]]
        else:
            given = {flag: flag in words for flag in ("--model", "--data", "--out")}
            words = [*words, *(part for flag, there in given.items() if not there for part in (flag, "x"))]
        assert cli.main([*words, "--print-config"]) == 0, words
    elif words and words[0] in ("sample", "score") and "--help" not in words:
        parser = sample.sample_parser() if words[0] == "sample" else score.score_parser()
        given_words = parser.read(words[1:])
        local = words[0] == "score" or given_words.sampler is None
        if words[0] == "sample":
            options = sample.sample_options(given_words, local)
            if given_words.kind:
                options["rows"].refuse_unread(given_words.kind)
        else:
            config.resolve(
                {name: config.SECTIONS[name] for name in ("model", "data")}, config.parse_overrides(given_words.words)
            )
        assert given_words.model or not local, words
        assert (getattr(given_words, "prompt", None) is None) != (given_words.data is None), words
    elif words and words[0] == "advise":
        given_words = advise.advise_parser().read(words[1:])
        known = {name: config.SECTIONS[name] for name in ("model", "data")}
        config.resolve(known, config.parse_overrides(given_words.words))
        assert given_words.data, words
    elif words and words[0] == "estimate":
        if words[1].endswith(".yaml"):
            recipe = folder / "recipe.yaml"
            recipe.write_text("objective: dpo\nmodel: m\ndata: d\nout: o\n", encoding="utf-8")
            words = ["estimate", str(recipe), *words[2:]]
        estimate.estimate_options(estimate.estimate_parser().read(words[1:]))
    elif words and words[0] == "audit":
        given_words = audit.audit_parser().read(words[1:])
        if not given_words.list:
            config.resolve(audit.SECTIONS, config.parse_overrides(audit.source_of(given_words.words)[1]))
    elif words and words[0] == "doctor":
        given_words = doctor.doctor_parser().read(words[1:])
        assert given_words.words, words
        config.parse_overrides(given_words.words[1:])
    elif words:
        assert cli.main([*words, "--help"] if words[0] == "quickstart" else words) == 0, words


@every_page
def test_every_command_is_one(page: str, tmp_path: Path) -> None:
    for words in commands(page):
        if words not in (["train"], ["audit"], ["sample"], ["score"], ["doctor"], ["advise"], ["estimate"]) and words[
            1:2
        ] != ["separation"]:  # the objective that is being added
            check_command(words, tmp_path)


def test_the_tour_has_the_commands_it_is_about() -> None:
    found = [words[0] for words in commands("README.md") if words]
    assert found.count("train") >= 6 and "sample" in found


@pytest.mark.parametrize(
    "words", [["train", "dpo", "betta=1"], ["train", "dpo", "--modle", "m"], ["train", "dpo", "beta=much"], ["chat"]]
)
def test_the_check_sees_a_command_that_is_none(words: list[str], tmp_path: Path) -> None:
    with pytest.raises((AssertionError, InputError)):
        check_command(words, tmp_path)


@every_page
def test_every_make_target_exists(page: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    lines = [line for body in blocks(page, "sh") for line in body.splitlines()]
    for line in [*lines, *inline(page)]:
        if line.startswith("make "):
            assert line.split()[1] in targets, line


# ---------------------------------------------------------------- options


def settings(page: str) -> Iterator[tuple[str, str]]:
    """Options with a value in backticks, `shard=true` and the like."""
    for text in inline(page):
        if text in ("name=value", "reference=True"):  # a form; a field of Facts
            continue
        if found := re.fullmatch(r"([a-z][a-z_0-9]*)=([^=\s]+)", text):
            yield found[1], found[2]


def accepts(objective: str, key: str, value: str) -> bool:
    """Whether a run with this objective, or without one `prefopt sample`, has the option and takes the value."""
    required = {"model": "m", "data": "d", "out": "o"} if objective else {}
    try:
        config.resolve(
            sections(objective) if objective else sample.SAMPLED, required, config.parse_overrides([f"{key}={value}"])
        )
    except InputError:
        return False
    return True


@every_page
def test_every_setting_is_of_an_option_and_its_type(page: str) -> None:
    for key, value in settings(page):
        assert any(accepts(name, key, value) for name in [*EVERY, ""]), f"{key}={value}"


@every_page
def test_every_name_with_an_underscore_is_known(page: str) -> None:
    """An option, a column, or a name of the source: a renamed one is noticed."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "prefopt").rglob("*.py")))
    options = {option.key for name in EVERY for option in config.describe(sections(name))}
    for text in inline(page):
        if re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", text):
            assert text in options | KNOWN or re.search(rf"\b{text}\b", source), text


def test_every_option_is_explained() -> None:
    named = {word for page in PAGES for text in inline(page) for word in re.findall(r"\w+", text)}
    options = {option.key for name in EVERY for option in config.describe(sections(name))}
    options |= {option.key for option in config.describe(sample.SAMPLED)}
    assert options - named == set(), "explain these in docs/"


def test_the_recipe_of_the_training_page_is_one() -> None:
    (body,) = blocks("docs/training.md", "yaml")
    values = yaml.load(body, config.Loader)
    config.resolve(sections(values.pop("objective")), values)


def test_the_preflight_messages_are_those_of_the_source() -> None:
    source = (ROOT / "prefopt" / "preflight.py").read_text(encoding="utf-8")
    table = PAGES["docs/training.md"].partition("## Preflight")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(messages) == source.count("raise PreflightError")
    for message in messages:
        assert message.strip(". ") in source, message


def test_every_objective_has_its_section() -> None:
    for cls in EVERY.values():
        assert f"## {cls.facts.name.upper()}\n" in PAGES["docs/objectives.md"]


# ---------------------------------------------------------------- links and paths


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[page])):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), target
        assert not anchor or anchor in slugs(path.read_text(encoding="utf-8")), target


@every_page
def test_every_path_exists(page: str) -> None:
    written = {"benchmarks/results/dpo.json", "prefopt/objectives/separation.py", "tests/objectives/test_separation.py"}
    for text in inline(page):
        if re.fullmatch(r"(prefopt|tests|docs|benchmarks)/[\w/.]+", text) and text not in written:
            assert (ROOT / text).exists(), text


# ---------------------------------------------------------------- data and metrics


def examples() -> Iterator[tuple[str, str]]:
    """The convention that a heading names, and each block of rows under it."""
    for section in PAGES["docs/data.md"].split("\n### ")[1:]:
        heading = section.splitlines()[0]
        for language, body in FENCE.findall(section):
            if language == "jsonl":
                yield heading, body


def test_every_convention_has_an_example() -> None:
    assert {heading for heading, _ in examples()} == {shape.name for shape in SHAPES}


def chat_tokenizer() -> Any:
    """A token a byte, so that texts that differ have tokens that differ, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytewise = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    return tokenizer


@pytest.mark.parametrize(("heading", "body"), [pytest.param(*pair, id=pair[0]) for pair in examples()])
def test_every_example_is_read_as_what_its_heading_says(heading: str, body: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(body, encoding="utf-8")
    kind = next(shape.kind for shape in SHAPES if shape.name == heading)
    for wanted in ("pairs", "ratings") if kind == "ratings" else (kind,):
        dataset = load(file, chat_tokenizer(), wanted)  # type: ignore[arg-type]
        assert dataset.shape.split(",")[0].startswith(heading)
        assert len(dataset) >= len(body.splitlines()) >= 2 and not dataset.dropped


# ---------------------------------------------------------------- generated parts


def generator() -> Any:
    """docs/generate.py as a module."""
    found = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@every_page
def test_generated_parts_say_what_the_source_says(page: str) -> None:
    assert generator().written(PAGES[page]) == PAGES[page], f"{page} is behind the source; run `make docs`"


def test_every_part_that_is_generated_is_on_a_page() -> None:
    parts = [found[1] for page in PAGES.values() for found in generator().PART.finditer(page)]
    assert sorted(parts) == sorted(generator().PARTS)


def test_a_page_behind_the_source_is_seen() -> None:
    page = generator().written(PAGES["docs/metrics.md"])
    behind = page.replace("| `nll` |", "| `nil` |")
    assert behind != page == generator().written(behind)


def test_plain_text_stays_plain_text_on_a_page() -> None:
    said = generator().prose("a * b * c is < d, `x*y < z`, arXiv:2305.18290 eq. 7")
    expected = r"a \* b \* c is &lt; d, `x*y < z`, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290) eq. 7"
    assert said == expected and generator().row(["|r|", "b"]) == r"| \|r\| | b |"


# ---------------------------------------------------------------- Python


@every_page
def test_python_blocks_compile(page: str) -> None:
    for body in blocks(page, "python"):
        # an entry of a table stands in its braces
        compile("{" + body + "}" if body.startswith('"') and not body.startswith('"""') else body, page, "exec")


def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_model(tmp_path / "tiny")
    words = [("good", "bad"), ("one", "two"), ("yes", "no"), ("cat", "dog"), ("red", "blue"), ("here", "there")]
    pairs = [{"prompt": f"{a} cat :", "chosen": f" {a} {b}", "rejected": f" {b}"} for a, b in words]
    demonstrations = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    for name, rows in (("pairs", pairs), ("demonstrations", demonstrations)):
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (body,) = blocks("README.md", "python")
    seen: dict[str, Any] = {}
    exec(body.replace('"Qwen/Qwen2.5-0.5B-Instruct"', repr(str(folder))), seen)
    assert seen["dpo"].summary["start"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert (tmp_path / "runs/dpo/model/config.json").is_file()


# ---------------------------------------------------------------- the objective that CONTRIBUTING adds


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example objective, made from the page as a module, its metric registered."""
    file, metric = blocks("CONTRIBUTING.md", "python")
    module = types.ModuleType("prefopt.objectives.separation")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(file, module.__name__, "exec"), module.__dict__)
    new: dict[str, Any] = eval("{" + metric.strip() + "}", {"Metric": metrics.Metric})
    monkeypatch.setattr(metrics, "METRICS", {**metrics.METRICS, **new})
    return module.__dict__["Separation"]()


def test_the_example_objective_passes_the_laws(added: Any) -> None:
    import test_laws

    for name, law in vars(test_laws).items():
        if not name.startswith("test_"):
            continue
        cases: list[dict[str, Any]] = [{}]
        for mark in law.pytestmark:
            if mark.args[0] != "objective":
                cases = [{**case, mark.args[0]: value} for case in cases for value in mark.args[1]]
        for case in cases:
            law(objective=added, **case)


def test_the_example_objective_says_all_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_catalogue import missing

    folder = tmp_path / "prefopt" / "objectives"
    folder.mkdir(parents=True)
    facts = (config.PACKAGE / "objectives" / "facts.py").read_text(encoding="utf-8")
    (folder / "facts.py").write_text(facts, encoding="utf-8")
    (folder / "separation.py").write_text(blocks("CONTRIBUTING.md", "python")[0], encoding="utf-8")
    monkeypatch.setattr(config, "PACKAGE", folder.parent)
    monkeypatch.setattr(config, "objectives", config.objectives.__wrapped__)
    assert missing(catalogue.objective("separation")) == []
