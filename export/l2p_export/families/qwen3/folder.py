"""Opens a Hugging Face folder with a Qwen3 model and its tokenizer, and checks it by reading only headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from l2p_export.families.qwen3.dimensions import LAYER, TextEncoderConfig, read_config
from l2p_export.families.qwen3.model import Qwen3Model
from l2p_export.tensors.files import open_folder_tensors
from l2p_export.tensors.folders import inside, model_folder
from l2p_export.tensors.sources import read_tensor
from l2p_runtime.contract import TEXT_ENCODER
from l2p_runtime.errors import ArtifactError, UsageError
from l2p_runtime.text import CHAT_TEMPLATE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import nn

    from l2p_export.tensors.sources import FileTensor

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """An opened text encoder.

    Attributes:
        model: its network, without weights.
        tensors: the tensors of the network, under published names with the prefix `model.`.
        tokenizer: its `tokenizer.json`.
    """

    folder: Path
    model: Qwen3Model
    tensors: Mapping[str, FileTensor]
    tokenizer: Path

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the tensors are read from."""
        return tuple(sorted({tensor.file.path for tensor in self.tensors.values()}))


def open_text_encoder(path: Path, caption_width: int) -> TextEncoder:
    """Open a Qwen3 folder, or a diffusers pipeline folder that holds one as `text_encoder` beside `tokenizer`.

    Args:
        path: the folder, or a model's folder in a Hugging Face cache.
        caption_width: C, the width of embeddings that the denoiser takes.

    Raises:
        UsageError: no folder.
        ArtifactError: another architecture or width, weights that are missing, misshapen or not floats, or a tokenizer
            that is absent, damaged or without the template's special tokens.
        HostError: `tokenizers` is not installed.
    """
    if not path.is_dir():
        raise UsageError(f"`{path}` is no folder", hint="give the Hugging Face folder of the text encoder")
    folder = model_folder(path)
    if (folder / "text_encoder").is_dir():
        folder = inside(folder, "text_encoder")
    config = read_config(folder)
    if config.sizes.width != caption_width:
        raise ArtifactError(
            f"the text encoder `{folder}` makes embeddings of width {config.sizes.width}, the checkpoint takes "
            f"{caption_width}",
            hint="use the text encoder that the model was trained with: Qwen3-4B for the published ones",
        )
    model = Qwen3Model(config)
    tensors = _tensors(folder, model)
    tokenizer_file = _tokenizer_file(folder)
    _check_vocabulary(load_tokenizer(tokenizer_file, CHAT_TEMPLATE), tokenizer_file, config)
    return TextEncoder(folder, model, tensors, tokenizer_file)


def _tensors(folder: Path, model: Qwen3Model) -> dict[str, FileTensor]:
    """The tensors that the network reads; a last layer, final norm and output head are ignored."""
    stored = open_folder_tensors(folder, "model")
    prefix = "" if any(name.startswith("model.") for name in stored) else "model."
    found = {name if name.startswith("lm_head.") else prefix + name: source for name, source in stored.items()}
    unused = (f"{LAYER}{model.config.built_layers}.", "model.norm.", "lm_head.")
    read = {name: tensor for name, tensor in found.items() if not name.startswith(unused)}
    faults = model.faults({name: tensor.shape for name, tensor in read.items()})
    faults += [
        f"`{name}` is {tensor.dtype}, expected {', '.join(FLOAT_DTYPES)}"
        for name, tensor in sorted(read.items())
        if name in model.shapes and tensor.dtype not in FLOAT_DTYPES
    ]
    if faults:
        more = f" and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise ArtifactError(
            f"the weights in `{folder}` are not those of its config.json: {'; '.join(faults[:8])}{more}",
            hint="fetch the whole folder again, unquantized",
        )
    return {name: found[name] for name in model.shapes}


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
    return inside(found.parent, found.name)


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
        module = encoder.model.module(TEXT_ENCODER, lambda layer: torch.float32)
    state = {name: torch.from_numpy(read_tensor(encoder.tensors[name])) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module
