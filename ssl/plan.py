"""What a run will be before anything is spent: parameters, FLOPs, memory, time. Nothing is read, trained or written.

The network is built on torch's meta device, which holds shapes and no numbers. Of FLOPs, 1 multiply-add counts as 2,
and only matrix products count: norms, activations, losses, augmentation, the optimizer and the teacher's moving
average are left out, all of them below the noise of a machine's throughput.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from timm.layers import GluMlp, SwiGLU
from torch import nn

from eosin.ssl.backbone import build_backbone
from eosin.ssl.config import Config, Crops
from eosin.ssl.network import Head, Network

GLOBALS = 2  # global crops of a sample
FP32, BF16 = 4, 2  # bytes of a number


@dataclass(frozen=True)
class HeadShape:
    """Widths of a projection head: of its two hidden layers, its bottleneck, and the number of prototypes."""

    hidden: int
    bottleneck: int
    prototypes: int


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a network.

    Attributes:
        width, depth, heads: of the backbone.
        inner: width of queries, keys and values: heads times the width of one.
        hidden: width between the layers of the MLP; a gated one (SwiGLU) makes it twice.
        gated: whether the MLP is.
        scaled: whether blocks have LayerScale.
        patch: side of a patch in pixels.
        prefix: class token and registers.
        dino, ibot: the heads.
        tied: whether they are one.
    """

    width: int
    depth: int
    heads: int
    inner: int
    hidden: int
    gated: bool
    scaled: bool
    patch: int
    prefix: int
    dino: HeadShape
    ibot: HeadShape
    tied: bool

    @property
    def block(self) -> int:
        """Weights of a block's linear layers: queries, keys, values, projection, and the MLP."""
        return 4 * self.width * self.inner + (3 if self.gated else 2) * self.width * self.hidden

    @property
    def mixing(self) -> int:
        """Those of them that queries, keys and values come from."""
        return 3 * self.width * self.inner

    @property
    def embedding(self) -> int:
        """Weights of the patch embedding."""
        return 3 * self.patch**2 * self.width

    def head(self, head: HeadShape) -> int:
        """Weights of a head's linear layers without its prototypes."""
        return self.width * head.hidden + head.hidden**2 + head.hidden * head.bottleneck

    def tokens(self, side: int) -> int:
        """Tokens of a crop of ``side`` pixels."""
        return (side // self.patch) ** 2 + self.prefix


@dataclass(frozen=True)
class Flops:
    """FLOPs of one image by what causes them."""

    embedding: float
    linear: float
    attention: float
    heads: float

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(getattr(self, f.name) for f in fields(self))

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass(frozen=True)
class Phase:
    """A part of a run: its steps, its crops, and the masked patches of a sample, on average."""

    steps: int
    crops: Crops
    masked: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        student, teacher, gradients, moments: exact; weights are float32, ``moments`` are AdamW's.
        buckets: a second copy of the gradients, which DistributedDataParallel makes.
        fixed, image: an estimate of what is kept for the backward pass, however many images there are and for each.
        side: pixels of the global crops that this is for.
    """

    student: int
    teacher: int
    gradients: int
    moments: int
    buckets: int
    fixed: float
    image: float
    side: int

    @property
    def exact(self) -> int:
        """All that does not depend on the estimate."""
        return self.student + self.teacher + self.gradients + self.moments + self.buckets


class Plan:
    """The figures of a configuration; see the functions below for what each counts."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.network = meta_network(config)
        self.shape = shape(self.network)
        self.phases = phases(config, self.shape.patch)

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters of the student by part; the teacher is a copy."""
        return parameters(self.network)

    def step(self, phase: Phase, drop_path: float | None = None) -> Flops:
        """FLOPs of one image in a step: student and teacher forward, student backward; at the recipe's drop path."""
        there = student_forward(self.shape, phase, self.config.model.drop_path if drop_path is None else drop_path)
        return there + backward(there) + teacher_forward(self.shape, phase)

    @property
    def flops(self) -> float:
        """FLOPs of the whole run."""
        return sum(p.steps * self.config.data.batch * self.step(p).total for p in self.phases)

    @property
    def images(self) -> int:
        """Samples of the whole run, with repetition."""
        return self.config.run.steps * self.config.data.batch

    @property
    def bf16(self) -> bool:
        """Whether the run will compute in bfloat16; ``run.precision=auto`` is read as on a GPU."""
        run = self.config.run
        return run.precision == "bf16" or (run.precision == "auto" and run.device != "cpu")


def meta_network(config: Config) -> Network:
    """A student without numbers. Raises UserError where timm cannot build it."""
    with torch.device("meta"):
        return Network(config)


def shape(network: Network) -> Shape:
    """Read off a network what decides its cost."""
    block: Any = network.backbone.blocks[0]
    return Shape(
        width=network.backbone.embed_dim,
        depth=len(network.backbone.blocks),
        heads=block.attn.num_heads,
        inner=block.attn.attn_dim,
        hidden=block.mlp.fc2.in_features,
        gated=isinstance(block.mlp, (GluMlp, SwiGLU)),
        scaled=not isinstance(block.ls1, nn.Identity),
        patch=network.backbone.patch_embed.patch_size[0],
        prefix=network.backbone.num_prefix_tokens,
        dino=_head_shape(network.dino_head),
        ibot=_head_shape(network.ibot_head or network.dino_head),
        tied=network.ibot_head is None,
    )


def _head_shape(head: Head) -> HeadShape:
    prototypes, bottleneck = head.prototypes.shape
    return HeadShape(head.mlp[2].in_features, bottleneck, prototypes)  # type: ignore[arg-type]


def phases(config: Config, patch: int) -> list[Phase]:
    """The parts of a run: one, or two where it ends at high resolution; ``patch`` is in pixels."""
    last = config.high_resolution
    parts = [(config.run.steps - (last.steps if last else 0), config.crops)]
    if last:
        parts.append((last.steps, last.crops))
    objective = config.objective
    probability = objective.mask_probability if objective.ibot else 0.0
    ratio = sum(objective.mask_ratio) / 2
    return [Phase(n, c, GLOBALS * probability * ratio * (c.global_size // patch) ** 2) for n, c in parts]


def parameters(network: Network) -> dict[str, int]:
    """Parameters by part; a tied iBOT head is the DINO head and counts once."""
    parts: dict[str, nn.Module | nn.Parameter | None] = {
        "backbone": network.backbone,
        "mask token": network.mask_token,
        "DINO head": network.dino_head,
        "iBOT head": network.ibot_head,
    }
    return {name: _count(part) for name, part in parts.items() if part is not None}


def _count(part: nn.Module | nn.Parameter) -> int:
    return part.numel() if isinstance(part, nn.Parameter) else sum(p.numel() for p in part.parameters())


def student_forward(shape: Shape, phase: Phase, drop_path: float = 0.0) -> Flops:
    """FLOPs of the student's forward pass on all crops of one image.

    Linear layers cost 2 x weights a token. Attention's two products, QKᵀ and the one with V, cost 2 x 2·t²·inner for a
    crop of t tokens: packing concatenates crops for linear layers only. Heads see the class token of each crop and the
    masked patches of the global ones; of the last block, what follows its attention is computed for these alone.

    Args:
        drop_path: share of the blocks' branches that are dropped, and so not computed; on average.
    """
    crops = phase.crops
    return _forward(
        shape,
        [(GLOBALS, crops.global_size), (crops.local_count, crops.local_size)],
        classes=GLOBALS + crops.local_count,
        masked=phase.masked,
        kept=1 - drop_path,
    )


def teacher_forward(shape: Shape, phase: Phase) -> Flops:
    """FLOPs of the teacher's forward pass on the global crops of one image; it drops nothing."""
    return _forward(shape, [(GLOBALS, phase.crops.global_size)], classes=GLOBALS, masked=phase.masked, kept=1.0)


def _forward(shape: Shape, crops: list[tuple[int, int]], *, classes: int, masked: float, kept: float) -> Flops:
    lengths = [(count, shape.tokens(side)) for count, side in crops]
    tokens = sum(count * length for count, length in lengths)
    unfinished = (tokens - classes - masked) * (shape.block - shape.mixing)
    return Flops(
        embedding=2 * (tokens - shape.prefix * sum(count for count, _ in lengths)) * shape.embedding,
        linear=kept * 2 * (shape.depth * shape.block * tokens - unfinished),
        attention=kept * 4 * shape.depth * shape.inner * sum(count * length**2 for count, length in lengths),
        heads=sum(
            2 * rows * (shape.head(head) + head.bottleneck * head.prototypes)
            for rows, head in ((classes, shape.dino), (masked, shape.ibot))
        ),
    )


def backward(forward: Flops) -> Flops:
    """FLOPs of the backward pass: 2 x forward, for the gradients of inputs and of weights.

    The patch embedding has 1 x, since pixels need no gradient. What an attention kernel computes again to save memory
    is not counted, as is usual (model FLOPs, Chowdhery et al. 2022, appendix B).
    """
    return Flops(forward.embedding, 2 * forward.linear, 2 * forward.attention, 2 * forward.heads)


def state_bytes(network: Network, gpus: int) -> tuple[int, int, int, int, int]:
    """Bytes of the student, teacher, gradients, AdamW's moments and DDP's buckets; exact.

    Weights are float32 under autocast too. AdamW keeps two moments a weight and one float32 step count a tensor.
    """
    tensors = list(network.parameters())
    weights = FP32 * sum(p.numel() for p in tensors)
    return weights, weights, weights, 2 * weights + FP32 * len(tensors), weights if gpus > 1 else 0


def activations(shape: Shape, phase: Phase, bf16: bool, drop_path: float) -> tuple[float, float]:
    """Bytes kept for the backward pass: (however many images there are, for each image). An estimate.

    With e bytes a number (2 in bfloat16, 4 in float32), D the width, A the width of queries, h that of the MLP, H the
    heads, no checkpointing and an attention kernel that does not keep its matrix, a token of a block keeps

        8·D               the residual stream, float32, before either norm
        + 2·e·D           the norms' outputs, as the linear layers take them
        + 5·e·A           queries, keys, values; attention's output, and again where crops are joined
        + 2·e·D           what LayerScale scales, where there is one
        + 2·e·h or 4·e·h  before and after GELU; gated: both halves, the activated one and their product
        + 16 + 4·H        statistics of norms and attention.

    Of that, drop path keeps what it does not drop, and 16 bytes of places. In the last block, tokens that no head sees
    keep only what comes before its projection: 4·D + e·D + 4·e·A + 8 + 4·H.

    A row of a head with hidden width m, bottleneck b and K prototypes keeps e·(D + 4·m + b) + 4·b, and the losses 8·K:
    targets and log-probabilities, float32. A crop keeps e a value, and what a head sees 4·D before the last norm.
    Independent of images are the normalized prototypes, e·b·K for either head, and in bfloat16 a copy of all linear
    weights. Not counted: what lives for a moment only (about a block's worth), fragmentation, and CUDA's own.
    """
    e = BF16 if bf16 else FP32
    crops = phase.crops
    sides = [(GLOBALS, crops.global_size), (crops.local_count, crops.local_size)]
    tokens = sum(count * shape.tokens(side) for count, side in sides)
    places = 8 if drop_path else 0
    before = (4 + e) * shape.width + 4 * e * shape.inner + 8 + 4 * shape.heads + places  # the projection of attention
    after = (
        (4 + e + (2 * e if shape.scaled else 0)) * shape.width
        + e * shape.inner
        + (4 if shape.gated else 2) * e * shape.hidden
        + 8
        + places
    )
    rows = [(GLOBALS + crops.local_count, shape.dino), (phase.masked, shape.ibot)]
    seen = sum(n for n, _ in rows)
    unfinished = tokens - seen if shape.depth else 0.0
    values = 3 * sum(count * side**2 for count, side in sides)
    image = (
        (1 - drop_path) * (shape.depth * tokens * (before + after) - unfinished * after)
        + FP32 * shape.width * seen
        + e * values
        + sum(
            n * (e * (shape.width + 4 * h.hidden + h.bottleneck) + 4 * h.bottleneck + 8 * h.prototypes) for n, h in rows
        )
    )
    fixed = e * sum(head.bottleneck * head.prototypes for _, head in rows)
    if bf16:
        # Autocast casts a tied head's weights once and keeps the copy.
        heads = [shape.dino] if shape.tied else [shape.dino, shape.ibot]
        fixed += BF16 * (shape.depth * shape.block + shape.embedding + sum(map(shape.head, heads)))
    return float(fixed), image


def days(flops: float, tflops: float, gpus: int) -> float:
    """Days that ``flops`` take on ``gpus`` GPUs of which each achieves ``tflops`` TFLOP/s."""
    return flops / (tflops * 1e12 * gpus) / 86400


def fvcore_table(config: Config) -> dict[str, tuple[int, float]]:
    """fvcore's count for one global crop through the plain backbone: part -> (parameters, FLOPs).

    fvcore counts a multiply-add as 1 and has no formula for scaled_dot_product_attention, whose two products it leaves
    out; its figures are doubled here. It needs real tensors, so one block is traced, of weights that are never set,
    and counted ``depth`` times: all blocks are alike.
    """
    with torch.device("meta"):
        whole = build_backbone(config)
        args = config.model.args | {"depth": 1}
        single = build_backbone(config.model_copy(update={"model": config.model.model_copy(update={"args": args})}))
    side = config.crops.global_size
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        from fvcore.nn import FlopCountAnalysis, parameter_count

        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            counted = FlopCountAnalysis(single.to_empty(device="cpu").eval(), torch.zeros(1, 3, side, side)).by_module()
        finally:
            logging.disable(level)
    held = parameter_count(whole)
    times = {"patch_embed": 1, "blocks": len(whole.blocks), "norm": 1}
    return {part: (held[part], 2.0 * n * counted[part]) for part, n in times.items()}


def crop_forward(shape: Shape, side: int) -> float:
    """FLOPs of one crop of ``side`` pixels through the backbone, forward: what :func:`fvcore_table` should sum to.

    All tokens are finished, as timm does.
    """
    tokens = shape.tokens(side)
    blocks = shape.depth * (2 * shape.block * tokens + 4 * shape.inner * tokens**2)
    return 2.0 * (tokens - shape.prefix) * shape.embedding + blocks
