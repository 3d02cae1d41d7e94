"""Every shipped YAML composes, builds what it names, and trains for a step."""

import dataclasses
import math
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fastdeq.adjoints import Implicit, JacobianFree
from fastdeq.experiment import renamed
from fastdeq.experiment.build import build_model, build_task, link
from fastdeq.experiment.checks import check_values
from fastdeq.experiment.choices import check_choices
from fastdeq.experiment.explain import explain
from fastdeq.solvers import Anderson
from fastdeq.training import RegressionTask
from tests.configurations import CONF, GROUPS, NEEDS, composed

IMAGENET = ["sizes.input=[3,64,64]"]  # 8 × 8 cannot be halved as often
REQUIRED = {
    "augmentation=flip": ["data=mnist"],
    "augmentation=flip_pad_crop": ["data=cifar10"],
    "augmentation=flip_resize_crop": ["data=svhn"],
    "data=image_folder": [
        *("arch=cifar_tiny", "data.size=32", "sizes.outputs=10", "model=skip_mdeq"),
        *("solver.max_steps=3", "adjoint.solver.max_steps=3"),
    ],
    "adjoint=reversible": ["solver=reversible", "solver.keep_every=1"],  # f does not contract yet
    "solver=newton_krylov": ["solver.max_steps=3"],  # it uses all the evaluations it may
    "arch=dynamics": ["data=polynomial"],
    "arch=polynomial": ["data=polynomial"],
    "arch=fc": ["model=skip_deq"],
    "adjoint=direct": ["model=skip_deq"],  # a small state
    "adjoint=implicit_fixed_point": ["model=skip_deq"],  # fails on an untrained multiscale cell
    # At its own size a step takes many seconds.
    "experiment=imagenet_small": ["data.size=64", "solver.max_steps=2", "adjoint=jfb"],
    "recipe=none": ["arch=digits_conv"],
    "recipe=polynomial": ["data=polynomial"],
    "recipe=imagenet_small": ["adjoint=jfb", "solver.max_steps=1", *IMAGENET],
    **{
        f"arch={arch}": ["model=skip_mdeq", "solver.max_steps=3", "adjoint.solver.max_steps=3"]
        for arch in ("cifar_tiny", "mnist_conv", "digits_conv")
    },
    "arch=cifar_large": ["model=skip_mdeq", "adjoint=jfb", "solver.max_steps=1"],
    "arch=imagenet_small": ["model=skip_mdeq", "adjoint=jfb", "solver.max_steps=1", *IMAGENET],
}
"""What a choice needs beside it to make sense; the others go with the defaults."""


def choice_of(group: str, choice: str) -> Any:
    """As a parameter of a test, skipped where its extra is not installed."""
    name = f"{group}={choice}"
    missing = name in NEEDS and find_spec(NEEDS[name]) is None
    return pytest.param(name, marks=pytest.mark.skipif(missing, reason=f"{name} needs an extra"))


CHOICES = [choice_of(group, choice) for group, choices in GROUPS.items() for choice in choices]
MODELS = [choice_of("model", choice) for choice in GROUPS["model"]]
MULTISCALE = ["mdeq", "skip_mdeq", "skip_reg_mdeq"]
SINGLE_SCALE = ["deq", "skip_deq", "skip_reg_deq"]


