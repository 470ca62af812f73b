"""Write a tiny L2P checkpoint in the published key layout, with weights anyone can regenerate.

Every tensor is drawn from a generator seeded by the CRC-32 of its own name, so the file needs
no storage and two programs that agree on names and shapes agree on every value.

    python tiny_checkpoint.py OUT.safetensors            # split q/k/v, bare keys, patch 16
    python tiny_checkpoint.py OUT.safetensors --fused    # qkv fused, `model.diffusion_model.` prefix

Dimensions: width 64, 2 heads of 32, 6 layers, 2 + 2 refiners, caption width 40, RoPE axes 8/12/12.
"""

import argparse
import zlib

import numpy as np

WIDTH, LAYERS, REFINERS, CAPTION, PATCH = 64, 6, 2, 40, 16
HEAD, FFN, ADALN, TIME_MID = 32, int(64 / 3 * 8), 64, 1024


def shapes(patch=PATCH):
    """Name -> shape of every tensor, published spelling (split q/k/v, no prefix)."""
    out = {
        f"all_x_embedder.{patch}-1.weight": (WIDTH, 3 * patch * patch),
        f"all_x_embedder.{patch}-1.bias": (WIDTH,),
        "t_embedder.mlp.0.weight": (TIME_MID, 256),
        "t_embedder.mlp.0.bias": (TIME_MID,),
        "t_embedder.mlp.2.weight": (ADALN, TIME_MID),
        "t_embedder.mlp.2.bias": (ADALN,),
        "cap_embedder.0.weight": (CAPTION,),
        "cap_embedder.1.weight": (WIDTH, CAPTION),
        "cap_embedder.1.bias": (WIDTH,),
        "x_pad_token": (1, WIDTH),
        "cap_pad_token": (1, WIDTH),
    }
    blocks = [(f"layers.{i}", True) for i in range(LAYERS)]
    blocks += [(f"noise_refiner.{i}", True) for i in range(REFINERS)]
    blocks += [(f"context_refiner.{i}", False) for i in range(REFINERS)]
    for name, modulated in blocks:
        for proj in ("to_q", "to_k", "to_v", "to_out.0"):
            out[f"{name}.attention.{proj}.weight"] = (WIDTH, WIDTH)
        for norm in ("norm_q", "norm_k"):
            out[f"{name}.attention.{norm}.weight"] = (HEAD,)
        for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            out[f"{name}.{norm}.weight"] = (WIDTH,)
        out[f"{name}.feed_forward.w1.weight"] = (FFN, WIDTH)
        out[f"{name}.feed_forward.w2.weight"] = (WIDTH, FFN)
        out[f"{name}.feed_forward.w3.weight"] = (FFN, WIDTH)
        if modulated:
            out[f"{name}.adaLN_modulation.0.weight"] = (4 * WIDTH, ADALN)
            out[f"{name}.adaLN_modulation.0.bias"] = (4 * WIDTH,)

    def conv(name, cout, cin, k):
        out[f"local_decoder.{name}.weight"] = (cout, cin, k, k)
        out[f"local_decoder.{name}.bias"] = (cout,)

    if patch == 16:
        for i, (cin, cout) in enumerate([(3, 64), (64, 128), (128, 256), (256, 512)], 1):
            conv(f"enc{i}.0", cout, cin, 3)
        conv("bottleneck.0", 512, 512 + WIDTH, 1)
        for i, c, cout in [(4, 512, 256), (3, 256, 128), (2, 128, 64), (1, 64, 64)]:
            conv(f"up{i}.1", c, c, 3)
            conv(f"dec{i}.0", cout, 2 * c, 3)
        conv("out_conv", 3, 64, 1)
    elif patch in (64, 128):
        if patch == 128:
            conv("enc_8k.0", 3, 3, 3)
        for name, cin, cout in [
            ("0", 3, 16),
            ("0b", 16, 32),
            ("1", 32, 64),
            ("2", 64, 128),
            ("3", 128, 256),
            ("4", 256, 512),
        ]:
            conv(f"enc{name}.0", cout, cin, 3)
        conv("bottleneck.0", 512, 512 + WIDTH, 1)
        for name, c, cout in [
            ("4", 512, 256),
            ("3", 256, 128),
            ("2", 128, 64),
            ("1", 64, 32),
            ("0b", 32, 16),
            ("0", 16, 16),
        ]:
            conv(f"up{name}.1", c, c, 3)
            conv(f"dec{name}.0", cout, 2 * c, 3)
        if patch == 128:
            conv("up_8k.1", 16, 16, 3)
            conv("dec_8k.0", 16, 16 + 3, 3)
        conv("out_conv", 3, 16, 1)
    else:
        raise ValueError(f"patch must be 16, 64 or 128, not {patch}")
    return out


def tensor(name, shape):
    """The value of one tensor: float32, seeded by the CRC-32 of its name."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    values = rng.standard_normal(shape, dtype=np.float32)
    if len(shape) == 1 and name.endswith("weight"):  # a norm's gain
        return (1 + 0.1 * values).astype(np.float32)
    if name.endswith("bias") or name.endswith("pad_token"):
        return (0.1 * values).astype(np.float32)
    return (values / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def checkpoint(patch=PATCH):
    """The whole state dict: name -> float32 array."""
    return {name: tensor(name, shape) for name, shape in shapes(patch).items()}


def fused(state):
    """The spelling that node-based user interfaces use: qkv in one matrix, prefixed keys."""
    rename = {
        "attention.to_out.0.": "attention.out.",
        "attention.norm_q.": "attention.q_norm.",
        "attention.norm_k.": "attention.k_norm.",
    }
    out = {}
    for name, value in state.items():
        if ".attention.to_k." in name or ".attention.to_v." in name:
            continue
        if ".attention.to_q." in name:
            parts = [state[name.replace("to_q", p)] for p in ("to_q", "to_k", "to_v")]
            name, value = name.replace("to_q", "qkv"), np.concatenate(parts)
        for old, new in rename.items():
            name = name.replace(old, new)
        if name.startswith("all_x_embedder."):
            name = "x_embedder." + name.rsplit(".", 1)[1]
        out["model.diffusion_model." + name] = value
    return out


if __name__ == "__main__":
    from safetensors.numpy import save_file

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--patch", type=int, default=PATCH)
    parser.add_argument("--fused", action="store_true")
    args = parser.parse_args()
    state = checkpoint(args.patch)
    save_file(fused(state) if args.fused else state, args.out)
    print(f"{args.out}: {len(state)} tensors, {sum(v.size for v in state.values()):,} parameters")
