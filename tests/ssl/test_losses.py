import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from eosin.ssl.losses.dino import dino_loss
from eosin.ssl.losses.ibot import ibot_loss
from eosin.ssl.losses.kde import kde_loss
from eosin.ssl.losses.koleo import koleo_loss
from eosin.ssl.losses.targets import centered, sinkhorn, update_center


def test_dino_is_the_mean_over_pairs_of_different_crops():
    torch.manual_seed(0)
    student, targets = torch.randn(5, 3, 7), torch.softmax(torch.randn(2, 3, 7), dim=2)
    pairs = [
        -(targets[t] * F.log_softmax(student[s] / 0.1, dim=1)).sum(dim=1).mean()
        for t in range(2)
        for s in range(5)
        if s != t
    ]
    torch.testing.assert_close(dino_loss(student, targets, 0.1), torch.stack(pairs).mean())


def test_a_student_that_knows_nothing_loses_ln_k():
    targets = torch.softmax(torch.randn(2, 4, 64), dim=2)
    assert dino_loss(torch.zeros(6, 4, 64), targets, 0.1).item() == pytest.approx(math.log(64), abs=1e-5)


def test_without_local_crops_only_global_pairs_count():
    torch.manual_seed(0)
    student, targets = torch.randn(2, 3, 7), torch.softmax(torch.randn(2, 3, 7), dim=2)
    logs = F.log_softmax(student / 0.1, dim=2)
    expected = -((targets[0] * logs[1]).sum(1).mean() + (targets[1] * logs[0]).sum(1).mean()) / 2
    torch.testing.assert_close(dino_loss(student, targets, 0.1), expected)


def test_ibot_weighs_crops_and_not_patches():
    torch.manual_seed(0)
    masks = torch.zeros(3, 4, dtype=torch.bool)
    masks[0, 1] = True
    masks[2, :3] = True
    student, targets = torch.randn(4, 5), torch.softmax(torch.randn(4, 5), dim=1)
    each = -(targets * F.log_softmax(student / 0.1, dim=1)).sum(dim=1)
    expected = (each[0] + each[1:].mean()) / 3  # the unmasked crop counts as 0
    torch.testing.assert_close(ibot_loss(student, targets, masks, 0.1), expected)


def test_ibot_without_masks_is_zero_and_keeps_the_graph():
    student = torch.zeros(0, 5, requires_grad=True)
    loss = ibot_loss(student, torch.zeros(0, 5), torch.zeros(2, 4, dtype=torch.bool), 0.1)
    loss.backward()
    assert loss.item() == 0
    assert student.grad is not None


def test_koleo_by_hand_and_its_direction():
    angle = torch.tensor([0.0, 0.1, 2.0])
    features = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1).requires_grad_()
    near, far = 2 * math.sin(0.05), 2 * math.sin(0.95)
    loss = koleo_loss(features)
    assert loss.item() == pytest.approx(-(2 * math.log(near) + math.log(far)) / 3, abs=1e-4)
    loss.backward()
    # A step against the gradient separates the two near-duplicates.
    moved = (features - 1e-3 * features.grad).detach()
    assert F.cosine_similarity(moved[0], moved[1], dim=0) < math.cos(0.1)


def test_koleo_of_identical_features_is_finite():
    features = torch.ones(4, 8, requires_grad=True)
    koleo_loss(features).backward()
    assert torch.isfinite(features.grad).all()


def test_sinkhorn_balances_rows_and_prototypes():
    torch.manual_seed(0)
    targets = sinkhorn(torch.randn(64, 16), 0.5, iterations=50)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(64))
    torch.testing.assert_close(targets.sum(dim=0), torch.full((16,), 4.0), atol=1e-3, rtol=0)


def test_sinkhorn_has_the_form_of_its_fixed_point():
    # diag(u) exp(S/T) diag(v): the log of targets minus scores is a sum of a row and a column term.
    scores = torch.randn(8, 5, dtype=torch.float64)
    residual = sinkhorn(scores, 0.7).double().log() - scores / 0.7
    interaction = residual - residual.mean(0) - residual.mean(1, keepdim=True) + residual.mean()
    assert interaction.abs().max() < 1e-5


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_sinkhorn_survives_large_scores_and_no_rows(scale):
    assert torch.isfinite(sinkhorn(scale * torch.randn(8, 5), 0.04)).all()
    assert sinkhorn(torch.zeros(0, 5), 0.04).shape == (0, 5)


def test_centering_follows_its_equations():
    scores, center = torch.randn(6, 4), torch.randn(4)
    torch.testing.assert_close(centered(scores, center, 0.04), torch.softmax((scores - center) / 0.04, dim=1))
    expected = 0.9 * center + 0.1 * scores.mean(dim=0)
    update_center(center, scores)
    torch.testing.assert_close(center, expected)


