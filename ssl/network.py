"""Student and teacher: a backbone and its projection heads as one module each, and the objective over both."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from eosin.ssl import distributed
from eosin.ssl.attention import borders
from eosin.ssl.backbone import build_backbone, embed, packed_features
from eosin.ssl.config import Config
from eosin.ssl.losses.dino import dino_loss
from eosin.ssl.losses.ibot import ibot_loss
from eosin.ssl.losses.kde import kde_loss
from eosin.ssl.losses.koleo import koleo_loss
from eosin.ssl.losses.targets import centered, sinkhorn, update_center


class Head(nn.Module):
    """Projection head of DINO: three linear layers, L2 normalization, and unit-norm prototypes.

    Caron et al. 2021, appendix C. The prototypes' norm is fixed at 1, as DINOv2 does.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, bottleneck))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores [N, K] of features [N, D]: cosines with the prototypes."""
        x = F.normalize(self.mlp(x).float(), dim=1, eps=1e-6)
        return F.linear(x, F.normalize(self.prototypes.float(), dim=1))


class Output(NamedTuple):
    """What a network says of a batch.

    Attributes:
        cls_scores: [V, B, K] of the class tokens, global crops first.
        patch_scores: [M, K] of the masked patches of global crops.
        cls: [V, B, D] class tokens before the head.
        tokens: [T, D], all of every crop in turn, normalized; None where they were not asked for.
    """

    cls_scores: torch.Tensor
    patch_scores: torch.Tensor
    cls: torch.Tensor
    tokens: torch.Tensor | None


