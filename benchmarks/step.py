"""Whole training steps to time: Eosin's, that of lightly's DINOv2 example, and that of facebookresearch/dinov2.

Each function makes a network, an optimizer and a batch, and returns a function that does one training step: crops,
teacher and student, all losses, backward pass, optimizer, teacher. What a step leaves out is said there. The peers are
called as their authors call them; nothing of theirs is changed but what is said to be.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from eosin.ssl import feed, parallel
from eosin.ssl.config import Config
from eosin.ssl.network import StudentTeacher
from eosin.ssl.optimizer import build_optimizer, set_moment
from eosin.ssl.schedules import at

Step = Callable[[], None]
Section = Callable[[str], AbstractContextManager[Any]]
MID_RUN = 20_000  # the step that a benchmark is at: past warm-up and the frozen last layer


def eosin(config: Config, images: torch.Tensor, *, ready: bool = False, section: Section = record_function) -> Step:
    """Steps of the loop of ``eosin.ssl.train``, without its log and its checkpoints, on the device of ``images``.

    Args:
        images: the tiles of a batch, [B, 3, T, T] uint8.
        ready: make crops and masks once, ahead.
        section: a context for each part of the step, by its name, so that parts can be timed.
    """
    device = images.device
    torch.manual_seed(0)
    model = StudentTeacher(config).to(device)
    student = parallel.spread(model, config, device)
    parameters, optimizer = list(model.student.parameters()), build_optimizer(model.student, config)
    phase = feed.Phase(range(config.run.steps), config, None, None, None)  # type: ignore[arg-type]
    number, count = MID_RUN, len(images)

    def views() -> feed.Views:
        places = torch.arange(count) + number * count
        return feed.views(phase, {"images": images, "position": places, "slide": torch.zeros_like(places)}, device)

    made = views() if ready else None

    def step() -> None:
        nonlocal number
        number += 1
        moment = at(number, config)
        set_moment(optimizer, moment)
        with section("augmentation"):
            part = (made or views())[:3]
        with parallel.autocast(config, device):
            with section("teacher"):
                targets, _ = model.targets([part], moment.teacher_temperature)
            with section("student"):
                terms = model.losses(student, part, targets[0])
        objective = config.objective
        loss = objective.dino * terms["dino"] + objective.ibot * terms["ibot"] + objective.koleo * terms["koleo"]
        with section("backward"):
            loss.backward()
        with section("optimizer and teacher update"):
            finite = parallel.clip(parameters, config.optim.clip).isfinite()
            optimizer.found_inf = 1 - finite.float()  # type: ignore[attr-defined]
            optimizer.step()
            model.update_teacher(moment.momentum, finite)
            optimizer.zero_grad()

    return step


def lightly(config: Config, images: torch.Tensor, *, ready: bool = False) -> Step:
    """Steps of lightly's documented DINOv2 example (examples/pytorch/dinov2.py, MIT) on the CPU.

    Model, heads, crops, drop path and objective are those of ``config``, where the example has ViT-S/16 at 224 px. The
    example clips no gradient and its optimizer has one group, which saves it work. Its loader's processes are threads
    here, as many as torch has: two processes that compete with the step for the same cores would be slower.

    Args:
        images, ready: as for :func:`eosin`.
    """
    import timm
    from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
    from lightly.models.modules import DINOv2ProjectionHead, MaskedVisionTransformerTIMM
    from lightly.models.utils import random_block_mask, update_drop_path_rate, update_momentum
    from lightly.transforms.dino_transform import DINOTransform
    from lightly.utils.scheduler import cosine_schedule
    from torchvision.transforms.functional import to_pil_image

    torch.manual_seed(0)
    crops, objective, count = config.crops, config.objective, len(images)
    vit = timm.create_model(
        config.model.architecture,
        img_size=crops.global_size,
        num_classes=0,
        pos_embed="learn",
        dynamic_img_size=True,
        **config.model.args,
    )

    def head() -> torch.nn.Module:
        return DINOv2ProjectionHead(vit.embed_dim, objective.hidden, objective.bottleneck, objective.prototypes)

    def backbone() -> torch.nn.Module:
        return MaskedVisionTransformerTIMM(vit=vit, antialias=False, pos_embed_initialization="skip")

    teacher, teacher_head = backbone(), head()
    student, student_head = copy.deepcopy(teacher), head()
    update_drop_path_rate(student.vit, drop_path_rate=config.model.drop_path, mode="uniform")
    for frozen in (teacher, teacher_head):
        frozen.requires_grad_(False).eval()
    model = torch.nn.ModuleList([teacher, teacher_head, student, student_head])
    dino, ibot, koleo = DINOLoss(objective.prototypes), IBOTPatchLoss(objective.prototypes), KoLeoLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.001)

    transform = DINOTransform(
        global_crop_size=crops.global_size,
        global_crop_scale=tuple(crops.global_scale),
        local_crop_size=crops.local_size,
        local_crop_scale=tuple(crops.local_scale),
        n_local_views=crops.local_count,
    )
    pictures = [to_pil_image(image) for image in images]
    pool = ThreadPoolExecutor(torch.get_num_threads())
    grid, number = teacher.vit.patch_embed.grid_size, MID_RUN

    def views() -> list[torch.Tensor]:
        return [torch.stack(view) for view in zip(*pool.map(transform, pictures))]

    def block_mask() -> torch.Tensor:
        return random_block_mask(size=(2 * count, *grid))

    made = (views(), block_mask()) if ready else None

    def step() -> None:
        nonlocal number
        number += 1
        with record_function("augmentation"):
            crops_, blocks = made or (views(), block_mask())
            globals_, locals_ = torch.cat(crops_[:2]), torch.cat(crops_[2:])
        mask = torch.zeros(2 * count, teacher.sequence_length, dtype=torch.bool)
        mask[:, 1:] = blocks.flatten(1)
        with torch.no_grad(), record_function("teacher"):
            features = teacher.encode(globals_)
            target, patch_target = teacher_head(features[:, 0]), teacher_head(features[mask])
        with record_function("student"):
            features = student.encode(globals_, mask=mask)
            cls = features[:, 0]
            said, patch_said = student_head(cls), student_head(features[mask])
            said = torch.cat([said, student_head(student.encode(locals_, mask=None)[:, 0])])
            temperature = objective.teacher_temperature[1]
            loss = dino(target.chunk(2), said.chunk(len(crops_)), teacher_temp=temperature)
            loss = loss + ibot(patch_target, patch_said, mask=blocks, teacher_temp=temperature)
            loss = loss + objective.koleo * sum(koleo(part) for part in cls.chunk(2))
        with record_function("backward"):
            loss.backward()
        with record_function("optimizer and teacher update"):
            for group in optimizer.param_groups:
                group["weight_decay"] = cosine_schedule(number, config.run.steps, *config.optim.weight_decay)
            optimizer.step()
            optimizer.zero_grad()
            momentum = cosine_schedule(number, config.run.steps, *objective.momentum)
            update_momentum(student, teacher, m=momentum)
            update_momentum(student_head, teacher_head, m=momentum)

    return step


def dinov2(config: Config, images: torch.Tensor, *, precision: str) -> Step:
    """Steps of facebookresearch/dinov2 (Apache-2.0; a checkout in DINOV2_CHECKOUT) as its ``do_train`` runs them.

    SSLMetaArch in FSDP1, its own collation and masks, optimizer, clipping and teacher update, and its fetch of every
    loss for the log. Crops and masks are ready on the device: reading, augmentation and collation are left out, since
    they are the work of a loader's processes there. Its first step looks for a private attribute of FSDP that torch no
    longer has, to share streams between networks; that is switched off.

    Args:
        images: the tiles of a batch, [B, 3, T, T] uint8 on a GPU.
        precision: "fp16", its default, with its gradient scaler; or "bf16" without one.
    """
    where = Path(os.environ.get("DINOV2_CHECKOUT", ""))
    if not (where / "dinov2/train/ssl_meta_arch.py").is_file():
        raise RuntimeError("set DINOV2_CHECKOUT to a checkout of github.com/facebookresearch/dinov2")
    sys.path.insert(0, str(where))
    import dinov2.distributed
    from dinov2.configs import dinov2_default_config
    from dinov2.data import MaskingGenerator, collate_data_and_cast
    from dinov2.train.ssl_meta_arch import SSLMetaArch
    from dinov2.train.train import apply_optim_scheduler, build_optimizer
    from omegaconf import OmegaConf

    dinov2.distributed.enable(overwrite=True)  # a process group of one
    objective, crops = config.objective, config.crops
    part = {"mixed_precision": {"param_dtype": precision}}
    parts = {"backbone": part, "dino_head": part, "ibot_head": part}
    cfg = OmegaConf.merge(
        dinov2_default_config,
        {
            "compute_precision": {"grad_scaler": precision == "fp16", "student": parts, "teacher": parts},
            "student": {
                "arch": config.model.architecture.split("_patch")[0],
                "drop_path_rate": config.model.drop_path,
                "block_chunks": 4,  # as in both of its recipes
            },
            "dino": {
                "head_n_prototypes": objective.prototypes,
                "head_hidden_dim": objective.hidden,
                "head_bottleneck_dim": objective.bottleneck,
                "koleo_loss_weight": objective.koleo,
            },
            "train": {"centering": "centering"},
            "crops": {
                "global_crops_size": crops.global_size,
                "local_crops_size": crops.local_size,
                "local_crops_number": crops.local_count,
            },
        },
    )
    torch.manual_seed(0)
    model = SSLMetaArch(cfg).to(images.device)
    model.prepare_for_distributed_training()
    model.need_to_synchronize_fsdp_streams = False
    model.train()
    optimizer = build_optimizer(cfg, model.get_params_groups())

    made = feed.multi_crop(images, torch.arange(len(images), device=images.device), config)
    samples = [({"global_crops": made[0][:, i], "local_crops": made[1][:, i]},) for i in range(len(images))]
    side = crops.global_size // cfg.student.patch_size
    batch = collate_data_and_cast(
        samples,
        mask_ratio_tuple=cfg.ibot.mask_ratio_min_max,
        mask_probability=cfg.ibot.mask_sample_probability,
        n_tokens=side**2,
        mask_generator=MaskingGenerator(input_size=(side, side), max_num_patches=0.5 * side * side),
        dtype={"fp16": torch.half, "bf16": torch.bfloat16}[precision],
    )
    batch = {name: value.to(images.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    del made, samples
    scaler, number = model.fp16_scaler, MID_RUN

    def step() -> None:
        nonlocal number
        number += 1
        moment = at(number, config)
        apply_optim_scheduler(optimizer, moment.lr, moment.weight_decay, moment.lr)
        optimizer.zero_grad(set_to_none=True)
        losses = model.forward_backward(batch, teacher_temp=moment.teacher_temperature)
        if scaler is not None:
            scaler.unscale_(optimizer)
        for network in model.student.values():
            network.clip_grad_norm_(cfg.optim.clip_grad)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        model.update_teacher(moment.momentum)
        for loss in losses.values():
            loss.item()

    return step
