"""Memory of one process and what is computed twice, by strategy, accumulation and activation checkpointing.

Closed forms over :mod:`eosin.ssl.plan`'s shapes. Nothing is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from eosin.ssl.network import Network
from eosin.ssl.plan import (
    FP32,
    GLOBALS,
    Flops,
    HeadShape,
    Memory,
    Phase,
    Plan,
    Shape,
    activations,
    state_bytes,
    student_forward,
)


@dataclass(frozen=True)
class Held:
    """Bytes of one process of a run.

    Attributes:
        memory: weights, gradients and AdamW's moments, exact, and the activations of one part of the batch; ``image``
            is for an image of that part.
        summed: gradients of whole layers that FSDP2 keeps until the last part of the batch; exact.
        gathered: an estimate of the layers that FSDP2 holds whole for a moment.
        waiting: of an image of the other parts: its crops, and what the teacher said of it.
        parts: optim.accumulate.
    """

    memory: Memory
    summed: int
    gathered: int
    waiting: float
    parts: int

    @property
    def exact(self) -> int:
        """All that does not depend on an estimate."""
        return self.memory.exact + self.summed

    def kept(self, images: int) -> float:
        """The estimate: all that ``images`` samples a step, in parts, keep beside what is exact."""
        part = images / self.parts
        return self.gathered + self.memory.fixed + part * self.memory.image + (images - part) * self.waiting

    def room(self, limit: float) -> int:
        """Samples a step that fit into ``limit`` bytes, a multiple of the parts; 0 where not even the weights do."""
        of_each = self.memory.image + (self.parts - 1) * self.waiting
        fit = (limit - self.exact - self.gathered - self.memory.fixed) // of_each
        return max(int(fit), 0) * self.parts


def held(plan: Plan, ranks: int) -> Held:
    """Memory of one of ``ranks`` processes, in the phase of the run that keeps most."""
    images = plan.config.data.batch // ranks
    return max((_in_phase(plan, phase, ranks) for phase in plan.phases), key=lambda h: h.exact + h.kept(images))


def _in_phase(plan: Plan, phase: Phase, ranks: int) -> Held:
    config, parts = plan.config, plan.config.optim.accumulate
    drop_path = config.model.drop_path
    fixed, image = activations(plan.shape, phase, plan.bf16, drop_path)
    if config.run.checkpoint_activations == "blocks":
        image = recomputing(plan.shape, phase, plan.bf16, drop_path)
    state = state_bytes(plan.network, ranks)
    memory = Memory(*state, fixed, image, phase.crops.global_size)
    waiting = waiting_bytes(plan.shape, phase) if parts > 1 else 0.0
    if ranks == 1 or config.run.strategy != "fsdp":
        return Held(memory, 0, 0, waiting, parts)
    shard, tensors = shard_bytes(plan.network, ranks), len(list(plan.network.parameters()))
    memory = replace(
        memory, student=shard, teacher=shard, gradients=shard, moments=2 * shard + FP32 * tensors, buckets=0
    )
    return Held(memory, summed_bytes(plan.network) if parts > 1 else 0, gathered_bytes(plan.network), waiting, parts)


def shard_bytes(network: Network, ranks: int) -> int:
    """Bytes of the float32 weights that the fullest of ``ranks`` processes holds under FSDP2; exact.

    FSDP2 cuts a tensor [d_0, d_1, …] along its first dimension into chunks of ceil(d_0 / ranks) rows, so that the first
    process holds 4 · Σ ceil(d_0 / ranks) · d_1 · d_2 …; it has all of a tensor whose d_0 is 1 (positions, tokens).
    """
    return FP32 * sum(math.ceil(p.shape[0] / ranks) * p[0].numel() for p in network.parameters())


def summed_bytes(network: Network) -> int:
    """Bytes of whole gradients, 4 a weight: without synchronization FSDP2 adds parts up before it shards the sum."""
    return FP32 * sum(p.numel() for p in network.parameters())


def gathered_bytes(network: Network) -> int:
    """Bytes of the layers that FSDP2 holds whole at the worst moment, in the backward pass; an estimate.

    4 · (2·r + 4·b) with r the weights of the root group (all outside of blocks), gathered with their gradients, and b
    those of a block: it, the one fetched ahead, its gradients, and the copy of them that is being reduced.
    """
    block = sum(p.numel() for p in network.backbone.blocks[0].parameters())
    root = sum(p.numel() for p in network.parameters()) - block * len(network.backbone.blocks)
    return FP32 * (2 * root + 4 * block)


def waiting_bytes(shape: Shape, phase: Phase) -> float:
    """Bytes an image of a part that is not being computed: 4 · (pixels of its crops + 2·K + m·K').

    The teacher's answers, float32, for 2 class tokens of K prototypes and m masked patches of K' are there for the
    whole share of a batch from the first part to the last.
    """
    crops = phase.crops
    values = 3 * (GLOBALS * crops.global_size**2 + crops.local_count * crops.local_size**2)
    return FP32 * (values + GLOBALS * shape.dino.prototypes + phase.masked * shape.ibot.prototypes)


def recomputing(shape: Shape, phase: Phase, bf16: bool, drop_path: float) -> float:
    """Bytes an image keeps where blocks are computed again (Chen et al. 2016), in place of ``activations``' second.

    A token keeps a block's input, 4·D, and 16 bytes of places under drop path. While one block is computed again that
    block's activations are kept too; the heads' are gone by then. With a_b, a_h and a_r the bytes of an image by
    :func:`eosin.ssl.plan.activations` for one whole block, the heads and the rest, this is

        depth · tokens · (4·D + 16 under drop path) + a_r + max(a_h, a_b).
    """
    none = HeadShape(0, 0, 0)

    def image(depth: int, of: Shape = shape) -> float:
        return activations(replace(of, depth=depth), phase, bf16, drop_path)[1]

    rest = image(0, replace(shape, dino=none, ibot=none))
    crops = phase.crops
    tokens = GLOBALS * shape.tokens(crops.global_size) + crops.local_count * shape.tokens(crops.local_size)
    inputs = FP32 * shape.width + (16 * (1 - drop_path) if drop_path else 0)
    return shape.depth * tokens * inputs + rest + max(image(0) - rest, image(2) - image(1))


def recomputed(plan: Plan, phase: Phase) -> Flops:
    """FLOPs of an image that a step computes twice; 0 without run.checkpoint_activations=blocks.

    The forward pass of the student's blocks on what drop path keeps. Without LayerScale a block's last linear layer,
    2·h·D a token, is not needed again; of the last block only class tokens and masked patches go through it.
    """
    shape, drop_path, crops = plan.shape, plan.config.model.drop_path, phase.crops
    if plan.config.run.checkpoint_activations != "blocks":
        return Flops(0.0, 0.0, 0.0, 0.0)
    there = student_forward(shape, phase, drop_path)
    tokens = GLOBALS * shape.tokens(crops.global_size) + crops.local_count * shape.tokens(crops.local_size)
    through = (shape.depth - 1) * tokens + GLOBALS + crops.local_count + phase.masked
    last = 0 if shape.scaled else (1 - drop_path) * 2 * shape.hidden * shape.width * through
    return Flops(0.0, there.linear - last, there.attention, 0.0)


def executed(plan: Plan) -> float:
    """FLOPs of the whole run with what is computed twice: what a GPU has to do, unlike what a model needs."""
    batch = plan.config.data.batch
    return plan.flops + sum(phase.steps * batch * recomputed(plan, phase).total for phase in plan.phases)
