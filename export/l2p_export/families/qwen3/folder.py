"""A Hugging Face folder with a Qwen3 model and its tokenizer, opened and checked from headers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from l2p_calib.layout import NetworkLayout
from l2p_export.families.qwen3.dimensions import TextEncoderConfig, network_shapes, read_config, require_inside
from l2p_export.tensors.files import open_folder_tensors
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.contract import TEXT_ENCODER, NetworkSpec, TensorSpec
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.text import CHAT_TEMPLATE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from l2p_export.tensors.sources import FileTensor

    Tensors = Mapping[str, NDArray[Any]]

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
TOKENIZER_NAME = "tokenizer.json"

_LAYER = "model.layers."


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """An opened text encoder; `graphs.export.export_graph` takes it as it takes a family's model.

    Attributes:
        tensors: what the network reads, under published names with the prefix `model.`.
        tokenizer: its `tokenizer.json`.
    """

    folder: Path
    config: TextEncoderConfig
    tensors: Mapping[str, FileTensor]
    tokenizer: Path

    @property
    def network(self) -> NetworkSpec:
        """Inputs and output: B prompts of L tokens, padded at the right."""
        return NetworkSpec(
            TEXT_ENCODER,
            (TensorSpec("input_ids", "int64", ("B", "L")), TensorSpec("attention_mask", "int64", ("B", "L"))),
            (TensorSpec("prompt_embeds", "float32", ("B", "L", self.config.sizes.width)),),
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Published name and shape of every tensor that the network reads."""
        return network_shapes(self.config)

    def network_shapes(self, network: str) -> dict[str, tuple[int, ...]]:
        """Published name and shape of every tensor that the network reads."""
        del network
        return self.shapes

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the tensors are read from."""
        return tuple(sorted({tensor.file.path for tensor in self.tensors.values()}))

    def module(
        self, network: str, dtype_of: Callable[[str], torch.dtype], blocks: Iterable[str] | None = None
    ) -> nn.Module:
        """Build the network on the current device, with uninitialised weights under published names."""
        from l2p_export.families.qwen3.networks import text_encoder_module

        return text_encoder_module(self.config, dtype_of, self.blocks(network) if blocks is None else blocks)

    def blocks(self, network: str) -> tuple[str, ...]:
        """Names of its layers, as `model.layers.5`; the last is not one of them."""
        del network
        return tuple(f"{_LAYER}{index}" for index in range(self.config.built_layers))

    def layout(self, network: str) -> NetworkLayout:
        """Nothing: no plan scales its layers, or has them in FP8."""
        return NetworkLayout(network, ())


def open_text_encoder(path: Path, caption_width: int) -> TextEncoder:
    """Open a Qwen3 folder, or a diffusers pipeline folder that holds one as `text_encoder` beside `tokenizer`.

    Args:
        path: the folder.
        caption_width: C of the model that the embeddings are for.

    Raises:
        UsageError: no folder.
        ArtifactError: another architecture or width, weights that are missing, misshapen or no floats, or a tokenizer
            that is absent, damaged or without the template's special tokens.
        HostError: `tokenizers` is not installed.
    """
    if not path.is_dir():
        raise UsageError(f"`{path}` is no folder", hint="give the Hugging Face folder of the text encoder")
    folder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    config = read_config(folder)
    if config.sizes.width != caption_width:
        raise ArtifactError(
            f"the text encoder `{folder}` makes embeddings of width {config.sizes.width}, the checkpoint takes "
            f"{caption_width}",
            hint="use the text encoder that the model was trained with: Qwen3-4B for the published ones",
        )
    tensors = _tensors(folder, config)
    tokenizer_file = _tokenizer_file(folder)
    _check_vocabulary(load_tokenizer(tokenizer_file, CHAT_TEMPLATE), tokenizer_file, config)
    return TextEncoder(folder, config, tensors, tokenizer_file)


def _tensors(folder: Path, config: TextEncoderConfig) -> dict[str, FileTensor]:
    """The tensors that the network reads; the last layer, the final norm and an output head may be there or not."""
    stored = open_folder_tensors(folder, "model")
    prefix = "" if any(name.startswith("model.") for name in stored) else "model."
    found = {name if name.startswith("lm_head.") else prefix + name: source for name, source in stored.items()}
    wanted = network_shapes(config)
    unused = (f"{_LAYER}{config.built_layers}.", "model.norm.", "lm_head.")
    faults = [f"missing `{name}`" for name in sorted(wanted.keys() - found.keys())]
    faults += [f"unknown `{name}`" for name in sorted(found.keys() - wanted.keys()) if not name.startswith(unused)]
    for name in sorted(wanted.keys() & found.keys()):
        if found[name].shape != wanted[name]:
            faults.append(f"`{name}` has shape {list(found[name].shape)}, expected {list(wanted[name])}")
        elif found[name].dtype not in FLOAT_DTYPES:
            faults.append(f"`{name}` is {found[name].dtype}, expected {', '.join(FLOAT_DTYPES)}")
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ArtifactError(
            f"the weights in `{folder}` are not those of its config.json: {'; '.join(faults[:8])}{more}",
            hint="fetch the whole folder again, unquantized",
        )
    return {name: found[name] for name in wanted}


def _tokenizer_file(folder: Path) -> Path:
    places = (
        folder / TOKENIZER_NAME,
        folder / "tokenizer" / TOKENIZER_NAME,
        folder.parent / "tokenizer" / TOKENIZER_NAME,
    )
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ArtifactError(
            f"`{folder}` has no {TOKENIZER_NAME}, and there is no folder `tokenizer` in it or beside it",
            hint="copy the model's tokenizer.json into the folder",
        )
    require_inside(found)
    return found


def _check_vocabulary(tokenizer: Tokenizer, path: Path, config: TextEncoderConfig) -> None:
    if tokenizer.vocabulary > config.sizes.vocabulary:
        raise ArtifactError(
            f"`{path}` has token numbers up to {tokenizer.vocabulary - 1}, the encoder has "
            f"{config.sizes.vocabulary} embedding rows",
            hint="the tokenizer is another model's",
        )


def torch_text_encoder(encoder: TextEncoder) -> nn.Module:
    """The network in torch float32 with the folder's weights."""
    import torch

    with torch.device("meta"):
        module = encoder.module(TEXT_ENCODER, lambda layer: torch.float32)
    state = {name: torch.from_numpy(read_tensor(encoder.tensors[name])) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module
