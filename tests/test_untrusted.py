"""What comes from elsewhere is data: no pickle runs, no archive is unpacked, no model brings code unless asked for."""

from __future__ import annotations

import ast
import io
import os
import pickle
import shlex
import stat
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laws import save_model, write_rows

import prefopt
from prefopt.data import read
from prefopt.models.adapters import LoraOptions, adapt, attached
from prefopt.models.load import load
from prefopt.models.pickles import conversion, no_pickles
from prefopt.records import InputError

PACKAGE = Path(prefopt.__file__).parent
FAST: dict[str, Any] = {"batch_size": 4, "max_steps": 2, "eval_fraction": 0.25, "dtype": "float32"}


class Planted:
    """A pickle of this makes a file where it is read."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sign),)


def plant(path: Path, sign: Path) -> None:
    path.write_bytes(pickle.dumps(Planted(sign)))


@pytest.fixture
def sign(tmp_path: Path) -> Any:
    """Where a pickle that ran has left something."""
    yield tmp_path / "ran"
    assert not (tmp_path / "ran").exists(), "a planted pickle ran"


def test_a_planted_pickle_runs_where_it_is_read(tmp_path: Path) -> None:
    plant(tmp_path / "x.pkl", tmp_path / "ran")
    pickle.loads((tmp_path / "x.pkl").read_bytes())
    assert (tmp_path / "ran").exists()


# ---------------------------------------------------------------- weights


def as_pickle(folder: Path, name: str) -> None:
    """The folder's weights as an honest pickle in place of safetensors."""
    from safetensors.torch import load_file

    [whole] = folder.glob("*.safetensors")
    torch.save(load_file(whole), folder / name)
    whole.unlink()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_a_model_whose_weights_are_a_pickle_is_refused(name: str, tmp_path: Path, sign: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    plant(folder / name, sign)
    with pytest.raises(InputError, match=f"its weights are a pickle .{name}.*write them as safetensors first: python"):
        load(folder)


def test_a_pickle_beside_safetensors_is_not_read(tmp_path: Path, sign: Path) -> None:
    folder = save_model(tmp_path / "model")
    plant(folder / "pytorch_model.bin", sign)
    plant(folder / "training_args.bin", sign)
    load(folder)


def test_a_configuration_cannot_ask_for_the_pickle(tmp_path: Path, sign: Path) -> None:
    import json

    folder = save_model(tmp_path / "model")
    plant(folder / "pytorch_model.bin", sign)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "transformers_weights": "pytorch_model.bin"}))
    with pytest.raises(InputError):
        load(folder)


def test_libraries_that_fall_back_to_a_pickle_are_stopped(tmp_path: Path, sign: Path) -> None:
    plant(tmp_path / "x.bin", sign)
    with pytest.raises(InputError, match="a model: some of its weights are a pickle"), no_pickles("a model"):
        torch.load(tmp_path / "x.bin", weights_only=False)
    torch.save({"x": torch.ones(1)}, tmp_path / "y.bin")
    assert torch.load(tmp_path / "y.bin")["x"] == 1  # only meanwhile


def code_of(command: str) -> str:
    """What a command gives to Python."""
    python, option, code = shlex.split(command)
    assert (python, option) == ("python", "-c")
    return code


def test_the_command_of_the_error_converts_a_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    before = load(folder).model.state_dict()
    as_pickle(folder, "pytorch_model.bin")
    exec(code_of(conversion(folder)), {})
    after = load(folder).model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def adapter(tmp_path: Path) -> tuple[Any, Path]:
    base = load(save_model(tmp_path / "model")).model
    adapt(base, LoraOptions(lora_rank=2)).save_pretrained(tmp_path / "adapter")
    return load(tmp_path / "model").model, tmp_path / "adapter"


