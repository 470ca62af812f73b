"""Pipeline folders of latent sources, in diffusers' format: writing the trained parts, and opening them.

The same code opens the small source and the published Z-Image.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from l2p_export.families import family_of
from l2p_export.families.qwen3 import open_text_encoder
from l2p_export.families.qwen3.folder import torch_text_encoder
from l2p_export.families.z_image_l2p.dimensions import Dimensions
from l2p_export.families.z_image_l2p.pixel import published_state
from l2p_export.tensors.checkpoint import Checkpoint
from l2p_export.tensors.files import open_weights
from l2p_export.training.source.model import TEXT_ENCODER, SourceModel
from l2p_runtime.bundle import file_stamp
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.files import commit_file, partial_folder
from l2p_runtime.text import CHAT_TEMPLATE, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import tokenizers
    from diffusers import AutoencoderKL

    from l2p_export.families.qwen3 import TextEncoder

_INDEX_NAME = "model_index.json"
TOKENS_MULTIPLE = 32

PARTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
"""Folders of a pipeline folder."""

# The published template for one user message, as a Jinja template for transformers.
_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Source:
    """An opened pipeline folder; the transformer's weights are still in their files.

    Attributes:
        text: torch network from token ids to hidden states.
        shift: of the sigma schedule.
    """

    folder: Path
    transformer: Checkpoint
    text: nn.Module
    tokenizer: Tokenizer
    shift: float


@dataclass(frozen=True, slots=True)
class Embeds:
    """Prompt embeddings of one padded length: values [N,T,C], and a mask [N,T] that is true for real tokens."""

    values: Tensor
    mask: Tensor


def write_source(
    folder: Path,
    model: SourceModel,
    d: Dimensions,
    autoencoder: AutoencoderKL,
    tokenizer: tokenizers.Tokenizer,
    shift: float,
) -> None:
    """Write a trained source as a pipeline folder with BF16 weights. A folder with an index file is complete.

    Raises:
        HostError: the folder cannot be written.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import PreTrainedTokenizerFast, Qwen3Model

    transformer = ZImageTransformer2DModel(
        dim=d.width,
        n_layers=d.layers,
        n_refiner_layers=d.noise_refiners,
        n_heads=d.heads,
        n_kv_heads=d.heads,
        cap_feat_dim=d.caption_width,
        axes_dims=[d.head_width // 4, d.head_width * 3 // 8, d.head_width * 3 // 8],
        axes_lens=[1024, 512, 512],
    )
    transformer.load_state_dict(published_state(model.latent))
    text = Qwen3Model(qwen3_config(dtype="bfloat16"))
    # Not strict: the last layer and the final norm come after the hidden state that is used, and were not trained.
    text.load_state_dict(
        {name.removeprefix("model."): value for name, value in model.text.state_dict().items()}, strict=False
    )
    # Keeps the path of this machine out of the file.
    autoencoder.register_to_config(_name_or_path="")
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=autoencoder,
        text_encoder=text,
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=_TEMPLATE,
            pad_token="<|endoftext|>",  # noqa: S106 - no password
            eos_token="<|im_end|>",  # noqa: S106
            padding_side="right",
            truncation_side="right",
        ),
        transformer=transformer,
    )
    for part in (transformer, text, autoencoder):
        # PyTorch's method: the library's override warns about things that do not apply here.
        nn.Module.to(part, torch.bfloat16)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial_folder(folder / "pipeline") as written, _no_progress_bar():
            pipeline.save_pretrained(written)
            _commit(written, folder)
    except OSError as error:
        raise HostError(f"cannot write `{folder}`: {error.strerror or error}", hint="make room, then again") from error


