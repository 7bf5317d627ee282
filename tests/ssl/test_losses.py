import math

import pytest
import torch
import torch.nn.functional as F

from eosin.ssl.losses.dino import dino_loss
from eosin.ssl.losses.ibot import ibot_loss
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


@pytest.mark.parametrize("loss", ["dino", "ibot", "koleo"])
def test_gradients_agree_with_finite_differences(loss):
    torch.manual_seed(0)
    masks = torch.tensor([[True, False], [True, True]])
    targets = torch.softmax(torch.randn(2, 3, 4), dim=2)
    # The losses compute in float32 by intent, hence the loose tolerances.
    functions = {
        "dino": lambda x: dino_loss(x.view(3, 3, 4), targets, 0.5),
        "ibot": lambda x: ibot_loss(x.view(9, 4)[:3], targets[0], masks, 0.5),
        "koleo": lambda x: koleo_loss(x.view(6, 6)),
    }
    x = torch.randn(36, requires_grad=True)
    torch.autograd.gradcheck(functions[loss], x, eps=1e-2, atol=2e-2, rtol=2e-2, nondet_tol=1e-4)
