"""Renames the tensors of a `z_image_l2p` file, in any spelling, to published names (docs/model.md, "Spellings")."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from l2p_export.families.company import sort_tensors, without_prefix
from l2p_export.families.z_image_l2p.latent_shapes import LATENT_PATCH_VALUES
from l2p_export.tensors.checkpoint import Checkpoint, Spelling
from l2p_export.tensors.files import Weights
from l2p_export.tensors.quantized import with_scales
from l2p_export.tensors.sources import FileTensor, JoinedTensor, TensorSource
from l2p_runtime.errors import ArtifactError

NODE_UI_PREFIX = "model.diffusion_model."

_RENAMES = (
    (".attention.out.", ".attention.to_out.0."),
    (".attention.q_norm.", ".attention.norm_q."),
    (".attention.k_norm.", ".attention.norm_k."),
)
_PIXEL_EMBEDDER = re.compile(r"all_x_embedder\.(?!2-1\.)\d+-1\.weight")
_TELLING = re.compile(r"local_decoder\.|all_x_embedder\.|all_final_layer\.|(?:noise|context)_refiner\.\d")

# The blocks of a Qwen3 text encoder are named `layers.N` too.
_OWN = re.compile(
    r"(?:layers|noise_refiner|context_refiner)\.\d+\.(?!self_attn|mlp|input_layernorm|post_attention_layernorm)"
    r"|(?:all_x_embedder|x_embedder|all_final_layer|final_layer|t_embedder|cap_embedder|local_decoder)\."
    r"|(?:(?:x|cap)_pad_token|scaled_fp8)$"
)


def claims(names: Iterable[str]) -> bool:
    """Whether any name is one that only Z-Image and L2P files use."""
    return any(_TELLING.match(without_prefix(name, is_own)) for name in names)


def is_own(name: str) -> bool:
    """Whether a name without prefix begins as those of Z-Image's and L2P's tensors do, in any spelling."""
    return bool(_OWN.match(name))


def read_checkpoint(weights: Weights) -> Checkpoint:
    """Rename tensors to published names: no prefix, split q/k/v, embedder named after its patch; join FP8 scales.

    Raises:
        ArtifactError: two tensors claim one name, a fused matrix does not split in three, or a quantized layout that is
            not read.
    """
    found = sort_tensors(weights.path, weights.tensors, is_own)
    model = with_scales(replace(weights, tensors={n: tensor for n, tensor in found.model.items() if is_own(n)}))
    unknown = {name: tensor for name, tensor in found.model.items() if not is_own(name)}
    tensors: dict[str, TensorSource] = {}
    claimed_by: dict[str, str] = {}
    fused = False
    for bare, whole in (*model.tensors.items(), *unknown.items()):
        stored = whole.info.name
        for name, source in _published(model, bare, whole):
            if name in tensors:
                raise ArtifactError(f"`{weights.path}`: `{claimed_by[name]}` and `{stored}` both hold `{name}`")
            tensors[name], claimed_by[name] = source, stored
            fused |= ".qkv." in bare
    return Checkpoint(weights.path, Spelling(found.prefix, fused), tensors, weights.metadata, found.company)


def node_ui_tensors(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Rename tensors from published names to ComfyUI's: prefix, fused q/k/v, an embedder without its patch."""
    spelled: dict[str, TensorSource] = {}
    for name, source in tensors.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            parts = tuple(tensors[name.replace(".to_q.", f".{part}.")] for part in ("to_q", "to_k", "to_v"))
            spelled[NODE_UI_PREFIX + name.replace(".to_q.", ".qkv.")] = JoinedTensor(parts)
            continue
        for new, old in _RENAMES:
            name = name.replace(old, new)  # noqa: PLW2901 - one name, renamed step by step
        if name.startswith("all_x_embedder."):
            name = "x_embedder." + name.rpartition(".")[2]  # noqa: PLW2901
        spelled[NODE_UI_PREFIX + name] = source
    return spelled


def layer_aliases(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """ComfyUI's layer names to published weights: fused q/k/v, `attention.out`, norms, the bare embedder."""
    fused = tuple(f".attention.{part}.weight" for part in ("to_q", "to_k", "to_v"))
    found: dict[str, tuple[str, ...]] = {}
    for name, shape in shapes.items():
        if not name.endswith(".weight"):
            continue
        layer = name.removesuffix(".weight")
        for projection in "qk":
            if layer.endswith(f".attention.norm_{projection}"):
                found[layer.removesuffix(f"norm_{projection}") + f"{projection}_norm"] = (name,)
        if len(shape) not in (2, 4):
            continue
        if layer.endswith(".attention.to_out.0"):
            found[layer.removesuffix("to_out.0") + "out"] = (name,)
        if layer.startswith("all_x_embedder."):
            found["x_embedder"] = (name,)
        block = name.removesuffix(fused[0])
        parts = tuple(block + part for part in fused)
        if block != name and all(part in shapes for part in parts):
            found[f"{block}.attention.qkv"] = parts
    return found


def replaced_layers(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The layers at the latent model's ends, as diffusers and ComfyUI name them, to the shapes of their weights."""
    embedder = next((shape for name, shape in shapes.items() if _PIXEL_EMBEDDER.fullmatch(name)), None)
    if embedder is None:
        return {}
    width = embedder[0]
    time_width = next((shape[1] for name, shape in shapes.items() if name.endswith(".adaLN_modulation.0.weight")), 0)
    ends = {"linear": (LATENT_PATCH_VALUES, width), "adaLN_modulation.1": (width, time_width)}
    embedders = ("all_x_embedder.2-1", "x_embedder")
    finals = ("all_final_layer.2-1", "final_layer")
    found: dict[str, tuple[int, ...]] = dict.fromkeys(embedders, (width, LATENT_PATCH_VALUES))
    return found | {f"{final}.{end}": shape for final in finals for end, shape in ends.items()}


def _published(weights: Weights, name: str, whole: FileTensor) -> Iterator[tuple[str, TensorSource]]:
    if name.endswith(".attention.qkv.weight"):
        if not whole.shape or whole.shape[0] % 3:
            raise ArtifactError(
                f"`{weights.path}`: `{whole.info.name}` has shape {list(whole.shape)}, its rows do not split in three"
            )
        rows = whole.shape[0] // 3
        for index, projection in enumerate(("to_q", "to_k", "to_v")):
            yield name.replace(".qkv.", f".{projection}."), whole.rows(index * rows, rows)
        return
    for old, new in _RENAMES:
        name = name.replace(old, new)
    if name.startswith("x_embedder."):
        name = f"all_x_embedder.{_patch_px(weights)}-1." + name.removeprefix("x_embedder.")
    if name.startswith("final_layer."):
        name = "all_final_layer.2-1." + name.removeprefix("final_layer.")
    yield name, whole


def _patch_px(weights: Weights) -> int:
    """The patch size of an embedder whose name lacks it: it has 3 p p inputs."""
    source = weights.tensors.get("x_embedder.weight")
    if source is None or len(source.shape) != 2:
        return 0
    return 2 if source.shape[1] == LATENT_PATCH_VALUES else math.isqrt(source.shape[1] // 3)
