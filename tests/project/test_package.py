"""The package as it is installed: what the wheel holds, and what importing it loads."""

import json
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = (
    "pytorch_lightning",
    "lightning",
    "hydra",
    "omegaconf",
    "h5py",
    "torchmetrics",
    "wandb",
    "torchdiffeq",
    "PIL",
    "matplotlib",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from this checkout, unpacked."""
    for name in ("build", "hatchling"):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed (the dev extra has it)")
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--wheel", "--no-isolation", "--outdir", str(folder)]
    # Started elsewhere: a folder named build/ in the checkout would be taken for the module.
    run([sys.executable, "-m", "build", *options, str(ROOT)], cwd=folder)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def run(command: list[str], cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def in_isolation(code: str, package: Path, cwd: Path) -> str:
    """Run ``code`` with ``package`` first in the path, without cwd and environment variables."""
    prologue = f"import sys; sys.path.insert(0, {str(package)!r}); "
    return run([sys.executable, "-I", "-c", prologue + code], cwd=cwd).strip()


def test_the_wheel_holds_the_package_with_its_types_and_data(wheel):
    for name in (
        "__init__.py",
        "py.typed",
        "data/digits.h5",
        "data/sources.toml",
        "data/README.md",
    ):
        assert (wheel / "fastdeq" / name).is_file(), name


def test_the_wheel_holds_nothing_but_the_package(wheel):
    assert sorted(path.name for path in wheel.iterdir()) == ["fastdeq", "fastdeq-0.1.0.dist-info"]
    assert not list(wheel.rglob("__pycache__"))


def test_the_wheel_says_its_licence(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    assert "License-Expression: MIT" in metadata.read_text(encoding="utf-8")
    assert list(wheel.glob("*.dist-info/licenses/LICENSE"))


def test_the_wheel_requires_torch_alone(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra" not in line]
    assert [re.split(r"[^\w-]", line.split(": ")[1])[0] for line in required] == ["torch"]


def test_the_wheel_has_the_command(wheel):
    (scripts,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "fastdeq = fastdeq.cli:main" in scripts.read_text(encoding="utf-8")


def test_the_wheel_is_imported_from_where_it_was_unpacked(wheel, tmp_path):
    code = "import fastdeq; print(fastdeq.__file__)"
    assert in_isolation(code, wheel, tmp_path) == str(wheel / "fastdeq" / "__init__.py")


@pytest.mark.slow
def test_the_data_of_the_wheel_are_readable(wheel, tmp_path):
    pytest.importorskip("pytorch_lightning")
    code = "from fastdeq.data import read_digits; print(len(read_digits().train_labels))"
    assert in_isolation(code, wheel, tmp_path) == "1437"


def test_the_wheel_holds_the_configuration(wheel):
    def names(conf: Path) -> set[Path]:
        return {path.relative_to(conf) for path in conf.rglob("*.yaml")}

    assert names(wheel / "fastdeq" / "conf") == names(ROOT / "conf")


@pytest.mark.slow
def test_a_model_is_trained_from_the_wheel_alone(wheel, tmp_path):
    pytest.importorskip("pytorch_lightning")
    words = ["train", "trainer=one_batch", "trainer.accelerator=cpu", "model=skip_deq"]
    code = f"sys.argv = ['fastdeq']; from fastdeq.cli import main; main({words})"
    printed = in_isolation(code, wheel, tmp_path)
    (summary,) = tmp_path.glob("outputs/digits/*/*/summary.json")
    assert f"see {summary.parent.relative_to(tmp_path)}" in printed
    assert json.loads(summary.read_text())["command"] == f"fastdeq {' '.join(words)}"


def test_importing_fastdeq_loads_none_of_the_extras_and_torch_with_its_first_name(tmp_path):
    found = f"print([name for name in {EXTRAS} if name in sys.modules])"
    code = f"import fastdeq; print('torch' in sys.modules); from fastdeq import *; nn; {found}"
    assert in_isolation(code, ROOT, tmp_path).split("\n") == ["False", "[]"]


def test_a_public_function_is_not_hidden_by_a_module_of_its_name(tmp_path):
    code = "import fastdeq.nn; print([callable(fastdeq.fixed_point), callable(fastdeq.gmres)])"
    assert in_isolation(code, ROOT, tmp_path) == "[True, True]"