def _commit(written: Path, folder: Path) -> None:
    """Move the files of a pipeline into its folder, the index last."""
    mode = stat.S_IMODE((written / _INDEX_NAME).stat().st_mode)
    files = [path for path in written.rglob("*") if path.is_file()]
    for path in sorted(files, key=lambda path: (path.name == _INDEX_NAME, path)):
        target = folder / path.relative_to(written)
        target.parent.mkdir(parents=True, exist_ok=True)
        # The files of safetensors are readable only by their owner.
        path.chmod(mode)
        commit_file(path, target)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def qwen3_config(**changes: Any) -> Any:
    """The small text encoder's configuration as transformers' `Qwen3Config`."""
    from transformers import Qwen3Config

    sizes = TEXT_ENCODER.sizes
    return Qwen3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_width,
        intermediate_size=sizes.ffn_width,
        rms_norm_eps=TEXT_ENCODER.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": TEXT_ENCODER.rope_theta},
        **changes,
    )


def open_source(folder: Path) -> Source:
    """Open a pipeline folder as a source: transformer, text encoder, tokenizer, schedule.

    Raises:
        UsageError: not a pipeline folder.
        ArtifactError: a part is damaged, of another family, or does not fit the others.
    """
    transformer, encoder = open_headers(folder)
    return Source(
        folder,
        transformer,
        torch_text_encoder(encoder),
        load_tokenizer(encoder.tokenizer, CHAT_TEMPLATE),
        _shift(folder / "scheduler" / "scheduler_config.json"),
    )


def open_headers(folder: Path) -> tuple[Checkpoint, TextEncoder]:
    """Open the transformer and the text encoder of a pipeline folder, without reading weights.

    Raises:
        As `open_source`.
    """
    if not (folder / _INDEX_NAME).is_file():
        raise UsageError(
            f"`{folder}` is no pipeline folder: it has no model_index.json",
            hint="give a folder that `train source` wrote, or a published Z-Image folder",
        )
    weights = open_weights(folder)
    transformer = family_of(weights).read(weights)
    if not any(name.startswith("all_final_layer.") for name in transformer.tensors):
        raise ArtifactError(
            f"`{weights.path}` is no latent transformer",
            hint="a source must be a latent model; this is already an L2P model",
        )
    caption_width = transformer.tensors["cap_embedder.0.weight"].shape[0]
    return transformer, open_text_encoder(folder, caption_width)


def load_autoencoder(source: Source) -> AutoencoderKL:
    """The autoencoder of a source, in float32.

    Raises:
        ArtifactError: it is damaged or missing.
    """
    from diffusers import AutoencoderKL

    try:
        model = AutoencoderKL.from_pretrained(source.folder / "vae", local_files_only=True)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"`{source.folder / 'vae'}` is no autoencoder: {error}", hint="fetch the folder again"
        ) from error
    # PyTorch's method, as in `write_source`.
    nn.Module.to(model, torch.float32)
    return model.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def encode_texts(source: Source, texts: Sequence[str], tokens: int | None = None) -> Embeds:
    """Embed prompts, padded to `tokens`, or to the smallest multiple of 32 that holds the longest.

    Raises:
        UsageError: a prompt is longer than the text encoder or `tokens` takes.
    """
    rows = [source.tokenizer.tokens(text) for text in texts]
    longest = max(map(len, rows))
    padded = -(-longest // TOKENS_MULTIPLE) * TOKENS_MULTIPLE if tokens is None else tokens
    if longest > padded:
        raise UsageError(f"a prompt has {longest} tokens, expected up to {padded}", hint="shorten it")
    ids = torch.zeros(len(rows), padded, dtype=torch.long)
    mask = torch.zeros(len(rows), padded, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = True
    parts = [source.text(ids[i : i + 64], mask[i : i + 64].long()) for i in range(0, len(rows), 64)]
    values = torch.cat(parts) * mask.unsqueeze(-1)
    return Embeds(values, mask)


def folder_digest(folder: Path, parts: Sequence[str] = PARTS) -> str:
    """Digest of parts of a source from names, sizes and stamps of their files, without reading gigabytes of weights."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((folder / part).glob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                digest.update(f"{name}\0{path.stat().st_size}\0{file_stamp(path)}\n".encode())
    return digest.hexdigest()


def _shift(path: Path) -> float:
    try:
        config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        shift = float(config.get("shift", 1.0))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"`{path}` is no scheduler configuration: {error}", hint="fetch the folder again"
        ) from error
    if not 0 < shift < 1000:
        raise ArtifactError(f"`{path}` has shift {shift}, expected a positive number")
    return shift
