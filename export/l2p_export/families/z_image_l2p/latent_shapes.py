"""Shape table of the latent Z-Image transformer, the source of an L2P model.

Source: docs/model.md, "Tensor names" and "Fingerprints". It identifies source checkpoints by fingerprint, from only the
header.
"""

from __future__ import annotations

from l2p_export.families.z_image_l2p.dimensions import Dimensions, expected_shapes

LATENT_PATCH_VALUES = 64
"""Values of a latent patch: 2 x 2 of 16 channels."""


def latent_shapes(d: Dimensions) -> dict[str, tuple[int, ...]]:
    """Published name to shape of the latent source of a model: its own embedder and final layer, no pixel head."""
    shared = {
        name: shape
        for name, shape in expected_shapes(d).items()
        if not name.startswith(("all_x_embedder.", "local_decoder."))
    }
    return shared | {
        "all_x_embedder.2-1.weight": (d.width, LATENT_PATCH_VALUES),
        "all_x_embedder.2-1.bias": (d.width,),
        "all_final_layer.2-1.linear.weight": (LATENT_PATCH_VALUES, d.width),
        "all_final_layer.2-1.linear.bias": (LATENT_PATCH_VALUES,),
        "all_final_layer.2-1.adaLN_modulation.1.weight": (d.width, d.time_width),
        "all_final_layer.2-1.adaLN_modulation.1.bias": (d.width,),
    }
