"""The contract every part reads: specs, profiles, the bundle manifest. Standard library only."""

from l2p_runtime.contract.manifest import (
    MANIFEST_NAME,
    NETWORKS,
    SCHEMA,
    TEXT_ENCODER,
    CheckpointRecord,
    FileRecord,
    GraphRecord,
    LedgerEntry,
    Manifest,
    PlanRef,
    ReferenceCase,
    TextRecord,
    bundle_digest,
    manifest_from_bytes,
    manifest_to_bytes,
)
from l2p_runtime.contract.model import HeadSpec, ModelSpec, Positions, RotarySpec
from l2p_runtime.contract.profile import Profile, Range, Sampling
from l2p_runtime.contract.tensors import DType, NetworkSpec, TensorSpec, split_dim

__all__ = [
    "MANIFEST_NAME",
    "NETWORKS",
    "SCHEMA",
    "TEXT_ENCODER",
    "CheckpointRecord",
    "DType",
    "FileRecord",
    "GraphRecord",
    "HeadSpec",
    "LedgerEntry",
    "Manifest",
    "ModelSpec",
    "NetworkSpec",
    "PlanRef",
    "Positions",
    "Profile",
    "Range",
    "ReferenceCase",
    "RotarySpec",
    "Sampling",
    "TensorSpec",
    "TextRecord",
    "bundle_digest",
    "manifest_from_bytes",
    "manifest_to_bytes",
    "split_dim",
]
