"""Overrides of earlier versions, and their replacements."""

from collections.abc import Sequence

from fastdeq.experiment.build import TASK

_GRID = "sweep=multiscale experiment={}"
_ONE_SCALE = "sweep=single_scale experiment={}"
_TASK = "task._target_=fastdeq.training.{}Task"
_RELEASE = " solver=lbroyden seed=6171,3859,2961"
_TSIT5 = "solver=tsit5 data.batch_size=64 data.eval_batch_size=64"

CHOICES = {
    "loss=plain": "loss.skip=0.0",
    "loss=skip": "",
    "logger=all": "logger=[tensorboard,wandb]",
    "augmentation=none": "augmentation=[]",
    "paths=default": "",
    "callbacks=default": "",
    **{f"task={name.lower()}": _TASK.format(name) for name in ("Classification", "Regression")},
    "trainer=default": "trainer=[]",
    "logger=csv": "logger=[]",
    "experiment=svhn_tsit5": f"experiment=svhn {_TSIT5}",
    "experiment=cifar10_mdeq_tsit5": f"experiment=cifar10_mdeq {_TSIT5}",
    **{f"sweep={name}": _GRID.format(name) for name in ("cifar10_tiny", "cifar10_large")},
    "sweep=mnist_fc": _ONE_SCALE.format("mnist_fc"),
    "sweep=polynomial_fitting": f"{_ONE_SCALE.format('polynomial_fitting')} seed=1,11,1111",
    "sweep=imagenet_small": _GRID.format("imagenet_small"),
    "sweep=mnist_mdeq": f"{_GRID.format('mnist_mdeq')} solver=lbroyden,tsit5 seed=6171,3859,2961",
    **{f"sweep={name}": _GRID.format(name) + _RELEASE for name in ("svhn", "cifar10_mdeq")},
}
"""Removed choices and their replacements; "": none."""

KEYS = {"skip_weight": "loss.skip", **{f"task.{name}": key for name, key in TASK.items()}}
"""Renamed keys; all keys below them are renamed too."""

GONE = ("reference", "arch_for/deq", "arch_for/mdeq")
"""Removed keys and groups without a replacement; they had no effect on the results of a run."""


def current(word: str) -> list[str]:
    """The current form of an override; one of this version is unchanged."""
    key, equals, value = word.partition("=")
    key = key.lstrip("+~")
    if word in CHOICES:
        return CHOICES[word].split()
    for old, new in KEYS.items():
        if equals and (key == old or key.startswith(f"{old}.")):
            return [f"{new}{key.removeprefix(old)}={value}"]
    return [] if key.split(".")[0] in GONE else [word]


def current_all(words: Sequence[str]) -> list[str]:
    """The current form of a saved run's overrides.

    Without a skip loss λ_skip had no effect. A job of a sweep has values in place of its lists.
    """
    weights = [word for word in words if "loss=plain" in words and word.startswith("skip_weight=")]
    return [
        new
        for word in words
        if word not in weights
        for new in current(word)
        if not (word.startswith("sweep=") and "," in new)
    ]


def check_renamed(words: Sequence[str]) -> None:
    """Raises: ValueError for an override of an earlier version, with its replacement."""
    for word in words:
        if (new := current(word)) != [word]:
            cure = f"write {' '.join(new)}" if new else "leave it out"
            raise ValueError(f"{word} is of an earlier version of fastdeq: {cure}")
