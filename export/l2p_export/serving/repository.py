"""Writes a model repository from a bundle: one folder per model, one increasing version per bundle.

    l2p/config.pbtxt            configuration of the model
    l2p/warmup/                 inputs of the image that an instance draws before it is ready
    l2p/1/model.py, glue.py     code that the server runs
    l2p/1/bundle/               the bundle that it runs on

A version folder appears only when it is complete, so a server that polls meanwhile loads the old or the new version.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from l2p_engines.store.locks import locked
from l2p_export.build.pack import pack, pack_manifest
from l2p_export.serving.configs import (
    DIGEST,
    IMAGE_MODELS,
    NETWORK_PREFIX,
    PRODUCER,
    STREAMING,
    WARM_UP_FOLDER,
    Placement,
    WarmUp,
    config_text,
    image_config,
    network_config,
    plan_file,
    warm_up_files,
)
from l2p_runtime.backends import backend_names
from l2p_runtime.bundle import file_digest, open_bundle
from l2p_runtime.contract import (
    TEXT_ENCODER,
    EngineRecord,
    Manifest,
    bundle_digest,
    manifest_to_bytes,
    target_from_spelling,
)
from l2p_runtime.errors import ArtifactError, HostError, InternalError, UsageError
from l2p_runtime.files import atomic_folder, sweep_partials, write_bytes
from l2p_runtime.memory import parse_bytes
from l2p_runtime.requests import check_size
from l2p_runtime.serving import Limits, ServiceSpec

if TYPE_CHECKING:
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.progress import Reporter
    from l2p_runtime.requests import PixelDType

NETWORKS_MODEL = "networks"
CONFIG = "config.pbtxt"
BUNDLE = "bundle"
LOCK = ".l2p.lock"
VERSIONS_KEPT = 2
PROMPT_BYTES = 16_384
STEPS_MAX = 1000

_TEMPLATES = Path(__file__).parents[1] / "data" / "triton_models"


@dataclass(frozen=True, slots=True)
class RepositorySpec:
    """Settings of a repository.

    Attributes:
        models: names from `IMAGE_MODELS` and `networks`; empty for all that the bundle can serve.
        backend: as in `Pipeline.open`.
        plan: precision plan; None keeps all and runs the first that the backend runs.
        memory_budget: as in `Pipeline.open`; empty for the free memory of the device.
        dtype: dtype of the images.
        preview_px: longest side of a preview.
        pixels: maximum pixels of one image; None for the maximum of the bundle's profiles.
        steps: maximum steps of one image; None for four times the bundle's default.
        prompt_bytes: maximum bytes of a prompt.
        placement: where the models run.
        warm_up: size of the image that an instance draws first; None for the minimum size of the first profile.
        bundle_at: absolute path where the server finds the bundle, instead of a copy in each model.
    """

    models: tuple[str, ...] = ()
    backend: str = "auto"
    plan: str | None = None
    memory_budget: str = ""
    dtype: PixelDType = "uint8"
    preview_px: int = 512
    pixels: int | None = None
    steps: int | None = None
    prompt_bytes: int = PROMPT_BYTES
    placement: Placement = field(default_factory=Placement)
    warm_up: WarmUp | None = None
    bundle_at: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """The state of a repository.

    Attributes:
        versions: model to its latest version.
        new: models whose version is new.
        updated: models of the same version whose configuration or warm-up is new.
    """

    root: Path
    digest: str
    versions: Mapping[str, int]
    new: tuple[str, ...]
    updated: tuple[str, ...] = ()


def write_repository(
    bundle: Bundle, root: Path, spec: RepositorySpec, reporter: Reporter, *, dry_run: bool = False
) -> Written:
    """Write or update the models of a bundle in a repository; other models there are not changed.

    Raises:
        UsageError: a model that the bundle cannot serve, a path of the bundle on the server that is not absolute, or a
            folder of that name that l2p-export did not write.
        ArtifactError: the bundle is damaged.
        HostError: tritonclient is missing, or the disk is full.
    """
    manifest = pack_manifest(bundle.manifest, None, (spec.plan,) if spec.plan else ())
    digest = bundle.digest if spec.bundle_at is not None else bundle_digest(manifest_to_bytes(manifest))
    engines = _networks(manifest, spec.plan)
    configs = _configs(manifest, digest, spec, engines)
    for name in configs:
        _require_ours(root / name)
    settings = {name: _settings(name, config, _warm_up(manifest, spec)) for name, config in configs.items()}
    if dry_run:
        found = {name: _latest(root / name) for name in configs}
        stale = [name for name in configs if not _is_current(root / name, digest, spec.bundle_at)]
        updated = [name for name in configs if name not in stale and _differ(root / name, settings[name])]
        return Written(root, digest, {n: v + (n in stale) for n, v in found.items()}, tuple(stale), tuple(updated))
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / LOCK, busy=f"another command is writing `{root}`"):
        versions, new, updated = {}, [], []
        shared: Path | None = None
        for name in configs:
            folder = root / name
            for place in (folder, folder / WARM_UP_FOLDER):
                sweep_partials(place)
            if not _is_current(folder, digest, spec.bundle_at):
                new.append(name)
                with _new_version(folder) as version:
                    if name in IMAGE_MODELS:
                        _fill_image_version(version, name, bundle, manifest, spec, shared, reporter)
                    else:
                        _fill_network_version(version, bundle, engines[name.removeprefix(NETWORK_PREFIX)])
            elif _differ(folder, settings[name]):
                updated.append(name)
            versions[name] = _latest(folder)
            if name in IMAGE_MODELS:
                shared = folder / str(versions[name]) / BUNDLE
            for path, data in settings[name].items():
                _write(folder / path, data)
            _drop_old_versions(folder)
    return Written(root, digest, versions, tuple(new), tuple(updated))


def template(name: str) -> bytes:
    """The content of a file of `data/triton_models/`, which a server runs and nothing of ours imports."""
    if not (_TEMPLATES / name).is_file():
        raise InternalError(f"the installation lacks the template `{name}`", hint="reinstall l2p-export")
    return (_TEMPLATES / name).read_bytes()


def versions(folder: Path) -> list[int]:
    """The version numbers in a model's folder, in increasing order."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and not name.startswith("0"))


