"""What the fixture knows of UPerNet Swin-S beyond its scores: its heads, and how it is frozen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farm import nets, zoo
from farm.nets import swin
from tests.golden import parity

SPEC = zoo.get("swin")
GOLDEN = parity.of("swin").arrays


def network(head: str) -> nn.Module:
    net = nets.build(SPEC, head)
    net.load_state_dict(parity.of("swin").state())
    nets.freeze(net)
    return net


def answers(net: nn.Module, maps: list[Tensor], scores: Tensor | None = None) -> Tensor:
    """The network's, given what its backbone made of an image, and perhaps what its decode head made of that."""
    net.get_submodule("backbone").forward = lambda _images: maps
    if scores is not None:
        net.get_submodule("decode_head").forward = lambda _maps: scores
    with torch.inference_mode():
        found: Tensor = net(torch.zeros(1, 3, 512, 512))
    return found


@pytest.fixture(scope="module")
def maps() -> list[Tensor]:
    """What all heads work on."""
    with torch.inference_mode():
        found: list[Tensor] = network("small").get_submodule("backbone")(torch.from_numpy(parity.of("swin").images))
    return found


@pytest.fixture(scope="module")
def small(maps: list[Tensor]) -> Tensor:
    return answers(network("small"), maps)


@pytest.fixture(scope="module")
def full(maps: list[Tensor], small: Tensor) -> Tensor:
    return answers(nets.build(SPEC, "full"), maps, small)


@pytest.fixture(scope="module")
def deployed(maps: list[Tensor]) -> Tensor:
    return answers(network("deployed"), maps)


@pytest.mark.parametrize("head", ["full", "small", "deployed"])
def test_scores_have_the_specs_shape(head: str, request: pytest.FixtureRequest) -> None:
    assert tuple(request.getfixturevalue(head).shape) == (1, *SPEC.heads[head].shape)


def test_small_scores_are_upstreams_before_the_last_resize(small: Tensor) -> None:
    values = small.flatten()[torch.from_numpy(GOLDEN["head_index"])].numpy()

    np.testing.assert_allclose(values, GOLDEN["head_value_f64"], rtol=0, atol=SPEC.tolerance)


def test_small_scores_resized_are_the_full_ones(small: Tensor, full: Tensor) -> None:
    resized = nn.functional.interpolate(small, size=(512, 512), mode="bilinear", align_corners=False)

    np.testing.assert_allclose(resized.numpy(), full.numpy(), rtol=0, atol=1e-6)


def test_a_pixel_gets_upstreams_class_unless_two_are_about_as_good(full: Tensor) -> None:
    first, second = full[0].topk(2, dim=0).values

    differs = full[0].argmax(dim=0) != torch.from_numpy(GOLDEN["argmax_full"])

    assert int(differs.sum()) <= 8  # pixels of a margin under 1e-4
    assert not bool((differs & (first - second > 1e-3)).any())


def test_the_published_graph_classes_some_pixels_otherwise(full: Tensor, deployed: Tensor) -> None:
    differs = deployed[0].argmax(dim=0) != torch.from_numpy(GOLDEN["argmax_full"])

    assert int(differs.sum()) == pytest.approx(8829, abs=20)
    assert (deployed - full).abs().max().item() == pytest.approx(1.4, abs=0.05)


def test_frozen_a_unit_joins_maps_to_the_same_result() -> None:
    noise = torch.Generator().manual_seed(310)
    unit = swin.JoiningUnit(16, 8, (8, 6, 4, 1)).double().eval()
    for name, tensor in unit.state_dict().items():
        if name.startswith("bn.") and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5, generator=noise)
    sizes = [(8, 16), *((512, n) for n in unit.sides)]
    maps = [torch.randn((2, width, n, n), generator=noise, dtype=torch.float64) for width, n in sizes]
    with torch.inference_mode():
        expected = unit(maps)

        unit.freeze()

        np.testing.assert_allclose(unit(maps), expected, rtol=0, atol=1e-12)


def test_frozen_the_state_dict_stays_as_it_is() -> None:
    state, expected = network("small").state_dict(), parity.of("swin").state()

    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cells", swin.CELLS)
def test_the_pyramid_pools_as_pytorch_does(cells: int) -> None:
    last = torch.randn((2, 768, 16, 16), generator=torch.Generator().manual_seed(cells), dtype=torch.float64)

    pooled = swin.Pool(cells, deployed=False)(last)

    np.testing.assert_allclose(pooled, nn.AdaptiveAvgPool2d(cells)(last), rtol=0, atol=1e-12)


@pytest.mark.parametrize("cells", swin.CELLS)
def test_the_deployed_pyramid_pools_with_strides_of_one_length(cells: int) -> None:
    last = torch.randn((2, 768, 16, 16), generator=torch.Generator().manual_seed(cells), dtype=torch.float64)
    stride = 16 // cells

    pooled = swin.Pool(cells, deployed=True)(last)

    expected = nn.AvgPool2d(kernel_size=16 - (cells - 1) * stride, stride=stride)(last)
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-12)


def test_a_fresh_network_has_the_relative_positions_of_the_checkpoint() -> None:
    state = nets.build(SPEC, "small").state_dict()

    tables = [tensor for name, tensor in state.items() if name.endswith("relative_position_index")]
    assert len(tables) == 24
    for table in tables:
        np.testing.assert_array_equal(table, GOLDEN["relative_position_index"])


def test_the_relative_positions_of_the_checkpoint_are_those_used() -> None:
    attention = swin.WindowAttention(swin.STAGES[3], shifted=False)
    with torch.no_grad():
        attention.relative_position_bias_table.copy_(torch.arange(169)[:, None].expand(169, 24))
        attention.relative_position_index.fill_(7)

    assert set(attention.bias().flatten().tolist()) == {7.0}


@pytest.mark.parametrize("stage", swin.STAGES)
@pytest.mark.parametrize("shifted", [False, True])
def test_tokens_come_back_to_where_they_were(stage: swin.Stage, shifted: bool) -> None:
    there, back = swin.moves(stage.side, shifted=shifted)

    assert len(there) == (-(-stage.side // 7) * 7) ** 2
    np.testing.assert_array_equal(there[back], np.arange(stage.side**2))


def test_windows_are_cut_from_the_padded_and_shifted_map() -> None:
    there, _ = swin.moves(16, shifted=True)

    padded = np.pad(np.arange(256).reshape(16, 16), (0, 5), constant_values=256)
    rolled = np.roll(padded, (-3, -3), (0, 1))
    np.testing.assert_array_equal(there[:49].reshape(7, 7), rolled[:7, :7])
    np.testing.assert_array_equal(there[5 * 49 : 6 * 49].reshape(7, 7), rolled[7:14, 14:])
