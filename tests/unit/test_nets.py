"""The networks against what the upstream ones computed from the same weights and inputs (`tests/golden`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farm import nets, zoo
from tests.golden import parity

MODELS = list(zoo.MODELS)
#: The last model first: it is the largest, and what it puts out is still at hand.
INSIDE = [(model, name) for model in reversed(MODELS) for name in parity.of(model).inside]


def network(model: str) -> nn.Module:
    net = nets.build(zoo.get(model))
    net.load_state_dict(parity.of(model).state())
    return net


# Not fixtures: pytest makes a parametrized one anew for each test that has another parameter beside it.
@lru_cache(maxsize=1)
def double(model: str) -> nn.Module:
    return network(model).double()


@lru_cache(maxsize=1)
def inside(model: str) -> Mapping[str, Tensor]:
    """What the modules of a float64 network put out for image 0; by the name "" its scores."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(name, output.clone())
        else:
            outputs.update({f"{name}[{i}]": tensor.clone() for i, tensor in enumerate(output)})

    net, fixture = network(model).double(), parity.of(model)
    for name in {re.sub(r"\[\d+\]$", "", name) for name in fixture.inside}:
        net.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
    scores = answers(net, torch.from_numpy(fixture.images[:1]).double())
    return {**outputs, "": scores}


def answers(net: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        scores: Tensor = net(images)
    return scores


def assert_upstreams(model: str, scores: Tensor, atol: float) -> None:
    """What the deployed network puts out for the fixture's images."""
    golden = parity.of(model).arrays
    if model == "swin":
        values = scores.flatten()[torch.from_numpy(golden["logits_index"])].double().numpy()
        np.testing.assert_allclose(values, golden["logits_value_f64"], rtol=0, atol=atol)
        means = scores.double().mean(dim=(0, 2, 3)).numpy()
        # The fixture's means were taken in float32.
        np.testing.assert_allclose(means, golden["logits_mean"], rtol=0, atol=max(atol, 5e-6))
    else:
        np.testing.assert_allclose(scores.double().numpy(), parity.of(model).scores, rtol=0, atol=atol)


@pytest.mark.parametrize("model", MODELS)
def test_the_state_dict_is_that_of_the_official_checkpoint_in_its_order(model: str) -> None:
    state = nets.build(zoo.get(model)).state_dict()

    found = [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in state.items()]
    assert found == [key for key in parity.of(model).keys if not key[0].startswith(parity.AUXILIARY)]


@pytest.mark.parametrize("model", MODELS)
def test_it_has_as_many_parameters_as_upstream(model: str) -> None:
    net = nets.build(zoo.get(model))

    found = sum(parameter.numel() for parameter in net.parameters())
    assert found == parity.of(model).facts["parameters_without_auxiliary_head"]


@pytest.mark.parametrize("model", MODELS)
def test_it_is_built_in_eval_mode(model: str) -> None:
    assert not any(module.training for module in nets.build(zoo.get(model)).modules())


@pytest.mark.parametrize("model", MODELS)
def test_scores_in_float64_are_upstreams(model: str) -> None:
    images = torch.from_numpy(parity.of(model).images).double()
    others = [answers(double(model), images[1:])] if len(images) > 1 else []

    assert_upstreams(model, torch.cat([inside(model)[""], *others]), atol=1e-9)


@pytest.mark.parametrize(("model", "name"), INSIDE)
def test_a_module_puts_out_in_float64_what_upstreams_does(model: str, name: str) -> None:
    golden, row = parity.of(model).arrays, parity.of(model).inside.index(name)

    output = inside(model)[name]

    assert list(output.shape) == [size for size in golden["inter_shapes"][row] if size]
    values = output.flatten()[torch.from_numpy(golden["inter_index"][row])].numpy()
    np.testing.assert_allclose(values, golden["inter_value_f64"][row], rtol=0, atol=1e-9)
    moments = [output.mean().item(), output.std(correction=0).item()]
    np.testing.assert_allclose(moments, [golden["inter_mean"][row], golden["inter_std"][row]], rtol=0, atol=1e-9)


@pytest.mark.parametrize("frozen", [False, True], ids=["as built", "frozen"])
@pytest.mark.parametrize("model", MODELS)
def test_scores_in_float32_are_upstreams_up_to_rounding(model: str, frozen: bool) -> None:
    net = network(model)
    if frozen:
        nets.freeze(net)

    scores = answers(net, torch.from_numpy(parity.of(model).images))

    assert scores.dtype == torch.float32
    assert_upstreams(model, scores, atol=zoo.get(model).tolerance)


@pytest.mark.parametrize("model", parity.CLASSIFIERS)
def test_an_image_gets_the_same_scores_alone_and_in_a_batch(model: str) -> None:
    images = torch.from_numpy(parity.of(model).images[2:]).double()

    together, alone = answers(double(model), images), answers(double(model), images[1:])

    np.testing.assert_allclose(together[1:].numpy(), alone.numpy(), rtol=0, atol=1e-9)
