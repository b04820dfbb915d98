"""LV-ViT-S against what the upstream network computed from the same weights and inputs (`tests/golden`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farm import nets, zoo
from tests.golden import lvvit_s

INSIDE = [str(name) for name in lvvit_s.arrays()["inter_names"]]


def network() -> nn.Module:
    net = nets.build(zoo.get("lvvit"))
    net.load_state_dict(lvvit_s.weights())
    return net


@pytest.fixture(scope="module")
def double() -> nn.Module:
    return network().double()


@pytest.fixture(scope="module")
def single() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def inside(double: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What the modules of the float64 network put out for image 0."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, _module: nn.Module, _inputs: object, output: Tensor) -> None:
        outputs[name] = output.clone()

    hooks = [double.get_submodule(name).register_forward_hook(partial(keep, name)) for name in INSIDE]
    answers(double, torch.from_numpy(lvvit_s.images()[:1]).double())
    yield outputs
    for hook in hooks:
        hook.remove()


def answers(net: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        scores: Tensor = net(images)
    return scores


def test_the_state_dict_is_that_of_the_official_checkpoint_in_its_order() -> None:
    state = nets.build(zoo.get("lvvit")).state_dict()

    found = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()]
    assert found == lvvit_s.keys()


def test_it_has_as_many_parameters_as_upstream() -> None:
    net = nets.build(zoo.get("lvvit"))

    assert sum(parameter.numel() for parameter in net.parameters()) == lvvit_s.facts()["parameters"]


def test_it_is_built_in_eval_mode() -> None:
    assert not any(module.training for module in nets.build(zoo.get("lvvit")).modules())


def test_scores_in_float64_are_upstreams(double: nn.Module) -> None:
    scores = answers(double, torch.from_numpy(lvvit_s.images()).double())

    np.testing.assert_allclose(scores.numpy(), lvvit_s.arrays()["logits_f64"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", INSIDE)
def test_a_module_puts_out_in_float64_what_upstreams_does(name: str, inside: dict[str, Tensor]) -> None:
    golden, row = lvvit_s.arrays(), INSIDE.index(name)

    output = inside[name]

    assert list(output.shape) == [size for size in golden["inter_shapes"][row] if size]
    values = output.flatten()[torch.from_numpy(golden["inter_index"][row])].numpy()
    np.testing.assert_allclose(values, golden["inter_value_f64"][row], rtol=0, atol=1e-9)
    moments = [output.mean().item(), output.std(correction=0).item()]
    np.testing.assert_allclose(moments, [golden["inter_mean"][row], golden["inter_std"][row]], rtol=0, atol=1e-9)


def test_scores_in_float32_are_upstreams_up_to_rounding(single: nn.Module) -> None:
    scores = answers(single, torch.from_numpy(lvvit_s.images()))

    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), lvvit_s.arrays()["logits_f64"], rtol=0, atol=5e-5)


def test_an_image_gets_the_same_scores_alone_and_in_a_batch(double: nn.Module) -> None:
    images = torch.from_numpy(lvvit_s.images()[2:]).double()

    together, alone = answers(double, images), answers(double, images[1:])

    np.testing.assert_allclose(together[1:].numpy(), alone.numpy(), rtol=0, atol=1e-9)
