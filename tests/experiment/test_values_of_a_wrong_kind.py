"""Values of a wrong kind, for all keys: refused in one line that names the key, or taken."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fastdeq.experiment.arguments import check_node
from fastdeq.experiment.checks import check_values
from fastdeq.experiment.explain import explain
from fastdeq.experiment.run import check
from tests.configurations import composed

pytestmark = pytest.mark.slow

CONFIGURATIONS = (
    ("model=skip_deq", "trainer.accelerator=cpu"),
    ("experiment=polynomial_fitting", "trainer.accelerator=cpu", "optimizer=sgd"),
    ("model=explicit", "trainer=ddp_cpu", "logger=tensorboard", "scheduler=cosine"),
    ("experiment=mnist_fc", "solver=tsit5", "trainer.accelerator=cpu"),
    ("experiment=cifar10_tiny", "model=skip_mdeq", "adjoint=implicit_fixed_point"),
    ("data=image_folder", "scheduler=staircase", "solver=anderson"),
)
BUILT = 2
"""As many of them, the first, can be built here in no time."""

VALUES: tuple[Any, ...] = ("tpyo", "", -7, None, [1, 2], {"a": 1}, 10**30, 2.5, True)
MUTATIONS = 240


def keys_of(node: Any, key: str = "") -> Iterator[str]:
    """All keys of a configuration as they are typed, those of its containers too."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        if "." in str(name):  # cannot be typed
            continue
        below = f"{key}.{name}".lstrip(".")
        yield below
        if isinstance(value, dict | list):
            yield from keys_of(value, below)


def with_value(cfg: DictConfig, key: str, value: Any) -> DictConfig:
    """A copy of the configuration, as if KEY=VALUE had been typed; composing takes far longer."""
    changed = copy.deepcopy(cfg)
    OmegaConf.update(changed, key, value, merge=False)
    HydraConfig.get().overrides.task = [f"{key}={value}".replace(": ", ":").replace("'", "")]
    return changed


def answer(function: Any, cfg: DictConfig) -> str | None:
    """The line that a refusal prints, None where there is none."""
    try:
        function(cfg)
    except Exception as error:
        return explain(error)
    return None


@pytest.mark.parametrize("place", range(len(CONFIGURATIONS)))
def test_a_wrong_value_of_any_key_is_refused_by_its_name_before_anything_is_written(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cfg = composed(*CONFIGURATIONS[place])
    hydra: Any = HydraConfig.get()
    OmegaConf.set_readonly(hydra, False)  # for the overrides of each mutation
    assert answer(check if place < BUILT else check_values, copy.deepcopy(cfg)) is None
    keys = [key for key in keys_of(OmegaConf.to_container(cfg)) if key not in hydra.runtime.choices]
    draws = random.Random(place)
    refused = 0
    for _ in range(MUTATIONS // len(CONFIGURATIONS)):
        key, value = draws.choice(keys), draws.choice(VALUES)
        changed = with_value(cfg, key, value)
        line = answer(check_values, changed)
        if line is None and place < BUILT:
            line = answer(check, changed)
        if line is not None:
            refused += 1
            named = key if key in line else re.sub(r"(\.\d+)+$", "", key)  # of a list: all of it
            assert re.search(rf"(?<![\w.]){re.escape(named)}(?!\w)", line), f"{key}={value}: {line}"
            assert "\n" not in line
            assert "Traceback" not in line
    assert refused > MUTATIONS // len(CONFIGURATIONS) // 2
    assert not [path for path in tmp_path.rglob("*") if "cache" not in path.parts]


def test_a_task_that_is_not_a_mapping_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = composed(*CONFIGURATIONS[0])
    hydra: Any = HydraConfig.get()
    OmegaConf.set_readonly(hydra, False)  # for the overrides of each mutation
    for value in ([1, 2], "model", 3):
        changed = with_value(cfg, "task", value)
        line = answer(check_values, changed)
        assert (
            line == f"task is {value}, but must be a mapping: set its keys, such as task._target_"
        )


class Base:
    """Declares what its heir hands on."""

    def __init__(self, sizes: list[int], scale: float = 1.0) -> None:
        self.sizes, self.scale = sizes, scale


class Heir(Base):
    """Takes anything, as PayloadDDPStrategy does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)


def refusal(node: dict[str, Any], hint: Any = Any) -> str | None:
    """Of the node under the key `part`, in a configuration with some other keys."""
    cfg = OmegaConf.create({"part": node, "width": "abc", "deep": {"width": "${width}"}})
    return answer(lambda cfg: check_node(cfg._get_node("part"), "part", hint), cfg)


BASE, HEIR = f"{__name__}.Base", f"{__name__}.Heir"


CASES: dict[str | None, tuple[tuple[dict[str, Any], Any], ...]] = {
    None: (
        ({"_target_": BASE, "sizes": [1, 2], "scale": 2}, Base),
        ({"_target_": HEIR, "sizes": [1]}, Base),
        ({"_target_": BASE, "_partial_": True}, Callable[..., Base]),
        ({"_target_": BASE, "_args_": [[1], 2.0]}, Base),
        ({"_target_": "builtins.int"}, float),
    ),
    "part.sizes is missing, which Base needs": (({"_target_": BASE, "scale": 2}, Base),),
    "part._args_.1 is 'a', but must be a number": (
        ({"_target_": BASE, "_args_": [[1], "a"]}, Base),
    ),
    "part.sizes is '12', but must be a list, each a whole number": (
        ({"_target_": HEIR, "sizes": "12"}, Base),
    ),
    "width is 'abc', but must be a whole number": (
        ({"_target_": BASE, "sizes": [1, "${deep.width}"]}, Base),
    ),
    "there is no key 'part.scal'; did you mean 'part.scale'?": (
        ({"_target_": BASE, "sizes": [], "scal": 2}, Base),
    ),
    f"part is {BASE}, but must be a number": (({"_target_": BASE, "sizes": []}, float),),
    f"part is {BASE}, but must be a Path": (({"_target_": BASE, "sizes": []}, Path),),
    f"part is {BASE}, but must be a partial call (_partial_: true)": (
        ({"_target_": BASE, "sizes": []}, Callable[..., Base]),
    ),
    "part.b is {'c': 1}, but must be text": (({"a": "x", "b": {"c": 1}}, dict[str, str]),),
}


def test_annotations_say_what_a_value_must_be_and_the_line_where_it_stands() -> None:
    for line, cases in CASES.items():
        for node, hint in cases:
            assert refusal(node, hint) == line