def _configs(
    manifest: Manifest, digest: str, spec: RepositorySpec, engines: Mapping[str, Sequence[EngineRecord]]
) -> dict[str, Any]:
    """Model name to its configuration."""
    possible = [name for name in IMAGE_MODELS if name != "l2p" or manifest.text is not None]
    possible += [NETWORKS_MODEL] if engines else []
    impossible = [name for name in spec.models if name not in possible]
    if impossible:
        reasons = {"l2p": "it has no text encoder", NETWORKS_MODEL: "it has no TensorRT engines"}
        known = [*IMAGE_MODELS, NETWORKS_MODEL]
        reason = reasons.get(impossible[0], f"models are {', '.join(known)}")
        raise UsageError(f"cannot write model `{impossible[0]}` of this bundle: {reason}")
    largest = max(profile.height_px.max * profile.width_px.max for profile in manifest.profiles)
    most_steps = min(4 * manifest.sampling.steps, STEPS_MAX)
    limits = Limits(
        largest if spec.pixels is None else spec.pixels,
        most_steps if spec.steps is None else spec.steps,
        spec.prompt_bytes,
    )
    _check_running(spec)
    service = ServiceSpec(
        bundle=BUNDLE if spec.bundle_at is None else spec.bundle_at,
        bundle_digest=digest,
        backend=spec.backend,
        plan=spec.plan or "",
        memory_budget=spec.memory_budget,
        dtype=spec.dtype,
        preview_px=spec.preview_px,
        limits=limits,
    )
    chosen = spec.models or tuple(possible)
    warm_up = _warm_up(manifest, spec)
    check_size(manifest.model, warm_up.height, warm_up.width)
    if warm_up.height * warm_up.width > limits.pixels:
        raise UsageError(f"the warm-up draws {warm_up.width}x{warm_up.height}, the limit is {limits.pixels:,} pixels")
    configs = {
        name: image_config(name, manifest, service, spec.placement, warm_up) for name in chosen if name in IMAGE_MODELS
    }
    if NETWORKS_MODEL in chosen:
        for network, records in engines.items():
            config = network_config(manifest.network(network), records, spec.placement)
            config.parameters[DIGEST].string_value = digest
            config.parameters[PRODUCER].string_value = manifest.producer
            configs[config.name] = config
    return configs


def _check_running(spec: RepositorySpec) -> None:
    """Refuse settings that the server would reject while it loads."""
    if spec.bundle_at is not None and not PurePosixPath(spec.bundle_at).is_absolute():
        raise UsageError(
            f"--bundle-at is `{spec.bundle_at}`, expected an absolute path on the server's machine",
            hint="write it as /models/bundle, or leave the option out to copy the bundle",
        )
    if spec.backend not in ("auto", *backend_names()):
        raise UsageError(f"there is no backend `{spec.backend}`", hint=f"backends: auto, {', '.join(backend_names())}")
    if spec.memory_budget:
        parse_bytes(spec.memory_budget)