def test_an_adapter_whose_weights_are_a_pickle_is_refused(tmp_path: Path, sign: Path) -> None:
    base, folder = adapter(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    plant(folder / "adapter_model.bin", sign)
    for read_it in (lambda: attached(base, folder), lambda: load(folder)):
        with pytest.raises(InputError, match=r"its weights are a pickle .adapter_model.bin"):
            read_it()


def test_the_command_of_the_error_converts_an_adapter(tmp_path: Path) -> None:
    base, folder = adapter(tmp_path)
    as_pickle(folder, "adapter_model.bin")
    exec(code_of(conversion(folder)), {})
    attached(base, folder)


def test_a_reward_model_whose_weights_are_a_pickle_is_refused(tmp_path: Path, sign: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    plant(folder / "pytorch_model.bin", sign)
    with pytest.raises(InputError, match="AutoModelForSequenceClassification"):
        load(folder, head="completion")


def test_code_that_comes_with_a_model_runs_only_where_that_is_asked_for(tmp_path: Path, sign: Path) -> None:
    import json

    folder = save_model(tmp_path / "model")
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(sign)!r})\n")
    settings = json.loads((folder / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (folder / "config.json").write_text(json.dumps({**settings, **own}))
    with pytest.raises(InputError):
        load(folder)


# ---------------------------------------------------------------- a run's own files


def trained(tmp_path: Path, **options: Any) -> Path:
    model, data = save_model(tmp_path / "model"), write_rows(tmp_path / "pairs.jsonl", "pairs")
    prefopt.train(objective=prefopt.DPO(), model=model, data=data, out=tmp_path / "run", **{**FAST, **options})
    return tmp_path / "run"


def test_pickles_in_checkpoints_caches_and_the_run_are_not_read(
    tmp_path: Path, sign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("PREFOPT_CACHE", str(cache))

    class Stop(Exception):
        pass

    def stop(*given: Any, **named: Any) -> None:
        raise Stop

    with monkeypatch.context() as cut:
        cut.setattr("prefopt.recipes.train.save", stop)
        with pytest.raises(Stop):
            trained(tmp_path, save_every=1)
    [first, *_] = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    for folder in (tmp_path / "run", first.parent, first):
        for name in ("optimizer.pt", "rng_state.pth", "rank-0.pkl", "pytorch_model.bin"):
            plant(folder / name, sign)
    entries = [path.parent for path in cache.rglob("*.npz")]
    assert entries, "no reference cache was written"
    plant(entries[0] / "planted.npz", sign)
    with (entries[0] / "objects.npz").open("wb") as file:
        np.savez(file, keys=np.array([Planted(sign)], dtype=object), lengths=np.ones(1), logp=np.ones(1))
    assert (trained(tmp_path, save_every=1) / "summary.json").exists()


def test_whatever_the_umask_a_runs_files_are_not_everybodys_to_change(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        out = trained(tmp_path)
        assert os.umask(0) == 0, "the umask is not as it was"
    finally:
        os.umask(before)
    found = [out, *out.rglob("*")]
    assert len(found) > 5
    assert not [path for path in found if path.stat().st_mode & stat.S_IWOTH]


# ---------------------------------------------------------------- data


def archives(folder: Path) -> list[Path]:
    """An archive of each kind with an entry that points outside."""
    row = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    with zipfile.ZipFile(folder / "rows.zip", "w") as file:
        file.writestr("../escaped.jsonl", row)
    for name in ("rows.tar", "rows.tar.gz", "rows.tgz"):
        with tarfile.open(folder / name, "w:gz" if "gz" in name else "w") as made:
            entry = tarfile.TarInfo("../escaped.jsonl")
            entry.size = len(row)
            made.addfile(entry, io.BytesIO(row))
    return sorted(folder.iterdir())


def test_no_archive_is_read_as_data(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for path in archives(tmp_path / "rows"):
        with pytest.raises(InputError, match=r"unknown suffix .*; known: \.jsonl"):
            list(read.read(path))
    with pytest.raises(InputError, match="no data file"):
        list(read.read(tmp_path / "rows"))
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_an_archive_under_the_name_of_data_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    tar, zipped = archives(tmp_path / "rows")[1], archives(tmp_path / "rows")[-1]
    (tmp_path / name).write_bytes((tar if name.endswith(".gz") else zipped).read_bytes())
    try:
        found = list(read.read(tmp_path / name))
    except InputError:
        found = []
    assert all(isinstance(one, InputError) for one in found)
    assert not list(tmp_path.rglob("escaped*"))


def test_a_pickle_in_the_folder_of_the_data_is_not_read(tmp_path: Path, sign: Path) -> None:
    (tmp_path / "rows").mkdir()
    plant(tmp_path / "rows" / "train.pkl", sign)
    with pytest.raises(InputError, match="no data file"):
        list(read.read(tmp_path / "rows"))
    write_rows(tmp_path / "rows" / "train.jsonl", "pairs")
    assert list(read.read(tmp_path / "rows"))
    with pytest.raises(InputError, match=r"unknown suffix \.pkl"):
        list(read.read(tmp_path / "rows" / "train.pkl"))


def test_a_recipe_makes_no_objects(tmp_path: Path, sign: Path) -> None:
    from prefopt import config

    (tmp_path / "recipe.yaml").write_text(f"objective: !!python/object/apply:os.mkdir [{sign}]\n")
    with pytest.raises(InputError, match=r"recipe\.yaml:1"):
        config.read_recipe(tmp_path / "recipe.yaml")
    assert config.read_value(f"!!python/object/apply:os.mkdir [{sign}]").startswith("!!python")


# ---------------------------------------------------------------- the source itself

# what can turn bytes or text into running code
CALLS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load"),
    *("dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open", "torch.load", "numpy.load"),
    *("np.load", "eval", "exec", "compile", "__import__", "runpy.run_path", "runpy.run_module", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "zipfile.ZipFile", "tarfile.open", "shutil.unpack_archive"),
}
METHODS = {"exec_module", "extractall", "read_pickle"}
ALLOWED = {
    ("rewards/worker.py", "pickle.loads"): "what the trainer itself sends to a reward's process",
    ("rewards/worker.py", "exec_module"): "a reward that the user names as file.py:function",
    ("recipes/trackers.py", "exec_module"): "a tracker that the user names as file.py:function",
    ("models/pickles.py", "torch.load"): "made to refuse while models are read",
    ("models/reference.py", "np.load"): "allow_pickle=False",
    ("config.py", "yaml.load"): "with a safe loader of its own",
    ("sandbox/zygote.py", "__import__"): "modules that programs may use, by a list of ours, in the sandbox",
    ("sandbox/inside.py", "exec"): "a program that is to be judged, in the sandbox",
    ("sandbox/inside.py", "compile"): "the same",
}


def risky(file: Path) -> set[str]:
    """The calls in a file that could run what they read."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        name = ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ""
        if name in CALLS or (isinstance(node, ast.Attribute) and node.attr in METHODS):
            found.add(name if name in CALLS else node.attr)  # type: ignore[attr-defined]
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= CALLS & {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_nothing_in_the_package_runs_what_it_reads_but_what_is_listed_here() -> None:
    found = {(str(file.relative_to(PACKAGE)), name) for file in PACKAGE.rglob("*.py") for name in risky(file)}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "allowed, and no longer there"


def test_the_search_finds_every_way_that_it_knows(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("from pickle import loads\nimport torch\ntorch.load('x')\nf = eval\nspec.loader.exec_module(m)\n")
    assert risky(file) == {"pickle.loads", "torch.load", "eval", "exec_module"}