def one_step(cfg: DictConfig) -> None:
    """Forward, backward and optimizer on five samples: all finite, and every parameter moves.

    Five, because the signs of z₀ − z* that make the skip loss's gradient can cancel among four.
    """
    torch.manual_seed(0)
    classes = cfg.sizes.outputs
    task = build_task(cfg)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    x = torch.randn(5, *cfg.sizes.input)
    regression = isinstance(task, RegressionTask)
    targets = torch.randn(5, classes) if regression else torch.arange(5) % classes
    prediction, solution = task.model(x, jacobian_loss=task.weights.jacobian > 0)
    assert prediction.shape == (5, classes)
    task.check_fit(prediction, targets)
    optimizer = task.make_optimizer(task.parameters())
    loss = task.criterion(prediction, targets)
    for part in task.weights.parts(solution).values():
        loss = loss + part
    loss.backward()
    optimizer.step()
    for old, (name, new) in zip(before, task.named_parameters(), strict=True):
        assert torch.isfinite(new).all()
        # Without the skip loss nothing trains the explicit network: z* does not depend on z₀.
        idle = "initializer" in name and not task.weights.skip
        assert torch.equal(old, new) == idle, name


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_of_every_group_composes_and_resolves(choice: str) -> None:
    cfg = composed(choice, *REQUIRED.get(choice, ()))
    assert not OmegaConf.missing_keys(cfg)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_values(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_trains_for_a_step(choice: str) -> None:
    one_step(composed(choice, *REQUIRED.get(choice, ())))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("solver", ["lbroyden", "anderson", "tsit5"])
def test_every_model_trains_with_every_kind_of_solver(model: str, solver: str) -> None:
    beside = REQUIRED.get(model, ())
    one_step(composed(model, f"solver={solver}", "loss.jacobian=0.1", *beside))


def test_random_starts_and_a_random_number_of_steps_are_set_by_their_targets() -> None:
    one_step(
        composed(
            "model=deq",
            *("solver=picard", "adjoint=unrolled", "solver.max_steps=3"),
            *("+model.deq.initializer._target_=fastdeq.nn.RandomNormal",),
            *("+model.deq.steps._target_=fastdeq.nn.RandomSteps",),
            *("+model.deq.steps.least=1", "+model.deq.steps.most=4"),
        )
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_every_model_trains_on_several_scales_with_either_normalization(
    model: str, normalization: str
) -> None:
    one_step(composed(model, "arch=digits_conv", f"arch.normalization={normalization}"))


@pytest.mark.parametrize("model", MULTISCALE)
@pytest.mark.parametrize("adjoint", ["implicit", "implicit_fixed_point"])
@pytest.mark.parametrize(("normalization", "per_sample"), [("batch", False), ("group", True)])
def test_samples_are_solved_one_by_one_where_the_normalization_lets_them(
    model: str, adjoint: str, normalization: str, per_sample: bool
) -> None:
    for solver in GROUPS["solver"]:
        cfg = composed(
            f"model={model}",
            f"adjoint={adjoint}",
            f"solver={solver}",
            "arch=digits_conv",
            f"arch.normalization={normalization}",
        )
        assert cfg.solver.per_sample is per_sample
        assert cfg.adjoint.solver.per_sample is per_sample


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["model=skip_mdeq", "arch=fc"],
            "the cell is a DenseCell, which has no scales: give a MultiScaleCell",
        ),
        (["arch=cifar_tiny", "solver.per_sample=true"], "set solver.per_sample=false"),
        (["arch=cifar_tiny", "adjoint.solver.per_sample=true"], "set adjoint.solver.per_sample"),
        (["arch=imagenet_small"], "images of 8 × 8 cannot be halved 5 times"),
        (["arch=cifar_tiny", "data=polynomial"], "the data are [1]"),
        (["arch=digits_conv", "arch.channels=[8]"], "there are 1 scales, channels [8], but 2 head"),
        (["arch=digits_conv", "arch.channels=8"], "channels is 8, but must list"),
        (["arch=digits_conv", "arch.normalization=layer"], "arch.normalization is 'layer'"),
        (["arch=digits_conv", "arch.expansion=0"], "expansion is 0"),
        (["model=residual", "arch=fc"], "this arch has no 'plain': leave arch= out"),
    ],
)
def test_what_does_not_fit_a_multiscale_network_is_reported_in_one_line(
    overrides: list[str], sentence: str
) -> None:
    chosen = [] if any("model=" in override for override in overrides) else ["model=mdeq"]
    cfg = composed(*chosen, *overrides)
    with pytest.raises(Exception) as caught:  # noqa: PT011, PT012 (of several kinds; the line counts)
        OmegaConf.to_container(link(cfg), resolve=True)
        build_task(cfg)
    line = explain(caught.value)
    assert sentence in line
    assert "\n" not in line


