"""Transfer of a tiny source to pixels: what is trained and what is not, what a step sees, what memory options cost."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fakes.sources import SIZE_PX, TEXTS, tiny_spec, write_tiny_corpus
from l2p_export.families.z_image_l2p.dimensions import expected_shapes, network_shapes, published_dimensions
from l2p_export.families.z_image_l2p.latent_shapes import latent_shapes
from l2p_export.families.z_image_l2p.pixel import PixelModel, Window, checkpoint_activations
from l2p_export.families.z_image_l2p.specs import model_spec
from l2p_export.tensors.sources import read_tensor
from l2p_export.training.corpus.corpus import Corpus, append_rows, open_corpus, write_image
from l2p_export.training.corpus.reader import image_reader
from l2p_export.training.flow import sample
from l2p_export.training.loop.distributed import ALONE, ProcessGroup
from l2p_export.training.loop.loop import CPU, Schedule
from l2p_export.training.source.folder import Source, encode_texts
from l2p_export.training.transfer.adapters import copy_adapters, trunk_sha256, write_adapters
from l2p_export.training.transfer.batches import Batch, batches, embed_captions
from l2p_export.training.transfer.model import initial_model
from l2p_export.training.transfer.spec import (
    PLAIN,
    TrainingOptions,
    TransferSpec,
    pixel_dimensions,
    require_compiler,
    require_split,
    transfer_dimensions,
)
from l2p_export.training.transfer.storage import StoredLinear
from l2p_export.training.transfer.train import transfer
from l2p_runtime.errors import ArtifactError, HostError, UsageError
from l2p_runtime.noise import normal_noise
from l2p_runtime.positions import rope_tables
from l2p_runtime.progress import Silent

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def batch(source: Source, corpus: Corpus) -> Batch:
    return batch_of(source, corpus, tiny_spec())


def batch_of(source: Source, corpus: Corpus, spec: TransferSpec, ranks: ProcessGroup = ALONE, micro: int = 0) -> Batch:
    d = transfer_dimensions(source, spec)
    return batches(corpus, embed_captions(source, corpus), d, spec, ranks)(3, micro)


def model_of(source: Source, storage: str = "float32") -> PixelModel:
    return initial_model(source, transfer_dimensions(source, tiny_spec()), 1, storage)


def call(model: nn.Module, batch: Batch, window: Window | None = None) -> Tensor:
    made: Tensor = model(batch.mixed, batch.time, batch.embeds.values, batch.embeds.mask, *batch.rope, window)
    return made


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    (call(model, batch) - batch.wanted).square().mean().backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The norm of what differs over the norm of all."""
    assert found.keys() == expected.keys()
    squares = [((found[name] - value).square().sum(), value.square().sum()) for name, value in expected.items()]
    apart, whole = (float(sum(pair[index] for pair in squares)) for index in range(2))
    return math.sqrt(apart / whole)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variant": "2k"}, "the variant is '2k', expected one of 1k, 4k, 8k, 10k"),
        ({"noise": "white"}, "noise is 'white', expected stored or fresh"),
        ({"sizes_px": ()}, "a size is 0 px"),
        ({"sizes_px": (64, 72)}, "a size is 72 px, expected a multiple of the 1k patch, 16 px"),
        (
            {"variant": "10k", "sizes_px": (480,)},
            "a size is 480 px, expected a multiple of the 10k two patches, 320 px",
        ),
        ({"variant": "10k", "sizes_px": (320,), "window_tokens": 1}, "the 10k head draws only whole images"),
        ({"window_tokens": 5}, "a window of 5 tokens is larger than an image of 64 px"),
        ({"window_tokens": -1}, "a window of -1 tokens"),
        ({"halo_tokens": 4}, "a halo of 4 tokens, expected 0 to 3, which is exact"),
        ({"halo_tokens": -1}, "a halo of -1 tokens"),
        ({"caption_dropout": 1.0}, "caption dropout is 1.0"),
        ({"caption_dropout": -0.1}, "caption dropout is -0.1"),
        ({"shift": 0.0}, "shift is 0.0 and head divisor 8, expected above 0, and 1 or more"),
        ({"shift": float("nan")}, "shift is nan"),
        ({"head_divisor": 0}, "head divisor 0, expected above 0, and 1 or more"),
    ],
)
def test_wrong_specs(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as refused:
        tiny_spec(**changes)
    assert says in str(refused.value)


@pytest.mark.parametrize("name", ["autocast", "trunk_storage", "optimizer_device"])
def test_wrong_means(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is 'half', expected"):
        TrainingOptions(**{name: "half"})


def test_batches_split_over_processes() -> None:
    schedule = Schedule(steps=1, batch=12, learning_rate=1.0, micro_batches=2)
    require_split(schedule, ProcessGroup(0, 3))
    with pytest.raises(UsageError, match="12 samples do not split into 2 micro batches of each of 4") as refused:
        require_split(schedule, ProcessGroup(0, 4))
    assert refused.value.hint == "make the batch a multiple of 8"


def test_the_trunk_stays_bit_for_bit(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    """Everything outside it moves, is written, and nothing else is."""
    out, spec = tmp_path / "a.safetensors", tiny_spec(steps=2, caption_dropout=0.5)
    start = model_of(source).state_dict()
    model = transfer(source, corpus, spec, out, tmp_path / "work", Silent(), metadata={"license": "MIT"})
    d = transfer_dimensions(source, spec)
    for name, parameter in model.trunk.named_parameters():
        assert parameter.grad is None
        assert parameter.equal(torch.from_numpy(read_tensor(source.transformer.tensors[name])))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("trunk.") for name in trained)
    assert not any(model.get_parameter(name).equal(start[name]) for name in trained)
    adapters = load_file(out)
    assert adapters.keys() == expected_shapes(d).keys() - network_shapes("trunk", d).keys()
    assert all(adapters[name.partition(".")[2]].equal(model.get_parameter(name).to(torch.bfloat16)) for name in trained)
    with safe_open(out, "pt") as file:
        assert file.metadata()["license"] == "MIT"
        assert file.metadata()["l2p.shift"] == "3"
        assert file.metadata()["l2p.base_grid"] == "4x4"


def test_positions_are_stretched_from_the_trained_grid(source: Source, corpus: Corpus) -> None:
    spec = tiny_spec(sizes_px=(SIZE_PX,), positions="linear", base_grid=(2, 1))
    batch = batch_of(source, corpus, spec)
    model = model_spec(transfer_dimensions(source, spec))
    model = replace(model, rotary=replace(model.rotary, base_grid=(2, 1)))
    for table, expected in zip(batch.rope, rope_tables(model, 4, 4, 32, "linear"), strict=True):
        np.testing.assert_array_equal(table.numpy(), expected)
    assert spec.trained_grid == (2, 1)
    assert tiny_spec(sizes_px=(32, SIZE_PX)).trained_grid == (4, 4)
    for wrong in ({"positions": "linear"}, {"positions": "rope"}):
        with pytest.raises(UsageError, match="position"):
            tiny_spec(**wrong)


def test_averaged_weights_are_what_is_shown(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    """While a saved state is shown, the model has the averages; training goes on from its own weights."""
    shown: list[dict[str, Tensor]] = []

    def remember(step: int, model: PixelModel) -> None:
        shown.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})

    spec = tiny_spec(steps=4, save_every=2)
    transfer(source, corpus, spec, tmp_path / "a.safetensors", tmp_path / "a", Silent(), remember)
    transfer(source, corpus, spec, tmp_path / "b.safetensors", tmp_path / "b", Silent())
    found, expected = (load_file(tmp_path / name / "step-00000004" / "state.safetensors") for name in "ab")
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    assert len(shown) == 2
    assert all(shown[-1][name[9:]].equal(expected[name]) for name in expected if name.startswith("averaged."))


def test_finished_adapters_are_written_again_where_they_are_gone(
    source: Source, corpus: Corpus, tmp_path: Path
) -> None:
    out = tmp_path / "a.safetensors"
    transfer(source, corpus, tiny_spec(steps=1), out, tmp_path / "work", Silent())
    before = {name: tensor.clone() for name, tensor in load_file(out).items()}
    out.unlink()
    transfer(source, corpus, tiny_spec(steps=1), out, tmp_path / "work", Silent())
    after = load_file(out)
    assert after.keys() == before.keys()
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def test_what_a_run_computes_is_part_of_its_settings(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    """Where its optimizer is, is not."""
    arguments = (source, corpus, tiny_spec(steps=1), tmp_path / "a.safetensors", tmp_path / "work", Silent())
    transfer(*arguments)
    transfer(*arguments, options=TrainingOptions(optimizer_device="cpu"))
    with pytest.raises(UsageError, match="trunk_storage is 'float8', it began with not set"):
        transfer(*arguments, options=TrainingOptions(trunk_storage="float8"))
    with pytest.raises(UsageError, match="autocast is 'bf16', it began with not set"):
        transfer(*arguments, options=TrainingOptions(autocast="bf16"))


def test_stored_noise_is_the_runtimes(source: Source, corpus: Corpus, batch: Batch) -> None:
    """Each image is mixed with the noise that its seed means everywhere, in the share that its time says."""
    images = image_reader(corpus, CPU)(range(len(corpus)), SIZE_PX)
    noises = [torch.from_numpy(noise_of(row.seed)) for row in corpus.rows]
    for index in range(len(batch.mixed)):
        sigma = 1 - batch.time[index]
        matches = [
            place
            for place, (image, noise) in enumerate(zip(images, noises, strict=True))
            if torch.allclose(batch.mixed[index], torch.lerp(image, noise, sigma), atol=1e-5)
        ]
        assert len(matches) == 1
        torch.testing.assert_close(batch.wanted[index], images[matches[0]] - noises[matches[0]])


def noise_of(seed: int | None) -> np.ndarray[Any, np.dtype[np.float32]]:
    assert seed is not None
    return normal_noise(seed, channels=3, rows=(0, SIZE_PX), cols=(0, SIZE_PX))


def test_stored_noise_needs_seeds(source: Source, tmp_path: Path) -> None:
    images = write_tiny_corpus(tmp_path / "renders", 2, with_seeds=False)
    with pytest.raises(UsageError, match="has no seed") as refused:
        transfer(source, images, tiny_spec(), tmp_path / "a.safetensors", tmp_path / "work", Silent())
    assert "--noise fresh" in refused.value.hint
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("noise", ["stored", "fresh"])
def test_a_steps_samples_do_not_depend_on_who_computes_them(source: Source, corpus: Corpus, noise: str) -> None:
    spec = tiny_spec(noise=noise, window_tokens=2, caption_dropout=0.5)
    whole = batch_of(source, corpus, spec)
    split = replace(spec, schedule=replace(spec.schedule, micro_batches=2))
    parts = [batch_of(source, corpus, split, ProcessGroup(rank, 2), micro) for rank in range(2) for micro in range(2)]
    for field in ("mixed", "time", "wanted"):
        assert torch.cat([getattr(part, field) for part in parts]).equal(getattr(whole, field))
    assert torch.cat([part.embeds.values for part in parts]).equal(whole.embeds.values)
    assert torch.cat([part.embeds.mask for part in parts]).equal(whole.embeds.mask)
    assert all(part.window == whole.window for part in parts)
    if noise == "fresh":
        assert len({float(image.sum()) for image in whole.mixed}) == len(whole.mixed)


def test_dropped_captions_are_the_empty_one(source: Source, corpus: Corpus) -> None:
    empty = encode_texts(source, [""], 32)
    for dropout, expected in ((0.0, 0), (0.999, 4)):
        embeds = batch_of(source, corpus, tiny_spec(caption_dropout=dropout)).embeds
        assert sum(bool(torch.equal(values, empty.values[0])) for values in embeds.values) == expected


@pytest.mark.parametrize("corner", [(0, 0), (1, 2), (2, 2)])
def test_a_window_is_what_the_whole_image_has_there(source: Source, corpus: Corpus, corner: tuple[int, int]) -> None:
    spec = tiny_spec(sizes_px=(160,), variant="1k")
    made, model = batch_of(source, corpus, spec), model_of(source)
    top, left = (3 * each for each in corner)
    window = Window(slice(top, top + 2), slice(left, left + 3))
    with torch.no_grad():
        whole, part = call(model, made), call(model, made, window)
    expected = whole[:, :, 16 * top : 16 * (top + 2), 16 * left : 16 * (left + 3)]
    assert part.shape == expected.shape
    torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("halo", [0, 1])
def test_a_narrow_halo_is_a_smaller_image_to_the_head(source: Source, corpus: Corpus, halo: int) -> None:
    made, model = batch_of(source, corpus, tiny_spec(sizes_px=(160,), variant="1k")), model_of(source)
    heads: list[tuple[int, ...]] = []
    hook = model.head.register_forward_pre_hook(lambda module, inputs: heads.append(tuple(inputs[1].shape[1:3])))
    with torch.no_grad():
        part = call(model, made, Window(slice(4, 6), slice(0, 3), halo))
    hook.remove()
    assert part.shape[2:] == (32, 48)
    # The image ends at the left.
    assert heads == [(2 + 2 * halo, 3 + halo)]
    assert batch_of(source, corpus, tiny_spec(window_tokens=2, halo_tokens=halo)).window.halo_tokens == halo  # type: ignore[union-attr]


def test_adapters_begin_as_others_of_the_trunk(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    """Another variant takes what fits: refiners, outer layers, embedder of captions, the inner stages of the head."""
    first = tmp_path / "first.safetensors"
    transfer(source, corpus, tiny_spec(steps=1), first, tmp_path / "work", Silent())
    spec = tiny_spec(variant="4k", sizes_px=(128,), steps=1)
    d = transfer_dimensions(source, spec)
    model, plain = (initial_model(source, d, 1) for _ in range(2))
    copied = copy_adapters(first, model, trunk_sha256(source, d), Silent())
    assert len(copied) == 64
    begun = {name.partition(".")[2]: value for name, value in model.named_parameters()}
    written = load_file(first)
    layer = "layers.0.feed_forward.w1.weight"
    assert begun[layer].to(torch.bfloat16).equal(written[layer])
    frozen = dict(model.trunk.named_parameters())
    assert all(value.equal(frozen[name]) for name, value in plain.trunk.named_parameters())
    transfer(source, corpus, spec, tmp_path / "second.safetensors", tmp_path / "work4", Silent(), init=first)
    with pytest.raises(UsageError, match="init"):
        transfer(source, corpus, spec, tmp_path / "second.safetensors", tmp_path / "work4", Silent())


def test_larger_patches_begin_as_smaller_ones_on_a_reduced_picture(
    source: Source, corpus: Corpus, tmp_path: Path
) -> None:
    """Four pixels of one value embed as one pixel did, and new decoder stages pass on their first channels."""
    first = tmp_path / "first.safetensors"
    transfer(source, corpus, tiny_spec(steps=1), first, tmp_path / "work", Silent())
    models = []
    for variant, size_px in (("1k", SIZE_PX), ("4k", 256)):
        d = transfer_dimensions(source, tiny_spec(variant=variant, sizes_px=(size_px,)))
        model = initial_model(source, d, 1)
        copy_adapters(first, model, trunk_sha256(source, d), Silent())
        models.append(model)
    small, large = models
    values = torch.randn(2, 4, 4, 16, 16, 3, generator=torch.Generator().manual_seed(1))
    rows = values.flatten(3).flatten(1, 2)
    enlarged = values.repeat_interleave(4, 3).repeat_interleave(4, 4).flatten(3).flatten(1, 2)
    with torch.no_grad():
        expected = small.stem.all_x_embedder["16-1"](rows)
        assert torch.allclose(large.stem.all_x_embedder["64-1"](enlarged), expected, atol=1e-5)
    for name in ("up0", "dec0", "up0b", "dec0b"):
        (weight,) = (
            value
            for _, value in large.head.get_submodule(f"local_decoder.{name}").named_parameters()
            if value.ndim == 4
        )
        passed = weight[:, : len(weight)]
        assert passed.equal(nn.init.dirac_(torch.empty_like(passed)))
    skipped = large.head.get_parameter("local_decoder.dec0.0.weight")
    assert skipped[:, len(skipped) :].abs().min() > 0


@pytest.mark.parametrize("weight", [None, (3,), (64, 767), (7, 768), (64, 768)])
def test_a_patch_embedder_that_is_absent_or_misshapen_is_left_out(
    source: Source, tmp_path: Path, weight: tuple[int, ...] | None
) -> None:
    """The last one has the right shape and no bias."""
    d = transfer_dimensions(source, tiny_spec(variant="4k", sizes_px=(128,)))
    model = initial_model(source, d, 1)
    before = model.stem.get_parameter("all_x_embedder.64-1.weight").clone()
    tensors = dict(model.tail.named_parameters(prefix="tail"))
    if weight is not None:
        tensors["stem.all_x_embedder.16-1.weight"] = torch.zeros(weight)
    digest = trunk_sha256(source, d)
    write_adapters(tmp_path / "odd.safetensors", tensors, digest, {})
    copy_adapters(tmp_path / "odd.safetensors", model, digest, Silent())
    assert model.stem.get_parameter("all_x_embedder.64-1.weight").equal(before)


def test_adapters_are_the_same_bytes_each_time_and_as_open_as_other_files(tmp_path: Path) -> None:
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    trained = {"head.b": values, "tail.a": values.T, "stem.c": torch.tensor(1.0)}
    for number, order in enumerate((trained, dict(reversed(trained.items())))):
        write_adapters(tmp_path / f"{number}.safetensors", order, "0" * 64, {"license": "MIT"})
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "1.safetensors").read_bytes()
    (tmp_path / "plain").touch()
    assert (tmp_path / "0.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    found = load_file(tmp_path / "0.safetensors")
    assert list(found) == ["a", "b", "c"]
    for name, tensor in trained.items():
        assert found[name.partition(".")[2]].equal(tensor.to(torch.bfloat16))


def test_adapters_of_another_trunk_begin_nothing(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    model = model_of(source)
    write_adapters(other, dict(model.tail.named_parameters(prefix="tail")), "f" * 64, {})
    with pytest.raises(ArtifactError, match=f"belongs to trunk {'f' * 16}, the source has trunk") as refused:
        transfer(source, corpus, tiny_spec(), tmp_path / "a.safetensors", tmp_path / "work", Silent(), init=other)
    assert refused.value.hint == "begin with adapters that were trained from the same source"
    digest = trunk_sha256(source, transfer_dimensions(source, tiny_spec()))
    write_adapters(other, {"tail.layers.0.strange": torch.zeros(1)}, digest, {})
    with pytest.raises(ArtifactError, match="nothing in"):
        copy_adapters(other, model, digest, Silent())


def test_windows_train_on_their_own_pixels(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    spec = tiny_spec(steps=1, window_tokens=2)
    cut, whole = batch_of(source, corpus, spec), batch_of(source, corpus, tiny_spec(steps=1))
    assert cut.window is not None
    rows, columns = cut.window.rows, cut.window.columns
    expected = whole.wanted[:, :, 16 * rows.start : 16 * rows.stop, 16 * columns.start : 16 * columns.stop]
    assert cut.wanted.equal(expected)
    transfer(source, corpus, spec, tmp_path / "a.safetensors", tmp_path / "work", Silent())


def test_checkpointing_changes_no_gradient(source: Source, batch: Batch) -> None:
    plain, recomputed = model_of(source), model_of(source)
    checkpoint_activations(recomputed)
    expected = gradients(plain, batch)
    assert expected.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    assert difference(gradients(recomputed, batch), expected) < 1e-6


def test_a_bf16_trunk_of_a_bf16_source_is_exact(source: Source, batch: Batch) -> None:
    plain, stored = model_of(source), model_of(source, "bfloat16")
    kept = [part for part in stored.trunk.modules() if isinstance(part, StoredLinear)]
    assert len(kept) == 8
    assert all(part.weight.dtype == torch.bfloat16 and part.relative_error == 0 for part in kept)
    assert call(stored, batch).equal(call(plain, batch))
    assert difference(gradients(stored, batch), gradients(plain, batch)) < 1e-6


def test_an_fp8_trunk_is_near(source: Source, batch: Batch) -> None:
    """E4M3 rounds to 3 bits: 2.6 hundredths, root mean square. Gradients reach what lies before the trunk."""
    plain, stored = model_of(source), model_of(source, "float8")
    kept = [part for part in stored.trunk.modules() if isinstance(part, StoredLinear)]
    assert all(part.weight.dtype == torch.float8_e4m3fn for part in kept)
    for part in kept:
        assert part.scale is not None
        assert torch.frexp(part.scale).mantissa.eq(0.5).all()
        assert 0.02 < part.relative_error < 0.03
    assert not any(isinstance(part, StoredLinear) for part in (*stored.stem.modules(), *stored.tail.modules()))
    found, expected = gradients(stored, batch), gradients(plain, batch)
    assert any(name.startswith("stem.layers.0") for name in found)
    assert 0 < difference(found, expected) < 0.1


def test_rounding_is_said(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    said: list[str] = []
    report = SimpleNamespace(note=said.append, phases=Silent().phases, task=Silent().task)
    spec, work = tiny_spec(steps=1), tmp_path / "work"
    transfer(
        source,
        corpus,
        spec,
        tmp_path / "a.safetensors",
        work / "8",
        report,
        options=TrainingOptions(trunk_storage="float8"),
    )
    assert len(said) == 1
    assert "--trunk-storage float8 moves the frozen trunk's values by up to 0.02" in said[0]
    exact = TrainingOptions(trunk_storage="bfloat16")
    transfer(source, corpus, spec, tmp_path / "b.safetensors", work / "16", report, options=exact)
    assert len(said) == 1


def test_a_source_that_lacks_a_tensor_is_refused(source: Source) -> None:
    tensors = dict(source.transformer.tensors)
    del tensors["cap_pad_token"]
    damaged = replace(source, transformer=replace(source.transformer, tensors=tensors))
    with pytest.raises(ArtifactError, match=r"needs `cap_pad_token` \[1, 48\] from the source, which lacks it"):
        model_of(damaged)


def test_a_short_transfer_learns_colours(source: Source, tmp_path: Path) -> None:
    """120 steps lower the loss, and samples have backgrounds of the corpus's colours."""
    colours = {TEXTS[0]: (210, 60, 40), TEXTS[1]: (200, 110, 60)}
    rows = []
    for seed in range(8):
        text = TEXTS[seed % 2]
        pixels = np.full((32, 32, 3), colours[text], np.uint8)
        pixels[8:20, 10:22] = 20
        rows.append(write_image(tmp_path / "corpus", seed, pixels, text, seed))
    append_rows(tmp_path / "corpus", rows)
    corpus = open_corpus(tmp_path / "corpus")
    spec = tiny_spec(120, sizes_px=(32,), learning_rate=2e-3, cooldown_steps=40, ema=0.97, shift=1.0)
    before = background_error(source, model_of(source), colours)
    model = transfer(source, corpus, spec, tmp_path / "a.safetensors", tmp_path / "work", Silent())
    lines = (tmp_path / "work" / "progress.csv").read_text().splitlines()[1:]
    losses = [float(line.split(",")[2]) for line in lines]
    after = background_error(source, model, colours)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert after < 0.5 * before


def background_error(source: Source, model: PixelModel, colours: dict[str, tuple[int, int, int]]) -> float:
    """Mean distance of samples' mean background from the right one, of 255."""
    d = pixel_dimensions(source.transformer, tiny_spec())
    embeds = encode_texts(source, list(colours), 32)
    tables = [torch.from_numpy(table) for table in rope_tables(model_spec(d), 2, 2, 32)]
    noise = torch.from_numpy(np.stack([normal_noise(s, channels=3, rows=(0, 32), cols=(0, 32)) for s in (90, 91)]))

    def predict(mixed: Tensor, time: Tensor, has_caption: bool) -> Tensor:
        made: Tensor = model(mixed, time, embeds.values, embeds.mask, *tables)
        return made

    made = (sample(predict, noise, 8, 1.0, 1.0) + 1) * 127.5
    found = torch.cat([made[:, :, :6].flatten(2), made[:, :, 26:].flatten(2)], dim=2).mean(dim=2)
    return float((found - torch.tensor(list(colours.values()))).abs().mean())


def test_the_published_configuration_trains_on_the_meta_device() -> None:
    """The recipe on a source of the published shapes: forward and backward of one window, without a byte of weights."""
    d = published_dimensions("1k")
    tensors = {name: SimpleNamespace(shape=shape) for name, shape in latent_shapes(d).items()}
    transformer = SimpleNamespace(tensors=tensors, shapes={name: tensor.shape for name, tensor in tensors.items()})
    spec = TransferSpec(
        "1k", (1024,), Schedule(steps=1, batch=2, learning_rate=5e-5), window_tokens=16, checkpointing=True
    )
    assert pixel_dimensions(transformer, spec) == d  # type: ignore[arg-type]
    with torch.device("meta"):
        model = PixelModel(d)
    model.trunk.requires_grad_(requires_grad=False)
    checkpoint_activations(model)
    with torch.device("meta"):
        mixed, tables = torch.empty(2, 3, 1024, 1024), [torch.empty(4096 + 64, 64) for _ in range(2)]
        embeds, mask = torch.empty(2, 64, 2560), torch.empty(2, 64, dtype=torch.bool)
        window = Window(slice(8, 24), slice(48, 64))
        made = model(mixed, torch.empty(2), embeds, mask, *tables, window)
    assert made.shape == (2, 3, 256, 256)
    made.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == 2_548_257_795
    assert all(p.grad is not None and p.grad.shape == p.shape for p in trained.values())
    assert all(parameter.grad is None for parameter in model.trunk.parameters())


def test_plain_means_change_no_settings() -> None:
    assert set(PLAIN.settings.values()) == {None}
    assert asdict(PLAIN) == {
        "autocast": "none",
        "trunk_storage": "float32",
        "optimizer_device": "same",
        "is_compiled": False,
    }


@pytest.mark.parametrize(
    ("device", "says"),
    [("cpu", "needs a C\\+\\+ compiler, and `no-such-compiler` is not on PATH"), ("cuda", "needs Triton on a GPU")],
)
def test_without_a_compiler_nothing_is_compiled(device: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ranks = replace(ALONE, device=torch.device(device))
    require_compiler(PLAIN, ranks)
    with pytest.raises(HostError, match=says) as refused:
        require_compiler(TrainingOptions(is_compiled=True), ranks)
    assert refused.value.hint.startswith("install it, or leave --compile out")


# What torch warns of in its own code while it compiles: deprecated names, `.grad` of what is no leaf.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_compiled_head_learns_the_same(source: Source, corpus: Corpus, tmp_path: Path) -> None:
    learnt = {}
    for name, options in {"plain": PLAIN, "compiled": TrainingOptions(is_compiled=True)}.items():
        out = tmp_path / f"{name}.safetensors"
        transfer(source, corpus, tiny_spec(), out, tmp_path / name, Silent(), options=options)
        learnt[name] = load_file(out)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert difference(learnt["compiled"], learnt["plain"]) < 1e-3
