"""Tests that every family must pass; one that is added inherits them with its smallest model.

`NetworksContract` is for whatever is exported, `FamilyContract` for a family of models. Weights are seeded and small;
nothing is read from a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from l2p_calib.layout import ATTENTION_INPUTS, layer_of, layer_of_point
from l2p_calib.ledger import threshold_of
from l2p_calib.plans.plan import FLOAT8, PLANS
from l2p_calib.statistics.torch_hooks import RESIDUAL, counting
from l2p_engines.forecast.calls import PRECISIONS, CallSize, count_tokens, forward_flops, weight_bytes
from l2p_export.families.costs import network_costs
from l2p_export.graphs.export import export_graph
from l2p_export.precision.plans import plain_plan
from l2p_export.tensors.sources import ArrayTensor
from l2p_runtime.backends.onnx import OnnxEngine
from l2p_runtime.contract import NETWORKS, BasePrecision, NetworkSpec
from parity.graphs import run
from parity.models import call, random_state, relative_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from l2p_export.families import Family, Model, Networks

SIZES = {"B": 2, "h": 3, "w": 5, "r": 2, "t": 1, "s": 64, "L": 9}
"""Value of each symbol: 15 image tokens, 17 pads, and 32 tokens of a caption; two rows of the head; a prompt of 9."""

CALL_INPUTS = {"image", "time", "prompt_embeds", "caption_mask", "rope_cos", "rope_sin", "input_ids", "attention_mask"}
"""What a call brings along; every other input of a network was made by one before it."""


class NetworksContract:
    """What the exporter, calibration and forecasts rely on."""

    def make(self) -> Networks:
        """The smallest networks there are."""
        raise NotImplementedError

    @cached_property
    def networks(self) -> Networks:
        return self.make()

    def inputs(self, spec: NetworkSpec, sizes: Mapping[str, int]) -> dict[str, NDArray[Any]]:
        """Seeded inputs of one network; whole numbers are 0 or 1, and no mask is empty."""
        random = np.random.default_rng(len(spec.name))
        made: dict[str, NDArray[Any]] = {}
        for tensor in spec.inputs:
            shape = tensor.resolve(sizes)
            if tensor.dtype == "float32":
                made[tensor.name] = random.standard_normal(shape, np.float32)
            else:
                ones = np.ones((*shape[:-1], 1), np.int64)
                rest = random.integers(0, 2, (*shape[:-1], shape[-1] - 1))
                made[tensor.name] = np.concatenate([ones, rest], -1).astype(tensor.dtype)
        if "rope_cos" in made:
            angles = made["rope_cos"] * 3
            made |= {"rope_cos": np.cos(angles), "rope_sin": np.sin(angles)}
        return made

    def loaded(self, network: str) -> nn.Module:
        """One network in torch float32 with seeded weights."""
        with torch.device("meta"):
            module = self.networks.module(network, lambda layer: torch.float32)
        state = random_state(self.networks.network_shapes(network), seed=3)
        module.load_state_dict({name: state[name] for name in module.state_dict()}, assign=True)
        return module

    def test_shapes_are_those_of_the_modules(self) -> None:
        for spec in self.networks.networks:
            with torch.device("meta"):
                state = self.networks.module(spec.name, lambda layer: torch.float32).state_dict()
            found = {name: tuple(value.shape) for name, value in state.items()}
            assert found == dict(self.networks.network_shapes(spec.name)), spec.name

    def test_every_tensor_belongs_to_one_network(self) -> None:
        parts = [self.networks.network_shapes(spec.name) for spec in self.networks.networks]
        assert sum(map(len, parts)) == len(self.networks.shapes)
        assert {name: shape for part in parts for name, shape in part.items()} == dict(self.networks.shapes)

    def test_every_input_is_a_calls_or_was_made_before(self) -> None:
        made: dict[str, tuple[object, ...]] = {}
        for spec in self.networks.networks:
            for tensor in spec.inputs:
                assert tensor.name in CALL_INPUTS or tensor.name in made, f"{spec.name}: {tensor.name}"
                if tensor.name in made:
                    before = made[tensor.name]
                    assert (tensor.dtype, tensor.shape[0], tensor.shape[-1]) == before
            for tensor in spec.outputs:
                assert tensor.dtype == "float32"
                made[tensor.name] = (tensor.dtype, tensor.shape[0], tensor.shape[-1])
                assert {dim for dim in tensor.shape if isinstance(dim, str)} <= {
                    dim for part in spec.inputs for dim in part.shape
                }

    def test_blocks_are_submodules_that_can_be_left_out(self) -> None:
        for spec in self.networks.networks:
            blocks = self.networks.blocks(spec.name)
            with torch.device("meta"):
                module = self.networks.module(spec.name, lambda layer: torch.float32)
                for block in blocks:
                    module.get_submodule(block)
                some = self.networks.module(spec.name, lambda layer: torch.float32, blocks[:1])
            left = tuple(f"{block}." for block in blocks[1:])
            kept = {name for name in module.state_dict() if not name.startswith(left)}
            assert set(some.state_dict()) == kept, spec.name

    def test_layouts_name_layers_and_points_that_are_there(self) -> None:
        for spec in self.networks.networks:
            layout, shapes = self.networks.layout(spec.name), self.networks.network_shapes(spec.name)
            module, layers, own = self.loaded(spec.name), set(layout.layers), {layer_of(name) for name in shapes}
            points = {point.name for point in layout.points}
            assert layout.network == spec.name
            assert own == {name for name in layers if not name.startswith(RESIDUAL)}
            assert len(points) == len(layout.points)
            assert len(layers) == len(layout.layers)
            for point in layout.points:
                assert layers.issuperset((*point.holders, *point.scaled_by)), point.name
                if not point.name.startswith(RESIDUAL):
                    module.get_submodule(layer_of_point(point.name))
            assert layers.issuperset(layout.scalable)
            assert all(branch.usual in (branch.first, branch.last) for branch in layout.branches)
            for product in layout.linear_layers:
                assert len(shapes[f"{product.layer}.weight"]) == 2
                assert product.reads in points
            for attention in layout.attentions:
                assert attention.values_from in own
                assert own.issuperset(attention.rotates)
                assert [part.layer for part in attention.inputs] == [f"{attention.layer}.{p}" for p in ATTENTION_INPUTS]
                for part in attention.inputs:
                    assert part.layer not in own
                    assert part.reads in points
                    module.get_submodule(part.layer)
            for item in layout.float32:
                assert item.reason
                assert any(f"{name}.".startswith(f"{item.layer}.") for name in own)

    def test_every_point_is_seen(self) -> None:
        for spec in self.networks.networks:
            points = [point.name for point in self.networks.layout(spec.name).points]
            module = self.loaded(spec.name)
            with counting(module, points) as counters:
                call(module, **self.inputs(spec, SIZES))
            unseen = [point for point, counter in counters.items() if not counter.ranges().count]
            assert not unseen, spec.name

    def test_forecasts_know_every_matrix_and_convolution(self) -> None:
        """As often as torch multiplies by it: a weight that no operation names would be forecast to cost nothing."""
        for spec in self.networks.networks:
            module, operations = self.loaded(spec.name), self.networks.operations(spec.name)
            seen: dict[str, int] = {}

            def note(name: str, part: nn.Module, inputs: tuple[Any, ...], made: torch.Tensor) -> None:
                channels = part.out_features if isinstance(part, nn.Linear) else made.shape[1]
                seen[f"{name}.weight"] = made.numel() // channels  # noqa: B023 - the loop's body is done by then

            for name, part in module.named_modules():
                if isinstance(part, (nn.Linear, nn.Conv2d)):
                    part.register_forward_hook(lambda *given, name=name: note(name, *given))
            call(module, **self.inputs(spec, SIZES))
            grid = SIZES["w"] * (SIZES["r"] if spec.name == "head" else SIZES["h"])
            caption = SIZES["L"] if "L" in spec.symbols() else 32 * SIZES["t"]
            rows = {"call": 1, "image": grid, "padded_image": SIZES["s"] - caption, "caption": caption}
            rows["sequence"] = SIZES["s"]
            pixels = grid * self.patch_px**2
            expected = {name: SIZES["B"] * rows[kind] for name, kind in operations.linear_layers.items()}
            expected |= {n: SIZES["B"] * pixels // 4**halvings for n, halvings in operations.convolutions.items()}
            assert seen == expected, spec.name
            assert bool(operations.attentions) == bool(self.networks.blocks(spec.name)), spec.name

    @property
    def patch_px(self) -> int:
        """Side of a patch; 0 where nothing is drawn."""
        return 0

    def test_costs_are_those_of_plain_plans(self) -> None:
        costs = network_costs(self.networks)
        items = {"float32": 4, "float16": 2, "bfloat16": 2, FLOAT8: 1}
        assert sum(weight_bytes(costs, "fp32").values()) == 4 * sum(map(math.prod, self.networks.shapes.values()))
        for precision in sorted(set(PLANS) & set(PRECISIONS)):
            plan = plain_plan(self.networks, precision)
            for cost in costs.values():
                for name in cost.shapes:
                    assert cost.bytes_per_value(precision, name) == items[plan.dtype(name)], name

    def test_faults_are_named(self) -> None:
        shapes = dict(self.networks.shapes)
        assert self.networks.faults(shapes) == []
        missing, misshapen = min(shapes), max(shapes)
        wrong = {name: shape for name, shape in shapes.items() if name != missing}
        wrong |= {misshapen: (*shapes[misshapen], 7), "of.nobody.weight": (1,)}
        faults = self.networks.faults(wrong)
        assert len(faults) == 3
        for name, what in ((missing, "missing"), ("of.nobody.weight", "unknown"), (misshapen, "has shape")):
            assert any(f"`{name}`" in fault and what in fault for fault in faults), name

    def test_the_smallest_graph_equals_torch_at_any_size(self, tmp_path: Path) -> None:
        """One trace with every size dynamic; blocks of its kind are copies."""
        networks = self.networks
        sizes = {spec: sum(map(math.prod, networks.network_shapes(spec.name).values())) for spec in networks.networks}
        spec = min((spec for spec in sizes if networks.blocks(spec.name)), key=sizes.__getitem__)
        state = random_state(networks.network_shapes(spec.name), seed=3)
        tensors = {name: ArrayTensor(value.numpy()) for name, value in state.items()}
        plan = plain_plan(networks, "fp32")
        files = export_graph(networks, tensors, spec, plan, tmp_path, lambda done: None)
        engine, module = OnnxEngine(files.graph, files.weights, spec), self.loaded(spec.name)
        for values in (SIZES, {"B": 1, "h": 1, "w": 4, "r": 1, "t": 2, "s": 96, "L": 4}):
            inputs = self.inputs(spec, values)
            for found, expected in zip(run(engine, inputs), call(module, **inputs), strict=True):
                assert relative_error(found, expected) <= threshold_of("fp32").relative


class FamilyContract(NetworksContract):
    """What commands rely on besides."""

    family: Family

    def make(self) -> Model:
        """The family's smallest model."""
        raise NotImplementedError

    @cached_property
    def model(self) -> Model:
        return self.make()

    @property
    def patch_px(self) -> int:
        return self.model.spec.patch_px

    def test_its_networks_are_those_of_a_bundle(self) -> None:
        assert tuple(spec.name for spec in self.model.networks) == NETWORKS
        assert self.model.spec.family == self.family.name

    def test_dimensions_are_read_from_shapes(self) -> None:
        """A bundle gives the shapes of its weights and the trunk's layers, and gets the model it was built from."""
        trunk = tuple(range(*self.model.spec.trunk_layers))
        for again in (self.family.model(self.model.shapes), self.family.model(self.model.shapes, trunk)):
            assert again.spec == self.model.spec
            assert again.networks == self.model.networks
            assert dict(again.shapes) == dict(self.model.shapes)

    def test_it_claims_its_own_names(self) -> None:
        assert self.family.claims(self.model.shapes)
        assert not self.family.claims(["w", "model.layers.0.self_attn.q_proj.weight"])
        assert not self.family.is_source(self.model.shapes)
        assert self.family.known_as("0" * 32) == ""

    def test_the_trunk_is_a_run_of_main_layers(self) -> None:
        layers = {name: self.family.main_layer(name) for name in self.model.shapes}
        trunk = set(range(*self.model.spec.trunk_layers))
        assert {name for name, layer in layers.items() if layer in trunk} == set(self.model.network_shapes("trunk"))
        assert {layer for layer in layers.values() if layer is not None} == set(range(self.model.spec.layers))

    def test_what_a_source_shares_is_in_the_trunk_and_not_in_the_head(self) -> None:
        assert all(map(self.family.is_shared, self.model.network_shapes("trunk")))
        assert not any(map(self.family.is_shared, self.model.network_shapes("head")))

    def test_other_names_of_layers_stand_for_weights(self) -> None:
        for name, weights in self.family.aliases(self.model.shapes).items():
            assert f"{name}.weight" not in self.model.shapes
            assert weights
            assert len(weights) == 1 or all(len(self.model.shapes[weight]) in (2, 4) for weight in weights)

    def test_layers_of_only_the_source_are_not_the_models(self) -> None:
        for name, shape in self.family.replaced_layers(self.model.shapes).items():
            assert self.model.shapes.get(f"{name}.weight") != shape

    def test_larger_calls_cost_more(self) -> None:
        spec, costs = self.model.spec, network_costs(self.model)
        side = 8 * spec.size_multiple_px
        call_sizes = [CallSize(side, factor * side, 32 * factor) for factor in (1, 2)]
        small, large = (forward_flops(spec, costs, size) for size in call_sizes)
        assert count_tokens(spec, call_sizes[0]).image == (side // spec.patch_px) ** 2
        for network in NETWORKS:
            assert 0 < small[network].total < large[network].total, network
            assert small[network].linear_fp8 <= small[network].linear
        assert small["trunk"].linear_fp8 > 0
        assert small["trunk"].attention > 0

    def test_published_models_are_found_by_their_patch(self) -> None:
        for patch_px, model in self.family.published.items():
            assert model.spec.patch_px == patch_px
            assert model.spec.family == self.family.name

    @pytest.mark.parametrize("plan", ["fp16", "fp8", "fp8-attention"])
    def test_plans_have_roles_to_speak_of(self, plan: BasePrecision) -> None:
        found = plain_plan(self.model, plan)
        layouts = [self.model.layout(name) for name in NETWORKS]
        linear = {part.layer for layout in layouts for part in layout.linear_layers}
        inputs = {part.layer for layout in layouts for item in layout.attentions for part in item.inputs}
        wanted = {"fp16": set(), "fp8": linear, "fp8-attention": linear | inputs}[plan]
        assert {rule.layer for rule in found.rules if rule.dtype == FLOAT8} == wanted
        assert linear
        assert inputs