@pytest.mark.parametrize("group", ["solver", "adjoint", "loss"])
def test_the_keys_of_a_file_are_exactly_the_fields_of_its_class(group: str) -> None:
    for choices in [[f"{group}={choice}"] for choice in GROUPS.get(group, ())] or [[]]:
        node = composed(*choices)[group]
        fields = {field.name for field in dataclasses.fields(get_class(node["_target_"]))}
        fields -= {"compile"}  # the key at the top sets it
        assert set(node) - {"_target_"} == fields, choices


@pytest.mark.parametrize("solver", GROUPS["solver"])
def test_beside_tolerance_and_limits_the_files_hold_the_defaults_of_the_classes(
    solver: str,
) -> None:
    built = instantiate(composed(f"solver={solver}").solver)
    method = {"method": built.method} if hasattr(built, "method") else {}
    assert built == type(built)(tol=5e-3, **method)


ARCHS = {
    "digits": ("fc", "digits_conv"),
    "mnist": ("fc", "mnist_conv"),
    "fashion_mnist": ("fc", "mnist_conv"),
    "emnist": ("fc", "mnist_conv"),
    "cifar100": ("fc", "cifar_tiny"),
    "cifar10": ("fc", "cifar_tiny"),
    "svhn": ("fc", "cifar_tiny"),
}
"""What each set of images brings for models of one scale, and of several."""