def _networks(manifest: Manifest, plan: str | None) -> dict[str, list[EngineRecord]]:
    """Network to its TensorRT engines under one plan and the newest library; engines of `rtx` are no Triton plans."""
    found: dict[str, list[EngineRecord]] = {}
    targets = {r.target: target_from_spelling(r.target) for r in manifest.engines}
    ours = [record for record in manifest.engines if targets[record.target].backend == "tensorrt"]
    name = plan or (ours[0].plan if ours else "")
    newest = max((_number(record.library_version) for record in ours), default=())
    for record in ours:
        if record.plan == name and _number(record.library_version) == newest and record.network != TEXT_ENCODER:
            found.setdefault(record.network, []).append(record)
    return found


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _warm_up(manifest: Manifest, spec: RepositorySpec) -> WarmUp:
    profile = manifest.profiles[0]
    return spec.warm_up or WarmUp(profile.height_px.min, profile.width_px.min)


def _fill_image_version(
    version: Path,
    name: str,
    bundle: Bundle,
    manifest: Manifest,
    spec: RepositorySpec,
    shared: Path | None,
    reporter: Reporter,
) -> None:
    source = name if name in STREAMING else "l2p"
    _write(version / "model.py", template(f"{source}/model.py"))
    _write(version / "glue.py", template("glue.py"))
    if spec.bundle_at is not None:
        return
    if shared is not None and open_bundle(shared).manifest == manifest:
        # Hard links, if the file system has them: the content is on the disk once.
        shutil.copytree(shared, version / BUNDLE, copy_function=_link)
    else:
        pack(bundle, manifest, version / BUNDLE, reporter)


def _fill_network_version(version: Path, bundle: Bundle, records: Sequence[EngineRecord]) -> None:
    digests = {file.path: file.sha256 for file in bundle.manifest.files}
    for record in records:
        written = version / plan_file(record)
        # The folder of the version is synced with everything in it.
        shutil.copyfile(bundle.path(record.engine), written)
        if file_digest(written) != digests[record.engine]:
            raise HostError(f"`{written}` was not written as it was read", hint="check the disk")


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _new_version(folder: Path) -> AbstractContextManager[Path]:
    """A folder to fill, which becomes the next version when the context ends."""
    folder.mkdir(parents=True, exist_ok=True)
    return atomic_folder(folder / str(_latest(folder) + 1))


def _drop_old_versions(folder: Path) -> None:
    for number in versions(folder)[:-VERSIONS_KEPT]:
        shutil.rmtree(folder / str(number))


def _latest(folder: Path) -> int:
    return max(versions(folder), default=0)


def _is_current(folder: Path, digest: str, bundle_at: str | None) -> bool:
    """Whether the latest version has this bundle, complete, and the code of this installation."""
    config = read_parameters(folder / CONFIG)
    latest = folder / str(_latest(folder))
    if config.get(DIGEST) != digest or not latest.is_dir():
        return False
    if folder.name not in IMAGE_MODELS:
        return True
    if bundle_at is None:
        try:
            open_bundle(latest / BUNDLE)
        except ArtifactError:
            return False
    source = folder.name if folder.name in STREAMING else "l2p"
    wanted = {"model.py": template(f"{source}/model.py"), "glue.py": template("glue.py")}
    return not _differ(latest, wanted)


def read_parameters(path: Path) -> dict[str, str]:
    """The string parameters of a `config.pbtxt`; empty if it cannot be read."""
    from google.protobuf import text_format

    from l2p_export.serving.configs import require_client

    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), require_client().ModelConfig())
    except (OSError, ValueError, text_format.ParseError):
        return {}
    return {key: value.string_value for key, value in config.parameters.items()}


def _require_ours(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and PRODUCER not in read_parameters(folder / CONFIG):
        raise UsageError(f"`{folder}` is a model that l2p-export did not write", hint="choose another --out")


def _settings(name: str, config: Any, warm_up: WarmUp) -> dict[str, bytes]:
    """The files beside a model's versions, as path to content; the configuration is the last to be written."""
    files = warm_up_files(warm_up) if name in IMAGE_MODELS else {}
    return {f"{WARM_UP_FOLDER}/{file}": data for file, data in files.items()} | {CONFIG: config_text(config).encode()}


def _differ(folder: Path, files: Mapping[str, bytes]) -> bool:
    return any(not _has(folder / path, data) for path, data in files.items())


def _write(path: Path, data: bytes) -> None:
    """Replace a file atomically, unless its content is the same."""
    if _has(path, data):
        return
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, data)


def _has(path: Path, data: bytes) -> bool:
    return path.is_file() and path.read_bytes() == data