@pytest.mark.parametrize("loss", ["dino", "ibot", "koleo", "kde"])
def test_gradients_agree_with_finite_differences(loss):
    torch.manual_seed(0)
    masks = torch.tensor([[True, False], [True, True]])
    targets = torch.softmax(torch.randn(2, 3, 4), dim=2)
    # The losses compute in float32 by intent, hence the loose tolerances.
    functions = {
        "dino": lambda x: dino_loss(x.view(3, 3, 4), targets, 0.5),
        "ibot": lambda x: ibot_loss(x.view(9, 4)[:3], targets[0], masks, 0.5),
        "koleo": lambda x: koleo_loss(x.view(6, 6)),
        "kde": lambda x: kde_loss(x.view(6, 6), 5.0),
    }
    x = torch.randn(36, requires_grad=True)
    torch.autograd.gradcheck(functions[loss], x, eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=1e-4)


def test_kde_by_hand_and_its_direction():
    angle = torch.tensor([0.0, 0.1, 2.0])
    features = torch.stack([torch.cos(angle), torch.sin(angle)], dim=1).requires_grad_()
    cosines = {(i, j): math.cos(angle[i] - angle[j]) for i in range(3) for j in range(3)}
    expected = sum(
        math.log(sum(math.exp(5 * cosines[i, j]) for j in range(3) if j != i) / 2) for i in range(3)
    )  # each feature under the density of the two others
    loss = kde_loss(features, 5.0)
    assert loss.item() == pytest.approx(expected / 3, abs=1e-4)
    loss.backward()
    # A step against the gradient separates the two near-duplicates: the sign that one public trainer has reversed.
    moved = (features - 1e-2 * features.grad).detach()
    assert F.cosine_similarity(moved[0], moved[1], dim=0) < math.cos(0.1)


def test_kde_is_lowest_where_features_are_spread():
    spread = torch.eye(8)
    assert kde_loss(spread, 5.0) < kde_loss(spread + 0.5, 5.0) < kde_loss(torch.ones(8, 8), 5.0)
    assert kde_loss(torch.ones(8, 8), 5.0).item() == pytest.approx(5.0, abs=1e-4)
    assert kde_loss(torch.eye(8), 5.0).item() == pytest.approx(0.0, abs=1e-4)
    assert kde_loss(torch.ones(1, 8), 5.0).item() == 0


CHECKOUT = os.environ.get("DINOV2_CHECKOUT", "")
needs_dinov2 = pytest.mark.skipif(
    not Path(CHECKOUT, "dinov2/loss").is_dir(), reason="set DINOV2_CHECKOUT to a checkout of facebookresearch/dinov2"
)


@pytest.fixture
def dinov2(monkeypatch, tmp_path):
    """Its loss classes (Apache-2.0), from a checkout; some of them want a process group."""
    monkeypatch.syspath_prepend(CHECKOUT)
    from dinov2.loss.dino_clstoken_loss import DINOLoss
    from dinov2.loss.ibot_patch_loss import iBOTPatchLoss
    from dinov2.loss.koleo_loss import KoLeoLoss

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield SimpleNamespace(dino=DINOLoss(32), ibot=iBOTPatchLoss(32), koleo=KoLeoLoss())
    torch.distributed.destroy_process_group()


@needs_dinov2
def test_targets_are_those_of_dinov2(dinov2):
    torch.manual_seed(0)
    scores = torch.randn(12, 32).clamp(-1, 1)
    torch.testing.assert_close(sinkhorn(scores, 0.07), dinov2.dino.sinkhorn_knopp_teacher(scores, 0.07))
    masked = dinov2.ibot.sinkhorn_knopp_teacher(scores, 0.07, n_masked_patches_tensor=torch.tensor([12]))
    torch.testing.assert_close(sinkhorn(scores, 0.07), masked)
    center = torch.zeros(32)
    for _ in range(3):  # theirs moves the center one call later
        torch.testing.assert_close(
            centered(scores, center, 0.05), dinov2.dino.softmax_center_teacher(scores, 0.05), rtol=1e-5, atol=1e-6
        )
        dinov2.dino.update_center(scores)
        update_center(center, scores)


@needs_dinov2
def test_losses_are_those_of_dinov2(dinov2):
    torch.manual_seed(0)
    student, targets = torch.randn(6, 5, 32), torch.softmax(torch.randn(2, 5, 32), dim=2)
    # DINOv2 adds up local against global and global against global, and divides by the number of pairs.
    theirs = dinov2.dino(list(student[2:]), list(targets))
    theirs += dinov2.dino(list(student[:1]), [targets[1]]) + dinov2.dino(list(student[1:2]), [targets[0]])
    torch.testing.assert_close(dino_loss(student, targets, 0.1), theirs / 10)
    masks = torch.rand(4, 9) < 0.4
    masks[1] = False
    patches, patch_targets = torch.randn(int(masks.sum()), 32), torch.softmax(torch.randn(int(masks.sum()), 32), dim=1)
    theirs = dinov2.ibot.forward_masked(patches, patch_targets, student_masks_flat=masks)
    torch.testing.assert_close(ibot_loss(patches, patch_targets, masks, 0.1), theirs)
    features = torch.randn(16, 24)
    torch.testing.assert_close(koleo_loss(features), dinov2.koleo(features))