@pytest.mark.parametrize("data", ARCHS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_fits_every_set_of_images_without_naming_a_size(data: str, model: str) -> None:
    cfg = composed(f"data={data}", model)
    single = model.removeprefix("model=") in ("deq", "skip_deq", "skip_reg_deq")
    assert HydraConfig.get().runtime.choices["arch"] == ARCHS[data][0 if single else 1]
    built = build_model(cfg).eval()
    with torch.no_grad():
        prediction, _ = built(torch.zeros(2, *cfg.sizes.input), depth=1)
    assert prediction.shape == (2, cfg.sizes.outputs)


@pytest.mark.parametrize("data", ["cifar10", "svhn"])
def test_colour_images_bring_settings_that_train_and_the_command_line_has_the_last_word(
    data: str,
) -> None:
    cfg = composed(f"data={data}", "model=skip_mdeq")
    assert (cfg.solver.tol, cfg.solver.max_steps) == (5e-2, 18)
    assert (cfg.adjoint.solver.tol, cfg.adjoint.solver.max_steps) == (5e-2, 20)
    assert cfg.callbacks.pretraining.steps == 3000
    assert cfg.scheduler._target_.endswith("Cosine")
    typed = ("solver=anderson", "solver.tol=1e-3", "adjoint=jfb", "callbacks.pretraining.steps=0")
    own = composed(f"data={data}", "model=skip_mdeq", *typed)
    assert (own.solver.tol, own.solver.max_steps) == (1e-3, 18)
    assert own.adjoint._target_.endswith("JacobianFree")
    assert own.callbacks.pretraining.steps == 0


def test_the_command_line_has_the_last_word_on_the_arch() -> None:
    for overrides in (["arch=fc"], ["arch=fc", "model=mdeq"], ["experiment=cifar10_tiny"]):
        composed("data=mnist", *overrides)
        wanted = "fc" if "arch=fc" in overrides else "cifar_tiny"
        assert HydraConfig.get().runtime.choices["arch"] == wanted


def test_the_backward_pass_takes_any_solver_from_the_command_line() -> None:
    adjoint = instantiate(
        composed("adjoint=implicit_fixed_point", "solver@adjoint.solver=anderson").adjoint
    )
    assert adjoint == Implicit(solver=Anderson(tol=5e-3))


def test_the_skip_loss_is_added_where_the_model_predicts_its_solution() -> None:
    for model, predicts in (("deq", 0), ("mdeq", 0), ("skip_deq", 1), ("skip_reg_mdeq", 1)):
        for typed, weight in (([], 1), (["loss.skip=5"], 5), (["experiment=mnist_mdeq"], 1)):
            task = build_task(composed(f"model={model}", *typed))
            assert task.weights.skip == predicts * weight, (model, typed)


def test_the_data_set_chooses_its_recipe_and_another_or_none_can_be_chosen() -> None:
    composed("data=cifar10")
    assert HydraConfig.get().runtime.choices["recipe"] == "cifar_tiny"
    own = composed("data=cifar10", "recipe=none", "arch=cifar_tiny")
    assert (own.solver.tol, own.solver.max_steps) == (5e-3, 50)
    assert own.callbacks.pretraining.steps == 0
    assert own.scheduler._target_.endswith("Constant")
    coarse = composed("recipe=cifar_tiny")
    assert HydraConfig.get().runtime.choices["arch"] == "cifar_tiny"
    assert (coarse.solver.tol, coarse.data._target_) == (5e-2, "fastdeq.data.DigitsDataModule")
    with pytest.raises(MissingConfigException) as caught:
        composed("recipe=none")
    assert "recipe=none has no arch: give arch=, one of cifar_large" in explain(caught.value)


def test_the_words_that_replace_earlier_ones_compose() -> None:
    for old, new in renamed.CHOICES.items():
        if not old.startswith("sweep="):  # their values are lists of jobs
            check_choices(new.split())
            composed(*new.split())


def test_a_data_set_brings_nothing_but_samples_their_sizes_and_the_task() -> None:
    for path in (CONF / "data").glob("*.yaml"):
        assert set(OmegaConf.load(path)) == {"defaults", "data", "sizes", "task"}, path


def test_every_part_stands_once_in_the_resolved_configuration() -> None:
    for model in GROUPS["model"]:
        text = OmegaConf.to_yaml(composed(f"model={model}", "solver=anderson"), resolve=True)
        assert text.count("fastdeq.solvers.Anderson") == 1, model
        assert (
            text.count("fastdeq.nn.DenseCell") + text.count("fastdeq.nn.MultiScaleResidualCell")
            == 1
        )
        assert len(text.splitlines()) <= 205


@pytest.mark.parametrize("data", ["cifar10", "svhn"])
@pytest.mark.parametrize("choice", GROUPS["augmentation"])
def test_every_augmentation_fits_the_sets_of_colour_images(data: str, choice: str) -> None:
    cfg = composed(f"data={data}", f"augmentation={choice}")
    built = instantiate(cfg.data, _convert_="all")
    assert len(built.augmentation) == (1 if choice == "flip" else 2)


@pytest.mark.parametrize(
    ("model", "count"), [("deq", 134_538), ("skip_reg_deq", 134_538), ("skip_deq", 151_050)]
)
def test_with_784_features_the_models_have_the_published_parameter_counts(
    model: str, count: int
) -> None:
    cfg = composed(f"model={model}", "sizes.features=784")
    built = build_model(cfg)
    assert sum(parameter.numel() for parameter in built.parameters()) == count


def test_the_first_layer_of_the_published_mnist_network_ends_in_a_relu() -> None:
    torch.manual_seed(0)
    x = torch.rand(7, 1, 28, 28)
    published = instantiate(composed("experiment=mnist_fc").arch.stem, _convert_="all")(x)
    assert published.shape == (7, 128)
    assert published.min() == 0 < published.max()
    plain = instantiate(composed("model=deq", "sizes.features=784").arch.stem, _convert_="all")(x)
    assert plain.min() < 0


PUBLISHED = {
    "cifar_tiny": ("[3,32,32]", 10, 163_546, 200_122),
    "cifar_large": ("[3,32,32]", 10, 10_631_958, 11_186_774),
    "imagenet_small": ("[3,224,224]", 1000, 17_912_456, 18_467_272),
}
"""The image, the classes, and the parameters without and with the skip network."""


@pytest.mark.parametrize("arch", PUBLISHED)
@pytest.mark.parametrize("model", [*MULTISCALE, "neural_ode"])
@pytest.mark.parametrize("normalization", ["batch", "group"])
def test_the_multiscale_models_have_the_published_parameter_counts(
    arch: str, model: str, normalization: str
) -> None:
    if model == "neural_ode":
        pytest.importorskip("torchdiffeq")
    image, classes, plain, with_network = PUBLISHED[arch]
    cfg = composed(
        f"model={model}",
        f"arch={arch}",
        f"sizes.input={image}",
        f"sizes.outputs={classes}",
        f"arch.normalization={normalization}",
    )
    built = build_model(cfg)
    wanted = with_network if model == "skip_mdeq" else plain
    assert sum(parameter.numel() for parameter in built.parameters()) == wanted


@pytest.mark.parametrize("model", MODELS)
def test_one_key_computes_f_of_every_model_in_bfloat16(model: str) -> None:
    assert build_model(composed(model)).equilibrium.precision is None
    assert build_model(composed(model, "precision=bf16")).equilibrium.precision == "bf16"


def test_the_correction_of_states_on_the_way_is_set_by_keys_of_the_loss() -> None:
    cfg = composed(
        "model=deq",
        "loss.correction=0.5",
        "loss.correction_states=[2,4]",
        "loss.correction_adjoint={_target_: fastdeq.adjoints.JacobianFree}",
    )
    one_step(cfg)
    assert build_task(cfg).weights.states == {"states": [2, 4], "states_adjoint": JacobianFree()}


def test_one_key_makes_every_kernel_channels_last_and_archs_with_batch_norm_set_it() -> None:
    for arch, formats in {
        "cifar_tiny": {"": True, "memory_format=contiguous": False},
        "digits_conv": {"": False, "memory_format=channels_last": True},
    }.items():
        for key, wanted in formats.items():
            words = (f"arch={arch}", "sizes.input=[3,32,32]", *([key] if key else []))
            built = build_model(composed("model=skip_mdeq", *words))
            kernels = [m.weight for m in built.modules() if isinstance(m, nn.Conv2d)]
            assert all(
                weight.is_contiguous(memory_format=torch.channels_last) == wanted
                for weight in kernels
                if weight.shape[2:] != (1, 1)  # which are the same in both
            ), (arch, key)


@pytest.mark.parametrize("model", MODELS)
def test_arch_initialization_reaches_every_weight_of_every_model(model: str) -> None:
    single = model.removeprefix("model=") in SINGLE_SCALE
    for beside in (
        [["arch=fc"], ["data=polynomial"], ["data=polynomial", "arch=dynamics"]]
        if single
        else [["arch=digits_conv"], ["arch=cifar_large", "sizes.input=[3,32,32]"]]  # weight norm
    ):
        cfg = composed(model, *beside, "arch.initialization=glorot")
        built = build_model(cfg)
        layers = [layer for layer in built.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        assert layers
        for layer in layers:
            size = layer.weight[0, 0].numel()
            bound = math.sqrt(6 / (size * sum(layer.weight.shape[:2])))
            assert 0.5 * bound < layer.weight.abs().max() <= bound * (1 + 1e-5)
            assert layer.bias is None or not layer.bias.any()
        parameters = sum(parameter.numel() for parameter in built.parameters())
        cfg.arch.initialization = None
        as_made = build_model(cfg)
        assert parameters == sum(parameter.numel() for parameter in as_made.parameters())


def test_the_size_of_the_images_and_the_classes_flow_from_one_key_each() -> None:
    pytest.importorskip("PIL")
    cfg = composed("data=image_folder", "data.size=64", "sizes.outputs=7")
    data = instantiate(cfg.data, _convert_="all")
    assert tuple(cfg.sizes.input) == data.input_shape == (3, 64, 64)
    assert cfg.data.classes == data.outputs == 7
    default = composed("data=image_folder", "model=skip_mdeq")
    assert math.prod(default.sizes.input) == default.sizes.features
    built = build_model(default)
    assert sum(parameter.numel() for parameter in built.parameters()) == 18_467_272


@pytest.mark.parametrize("arch", ["cifar_tiny", "cifar_large", "mnist_conv", "digits_conv"])
def test_the_residual_network_has_about_as_many_parameters_as_the_cell(arch: str) -> None:
    arch_cfg = composed("model=residual", f"arch={arch}", "sizes.input=[3,32,32]").arch
    cell, plain = (
        sum(p.numel() for p in instantiate(node, _convert_="all").parameters())
        for node in (arch_cfg.cell, arch_cfg.plain)
    )
    assert 0.7 * cell < plain < cell


@pytest.mark.parametrize(
    "override", ["solver.tolerance=1", "modle=deq", "model=deqq", "trainer.epochs=3"]
)
def test_an_unknown_key_or_choice_is_refused_when_composing(override: str) -> None:
    with pytest.raises(ConfigCompositionException):
        composed(override)