class Network(nn.Module):
    """Backbone and heads; ``forward`` does the packed pass, so that it can be wrapped whole."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = build_backbone(config, packed=True)
        width = self.backbone.embed_dim
        self.mask_token = nn.Parameter(torch.zeros(width))
        o = config.objective
        self.dino_head = Head(width, o.hidden, o.bottleneck, o.prototypes)
        # Tied heads are one module under one name, so that a checkpoint holds each weight once.
        self.ibot_head = (
            None
            if o.tied_heads
            else Head(width, o.hidden, o.ibot_bottleneck or o.bottleneck, o.ibot_prototypes or o.prototypes)
        )

    def forward(
        self,
        crops: list[torch.Tensor],
        masks: torch.Tensor,
        keys: torch.Tensor,
        *,
        hide: bool,
        rate: float,
        all_tokens: bool = False,
    ) -> Output:
        """Run crops of several sizes.

        Args:
            crops: [V_i, B, 3, S_i, S_i] for each crop size, global crops first; empty groups are left out.
            masks: [G·B, P] bool, the patches of global crops that iBOT compares.
            keys: [B] int64, the samples' places in the stream.
            hide: replace masked patches by the mask token (the student) or only look at them (the teacher).
            rate: drop path rate.
            all_tokens: return all tokens too, which costs the last block's work on those that no head sees.
        """
        crops = [c for c in crops if len(c)]
        tokens = [
            embed(self.backbone, group.flatten(0, 1), masks if hide and i == 0 else None, self.mask_token)
            for i, group in enumerate(crops)
        ]
        views = torch.arange(sum(len(c) for c in crops), device=keys.device)
        crop_keys = (keys + (views.unsqueeze(1) << 40)).flatten()  # positions stay below 2^40
        classes = borders([(len(t), t.shape[1]) for t in tokens], keys.device)[:-1].long()  # [V·B], places among tokens
        prefix, batch = self.backbone.num_prefix_tokens, crops[0].shape[1]
        patches = classes[: len(masks), None] + torch.arange(prefix, tokens[0].shape[1], device=keys.device)  # [G·B, P]
        wanted = torch.cat([classes, patches[masks]])
        count = sum(t.shape[:2].numel() for t in tokens)
        asked = torch.arange(count, device=keys.device) if all_tokens else wanted
        features = every = packed_features(self.backbone, tokens, crop_keys, rate, asked)
        if all_tokens:
            features = every.index_select(0, wanted)
        cls, hidden = features.split([len(classes), len(wanted) - len(classes)])  # [V·B, D], [M, D]
        return Output(
            self.dino_head(cls).view(-1, batch, len(self.dino_head.prototypes)),
            (self.ibot_head or self.dino_head)(hidden),
            cls.view(-1, batch, cls.shape[1]),
            every if all_tokens else None,
        )


class Targets(NamedTuple):
    """What the student shall say.

    Attributes:
        cls: [2, B, K], of the class tokens of global crops.
        patches: [M, K], of the masked patches.
    """

    cls: torch.Tensor
    patches: torch.Tensor


# Crops as in Network.forward, masks [2, B, P] bool and keys [B] int64 of some samples.
Part = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


def divide(part: Part, count: int) -> list[Part]:
    """Divide samples into ``count`` equal parts, in order."""
    crops, masks, keys = part
    groups = zip(*(group.chunk(count, dim=1) for group in crops))
    return [(list(g), m, k) for g, m, k in zip(groups, masks.chunk(count, dim=1), keys.chunk(count))]


class StudentTeacher(nn.Module):
    """A student network and its exponential moving average, with the objective between them."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Network(config)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        prototypes = config.objective.prototypes
        self.register_buffer("dino_center", torch.zeros(prototypes))
        self.register_buffer("ibot_center", torch.zeros(config.objective.ibot_prototypes or prototypes))
        self._moved_centers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def targets(self, parts: Sequence[Part], temperature: float) -> tuple[list[Targets], dict[str, torch.Tensor]]:
        """What the student shall say of each part of this process's share of a batch, and measures for monitoring.

        Sinkhorn-Knopp and centering see the global batch whole, however it is divided over processes and parts.

        Args:
            temperature: the teacher's.

        Returns:
            The targets of each part; and teacher_entropy [], prototype_entropy [], answers [2, B] (the prototype that a
            crop is most) and cls [2, B, D] of the whole share.
        """
        seen: list[Output] = [
            self.teacher(crops[:1], masks.flatten(0, 1), keys, hide=False, rate=0.0) for crops, masks, keys in parts
        ]
        cls = self._targets(_joined([s.cls_scores for s in seen], dim=1).flatten(0, 1), "dino", temperature)
        cls = cls.unflatten(0, (len(seen[0].cls_scores), -1))  # [2, B, K]
        patches = self._targets(_joined([s.patch_scores for s in seen]), "ibot", temperature)
        mean = distributed.all_sum(cls.mean(dim=(0, 1))) / distributed.ranks()
        measures = {
            "teacher_entropy": -(cls * cls.clamp(min=1e-30).log()).sum(dim=2).mean(),
            "prototype_entropy": -(mean * mean.clamp(min=1e-30).log()).sum(),
            "answers": cls.argmax(dim=2),
            "cls": _joined([s.cls for s in seen], dim=1),
        }
        of_parts = zip(
            cls.split([s.cls_scores.shape[1] for s in seen], dim=1), patches.split([len(s.patch_scores) for s in seen])
        )
        return [Targets(*each) for each in of_parts], measures

    def losses(self, student: nn.Module, part: Part, targets: Targets) -> dict[str, torch.Tensor]:
        """The objective's terms, unweighted.

        KoLeo and KDE see the same part on every process, not the parts before and after it.

        Args:
            student: ``self.student`` or what wraps it for distributed training.
            targets: of this part, from :meth:`targets`.
        """
        objective = self.config.objective
        crops, masks, keys = part
        masks = masks.flatten(0, 1)
        said: Output = student(crops, masks, keys, hide=True, rate=self.config.model.drop_path)
        temperature = objective.student_temperature
        return {
            "dino": dino_loss(said.cls_scores, targets.cls, temperature),
            "ibot": ibot_loss(said.patch_scores, targets.patches, masks, temperature),
            "koleo": sum((koleo_loss(c) for c in said.cls[:2]), torch.zeros((), device=keys.device)),
            "kde": sum(
                (kde_loss(c, objective.kde_concentration) for c in said.cls[:2]), torch.zeros((), device=keys.device)
            ),
        }

    @torch.no_grad()
    def update_teacher(self, momentum: float, finite: torch.Tensor | bool = True) -> None:
        """Move every weight of the teacher by (1 - momentum) of its distance to the student's, and its centers.

        Args:
            finite: [] bool; where it is false, nothing moves. A tensor is not waited for.
        """
        teacher = [distributed.local(p.detach()) for p in self.teacher.parameters()]
        student = [distributed.local(p.detach()) for p in self.student.parameters()]
        finite = torch.as_tensor(finite, device=teacher[0].device)
        torch._foreach_lerp_(teacher, student, [finite * (1 - momentum)] * len(teacher))
        for name, moved in self._moved_centers.items():
            center = getattr(self, name)
            center.copy_(torch.where(finite, moved, center))
        self._moved_centers.clear()

    def _targets(self, scores: torch.Tensor, name: str, temperature: float) -> torch.Tensor:
        if self.config.objective.targets == "sinkhorn":
            return sinkhorn(scores, temperature)
        center = getattr(self, f"{name}_center")
        # Kept aside until the step is known to be good.
        self._moved_centers[f"{name}_center"] = moved = center.clone()
        update_center(moved, scores)
        return centered(scores, center, temperature)


def _joined(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """Parts in one tensor; one part is not copied, since scores are large."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
