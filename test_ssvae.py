"""Tests of ssvae.py: its mathematics against independent oracles, its data, training and commands.

    python -m pytest -q test_ssvae.py   runs the tests
    python test_ssvae.py                prints how fast training is here (a few minutes)

Tests on real images need SSVAE_DATA_DIR, a torchvision root, and are skipped without it.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributions as D
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ssvae
from ssvae import M1, M1M2, M2, NearestPoint

HERE = Path(__file__).parent
DRAWS = 40_000  # of z, where an expectation is compared with an integral


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """For the tests and the commands they run: models this small gain little from two, which, where
    other programs use the cores as well, wait for each other."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # whatever it was: sums depend on it


def scrambled(model, scale=0.7, seed=0):
    """The model in evaluation mode with random weights, so that nothing is near zero or equal."""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = scale * torch.randn(p.shape, generator=g)
    return model.eval()


@pytest.fixture
def fixed_noise(monkeypatch):
    """eps = 0.3 everywhere instead of a random draw, so that single values can be compared."""
    monkeypatch.setattr(ssvae, "sample_gaussian", lambda mu, lv: mu + 0.3 * torch.exp(0.5 * lv))


def assert_equal_with_gradients(found, oracle, model):
    """Two tensors, and the gradients of their sums with respect to the model's parameters."""
    torch.testing.assert_close(found, oracle, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    grad = lambda value: torch.autograd.grad(value.sum(), parameters, retain_graph=True)
    gradients = grad(found), grad(oracle)
    for gradient, other in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3)


def grid(n=4001, width=9.0):
    """Points of a fine grid on the line, [n, 1], and the log of its spacing."""
    z = torch.linspace(-width, width, n)[:, None]
    return z, torch.log(z[1, 0] - z[0, 0])


def near(estimates, truth, sigmas=5):
    """Whether the mean of independent estimates is within so many standard errors of the truth."""
    error = estimates.double().std() / len(estimates) ** 0.5
    return abs(estimates.double().mean() - truth) < sigmas * error + 1e-3


# ---- building blocks -----------------------------------------------------------------------------


def test_log_bernoulli():
    """Against torch.distributions, from bfloat16 logits too, and finite at logits of 1e4."""
    x = (torch.rand(5, 700) < 0.5).float()
    for logits in (3 * torch.randn(5, 700), (3 * torch.randn(5, 700)).bfloat16()):
        oracle = D.Bernoulli(logits=logits.float()).log_prob(x).sum(-1)
        torch.testing.assert_close(ssvae.log_bernoulli(x, logits), oracle)
    assert ssvae.log_bernoulli(x, 1e4 * torch.randn(5, 700).sign()).isfinite().all()
    zero = torch.zeros(5, 700, requires_grad=True)
    (gradient,) = torch.autograd.grad(ssvae.log_bernoulli(x, zero).sum(), zero)
    torch.testing.assert_close(gradient, x - 0.5)  # x - sigmoid(0)


def test_log_gaussian():
    """Against torch.distributions, with the gradients of all inputs; from bfloat16 ones, too."""
    oracle = lambda x, mu, logvar: D.Normal(mu, (0.5 * logvar).exp()).log_prob(x).sum(-1)
    inputs = [part.requires_grad_() for part in torch.randn(3, 5, 7)]
    values = [f(*inputs) for f in (ssvae.log_gaussian, oracle)]
    torch.testing.assert_close(*values)
    for pair in zip(*(torch.autograd.grad(value.sum(), inputs) for value in values)):
        torch.testing.assert_close(*pair)
    x, mu, logvar = torch.randn(5, 7), *torch.randn(2, 5, 7).bfloat16()
    rounded = oracle(x, mu.float(), logvar.float())
    torch.testing.assert_close(ssvae.log_gaussian(x, mu, logvar), rounded)


def test_kl_gaussian():
    """Against torch.distributions, and against the mean of log q - log p over draws from q."""
    mu, logvar = torch.randn(2, 5, 7)
    q, p = D.Normal(mu, (0.5 * logvar).exp()), D.Normal(0.0, 1.0)
    kl = ssvae.kl_gaussian(mu, logvar)
    torch.testing.assert_close(kl, D.kl_divergence(q, D.Normal(0.0, torch.ones(5, 7))).sum(-1))
    z = q.sample((DRAWS,))
    log_ratio = (q.log_prob(z) - p.log_prob(z)).sum(-1)
    assert all(near(log_ratio[:, i], kl[i]) for i in range(5))


def test_reparameterisation_gradient():
    """d E[z^2] = d (mu^2 + sigma^2): 2 mu in mu, and sigma^2 in log sigma^2."""
    torch.manual_seed(0)
    mu = torch.full((DRAWS, 1), 0.8, requires_grad=True)
    logvar = torch.full((DRAWS, 1), 0.4, requires_grad=True)
    ssvae.sample_gaussian(mu, logvar).square().sum().backward()
    assert near(mu.grad[:, 0], 1.6)
    assert near(logvar.grad[:, 0], torch.tensor(0.4).exp())


# ---- the bounds, against numerical integration over a one-dimensional z --------------------------


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_eq5_M1_bound_and_its_gap(likelihood):
    """log p(x) and KL(q(z|x) || p(z|x)) by quadrature: the mean of -J is their difference."""
    torch.manual_seed(0)
    m1 = scrambled(M1(6, z_dim=1, hidden=(5,), likelihood=likelihood))
    x = (torch.rand(1, 6) < 0.5).float()
    with torch.no_grad():
        z, log_dz = grid()
        log_p_xz = m1.log_density(x.expand(len(z), -1), *m1.decode(z))
        log_p_xz = log_p_xz + D.Normal(0, 1).log_prob(z[:, 0])
        log_p_x = torch.logsumexp(log_p_xz + log_dz, 0)
        mu, logvar = m1.encode(x)
        log_q = D.Normal(mu[0], (0.5 * logvar[0]).exp()).log_prob(z[:, 0])
        gap = (log_q.exp() * (log_q - (log_p_xz - log_p_x)) * log_dz.exp()).sum()
        J = m1.J(x.expand(DRAWS, -1))
        log_w = m1.log_weight(x.expand(DRAWS, -1))
    assert gap > 0.01  # so the comparison means something
    assert near(-J, log_p_x - gap)
    assert near((log_w - log_p_x).exp(), 1.0)  # E[w] = p(x)


def test_eq5_is_an_equality_for_the_exact_posterior():
    """Linear-Gaussian p(x|z): log p(x) and the posterior are known in closed form."""
    torch.manual_seed(0)
    m1 = M1(4, z_dim=2, hidden=(), likelihood="gaussian").eval()
    W = torch.tensor([[1.0, 1], [1, -1], [0.5, 0.5], [0, 0]])  # orthogonal columns
    b, s2 = torch.tensor([0.3, -0.2, 0.1, 0.5]), 0.6
    # the posterior is N(W'(x - b) / s2 / precision, 1 / precision)
    precision = 1 + (W**2).sum(0) / s2
    A = W.T / s2 / precision[:, None]
    with torch.no_grad():
        m1.p_x[0].weight.copy_(torch.cat([W, torch.zeros(4, 2)]))
        m1.p_x[0].bias.copy_(torch.cat([b, torch.full((4,), s2).log()]))
        m1.q_z[0].weight.copy_(torch.cat([A, torch.zeros(2, 4)]))
        m1.q_z[0].bias.copy_(torch.cat([-A @ b, -precision.log()]))
        x = torch.randn(4)
        truth = D.MultivariateNormal(b, W @ W.T + s2 * torch.eye(4)).log_prob(x)
        assert near(-m1.J(x.expand(DRAWS, -1)), truth)


def test_M1_objective_weighs_the_KL_alone(fixed_noise):
    """torch.distributions' log p(x|z) and KL, the latter times beta and the ramp's weight."""
    m1, x = scrambled(M1(6, 2, (5,))), (torch.rand(4, 6) < 0.5).float()
    mu, logvar = m1.q_z(x).chunk(2, 1)
    q, prior = D.Normal(mu, (logvar / 2).exp()), D.Normal(0.0, torch.ones(4, 2))
    log_p = D.Bernoulli(logits=m1.p_x(mu + 0.3 * q.scale)).log_prob(x).sum(1)
    kl = D.kl_divergence(q, prior).sum(1)
    for done, weight in ((0.0, 0.0), (0.05, 0.075), (0.1, 0.15), (0.9, 0.3)):
        found = m1.objective(None, None, x, 0, 1, ssvae.fade_in(done, 0.2), {"beta": 0.3})
        assert_equal_with_gradients(found, (weight * kl - log_p).mean(), m1)
    assert ssvae.fade_in(0.0, 0.0) == 1.0


def quadrature(m2, x):
    """log p(x,y) and the gap KL(q(z|x,y) || p(z|x,y)) for every y, both [K], for one x, [1, D], by
    quadrature over a one-dimensional z."""
    z, log_dz = grid()
    log_p, gaps = [], []
    for y in torch.arange(m2.y_dim)[:, None]:
        log_p_xyz = m2.log_density(x.expand(len(z), -1), *m2.decode(y.expand(len(z)), z))
        log_p_xyz = log_p_xyz + D.Normal(0, 1).log_prob(z[:, 0]) - np.log(m2.y_dim)
        log_p.append(torch.logsumexp(log_p_xyz + log_dz, 0))
        mu, logvar = m2.encode(x, y)
        log_q = D.Normal(mu[0], (0.5 * logvar[0]).exp()).log_prob(z[:, 0])
        gaps.append((log_q.exp() * (log_q - log_p_xyz + log_p[-1]) * log_dz.exp()).sum())
    return torch.stack(log_p), torch.stack(gaps)


def small_m2(likelihood="bernoulli", **kw):
    torch.manual_seed(0)
    return scrambled(M2(6, 3, z_dim=1, hidden=(5, 4), likelihood=likelihood, **kw))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_eq6_labelled_bound(likelihood):
    """The mean of -L(x,y) is log p(x,y) - KL(q(z|x,y) || p(z|x,y)), both by quadrature."""
    m2, x = small_m2(likelihood), (torch.rand(1, 6) < 0.5).float()
    with torch.no_grad():
        log_p, gaps = quadrature(m2, x)
        assert (gaps > 0.01).all()
        for y in range(3):
            L = m2.L(x.expand(DRAWS, -1), torch.full((DRAWS,), y))
            assert near(-L, log_p[y] - gaps[y])


def enumerated_U(m2, x, q):
    """Eq. 7 written out image by image and label by label, on one-hot labels and torch's own
    distributions, for eps = 0.3: nothing here is shared with M2.L or M2.U but the weights."""

    def run(net, table, inputs, y):  # the first layer as the paper has it: W [inputs, one-hot(y)]
        W = torch.cat([net[0].weight, table.weight.T], 1)
        one_hot = F.one_hot(torch.tensor(y), len(table.weight)).float()
        return net[1:]((torch.cat([inputs, one_hot]) @ W.T + net[0].bias)[None])[0]

    U = []
    for n in range(len(x)):
        total = -D.Categorical(probs=q[n]).entropy()
        for y in range(m2.y_dim):
            mu, logvar = run(m2.q_z, m2.q_z_y, x[n], y).chunk(2)
            q_z = D.Normal(mu, (0.5 * logvar).exp())
            z = mu + 0.3 * q_z.scale
            p_x = D.Bernoulli(logits=run(m2.p_x, m2.p_x_y, z, y))
            kl = D.kl_divergence(q_z, D.Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum()
            minus_L = p_x.log_prob(x[n]).sum() - np.log(m2.y_dim) - kl
            total = total + q[n, y] * -minus_L
        U.append(total)
    return torch.stack(U)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.16])
@pytest.mark.parametrize("batch_norm", ["none", "all"])
def test_eq7_unlabelled_bound_by_enumeration(fixed_noise, threshold, batch_norm):
    """U and its gradient equal the enumerated sum's, for q(y|x) cut at the threshold as well."""
    m2 = small_m2(batch_norm=batch_norm)
    x = (torch.rand(9, 6) < 0.5).float()
    q = m2.q_y(x).softmax(-1)
    q = q * (q >= threshold)
    q = q / q.sum(-1, keepdim=True)
    if threshold:
        assert (q == 0).any()
    assert_equal_with_gradients(m2.U(x, threshold=threshold), enumerated_U(m2, x, q), m2)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("threshold", [0.0, 0.16])
def test_eq7_unlabelled_bound_and_its_gap(threshold, likelihood):
    """The mean of -U(x) is log p(x) less the gap KL(q(y,z|x) || p(y,z|x)) = KL(q(y|x) || p(y|x)) +
    the mean of eq. 6's gaps, by quadrature and enumeration; of the truncated sum as well, with q~
    in place of q."""
    m2 = small_m2(likelihood)
    with torch.no_grad():
        for x in (torch.rand(4, 1, 6) < 0.5).float():
            log_p, gaps = quadrature(m2, x)
            log_p_x, q = torch.logsumexp(log_p, 0), m2.q_y(x)[0].softmax(0)
            q = D.Categorical(probs=q * (q >= threshold))
            gap = D.kl_divergence(q, D.Categorical(logits=log_p)) + (q.probs * gaps).sum()
            assert near(-m2.U(x.expand(DRAWS, -1), threshold=threshold), log_p_x - gap)
            log_w = m2.log_weight(x.expand(DRAWS, -1))
            assert near((log_w - log_p_x).exp(), 1.0)  # E[w] = p(x)


@pytest.mark.parametrize("threshold", [0.0, 0.16])
def test_images_do_not_depend_on_their_minibatch(fixed_noise, threshold):
    """One by one or together, whatever the number of pairs that fill up the truncated sum."""
    m2, x = small_m2(), (torch.rand(30, 6) < 0.5).float()
    for f in (lambda x: m2.U(x, threshold=threshold), m2.log_weight):
        alone = torch.cat([f(one) for one in x.split(1)])
        for n in range(21, 31):
            torch.testing.assert_close(f(x[:n]), alone[:n])


def test_truncated_sum_tends_to_the_full_one(fixed_noise):
    """Below the smallest q(y|x) nothing is cut: the truncated U is the full one, as is bound."""
    m2, x = small_m2(), (torch.rand(9, 6) < 0.5).float()
    full = m2.U(x)
    smallest = m2.log_q_y(x).exp().min().item()
    torch.testing.assert_close(m2.U(x, threshold=0.9 * smallest), full)
    assert not torch.allclose(m2.U(x, threshold=0.16), full)
    torch.testing.assert_close(-small_m2(threshold=0.16).bound(x), full)


def test_eq7_is_least_where_q_is_bayes_rule(fixed_noise):
    """For fixed L, U is least at q = softmax(-L), where it is -log sum_y exp(-L(x,y))."""
    m2, x = small_m2(), (torch.rand(1, 6) < 0.5).float()
    L = m2.L(x, torch.arange(3), torch.zeros(3, dtype=torch.long)).detach()
    best = m2.U(x, (-L).log_softmax(-1)[None])
    torch.testing.assert_close(best, -torch.logsumexp(-L, 0)[None])
    for _ in range(20):
        assert m2.U(x, torch.randn(1, 3).log_softmax(-1)) >= best


@pytest.mark.parametrize("threshold", [0.0, 0.16])
def test_eq8_eq9_J_alpha_against_a_loop_over_points(fixed_noise, threshold):
    """The minibatch estimate on the whole set is J^alpha / (N + M), alpha on the labelled mean.
    U is enumerated, with q(y|x) cut by hand."""
    m2 = small_m2(threshold=threshold)
    x_l, x_u = (torch.rand(2, 8, 6) < 0.5).float()
    x_l, y_l = x_l[:3], torch.tensor([0, 1, 2])
    J = sum(m2.L(x_l[i : i + 1], y_l[i : i + 1]) for i in range(3))
    q = m2.q_y(x_u).softmax(-1)
    q = q * (q >= threshold)
    J = J + enumerated_U(m2, x_u, q / q.sum(-1, keepdim=True)).sum()
    cross_entropy = sum(-m2.q_y(x_l)[i].softmax(-1)[y_l[i]].log() for i in range(3)) / 3
    alpha = 0.7 * (3 + 8)  # the paper's alpha; 0.7 is ours
    oracle = (J + alpha * cross_entropy) / (3 + 8)
    log_q = m2.log_q_y(torch.cat([x_l, x_u]))
    assert_equal_with_gradients(m2.J_alpha(x_l, y_l, x_u, log_q, 3 / 11, 0.7), oracle[0], m2)


def test_objective_is_J_alpha_and_what_is_added(fixed_noise, monkeypatch):
    """U counts as much as fade says (a number or, on GPUs, a tensor). The balance is
    torch.distributions' KL from p(y) to the mean of q(y|x), of unlabelled images alone. The
    roughness counts twice or not at all, by chance."""
    m2 = small_m2()
    x, y = (torch.rand(7, 6) < 0.5).float(), torch.tensor([0, 1, 2])
    x_l, x_u = x[:3], x[3:]
    s = {"alpha": 0.7, "balance": 0.3, "smooth": 0.0, "trust": 0}
    p, mean_q = D.Categorical(logits=torch.zeros(3)), D.Categorical(m2.q_y(x_u).softmax(-1).mean(0))
    kl = D.kl_divergence(p, mean_q)
    torch.testing.assert_close(m2.imbalance(m2.log_q_y(x_u).repeat(100, 1)), kl)
    balance = 0.3 * 4 / (50 * 3) * kl  # 4 images, 3 classes
    for fade in (1.0, 0.3, torch.tensor(0.3)):
        oracle = m2.J_alpha(x_l, y, x_u, m2.log_q_y(x), 0.5, 0.7)
        oracle = oracle - (1 - fade) * 0.5 * m2.U(x_u).mean() + balance
        assert_equal_with_gradients(m2.objective(x_l, y, x_u, 20, 20, fade, s), oracle, m2)
    start = 0.5 * m2.L(x_l, y).mean() + 0.7 * F.cross_entropy(m2.q_y(x_l), y) + balance
    torch.testing.assert_close(m2.objective(x_l, y, x_u, 20, 20, 0.0, s), start)
    rough = lambda seen, log_q, distance: distance * (log_q[:, 0] + seen.sum(1))
    monkeypatch.setattr(m2, "roughness", rough)
    added = 0.2 * (m2.log_q_y(x)[:, 0] + x.sum(1)).mean()
    s["smooth"] = 0.2
    found = torch.stack([m2.objective(x_l, y, x_u, 20, 20, 0.0, s) for _ in range(400)])
    twice = (found - start).abs() > added.abs()
    torch.testing.assert_close(found, start + 2 * added * twice)
    assert 150 < twice.sum() < 250
    s["trust"] = 4  # of 20 labels: all that is added to L and U weighs five times as much
    start = start + 4 * (0.7 * F.cross_entropy(m2.q_y(x_l), y) + balance)
    found = torch.stack([m2.objective(x_l, y, x_u, 20, 20, 0.0, s) for _ in range(40)])
    twice = (found - start).abs() > added.abs()
    torch.testing.assert_close(found, start + 10 * added * twice)
    assert 5 < twice.sum() < 35


def test_roughness_against_a_search_over_all_directions():
    """In two dimensions: never more than the largest KL on the circle, nearly always close to it,
    far more than at random; torch.distributions' KL. Its gradient leaves q(y|x) alone."""
    torch.manual_seed(0)
    m2, distance = scrambled(M2(2, 3, 1, (8,))), 0.05
    x = torch.randn(40, 2)
    angle = torch.linspace(0, 2 * torch.pi, 721)
    circle = distance * torch.stack([angle.cos(), angle.sin()], 1)
    with torch.no_grad():
        q = D.Categorical(logits=m2.q_y(x)[:, None])
        around = m2.q_y((x[:, None] + circle).flatten(0, 1)).view(40, 721, 3)
        kl = D.kl_divergence(q, D.Categorical(logits=around))  # [40, 721]
    log_q = m2.log_q_y(x)
    share = torch.stack([m2.roughness(x, log_q, distance) / kl.amax(1) for _ in range(20)])
    assert share.max() < 1.01 and share.median() > 0.9
    assert (kl.mean(1) / kl.amax(1)).mean() < 0.7
    (unseen,) = torch.autograd.grad(
        m2.roughness(x, log_q, distance).sum(), log_q, allow_unused=True
    )
    assert unseen is None


def test_roughness_in_one_dimension(monkeypatch):
    """There the worst delta is + or - the distance, that towards which the random one points (here
    +), since the KL of a softmax of linear logits grows with |delta|. So value and gradients are
    those of torch.distributions' KL between two known points, the first held constant."""
    torch.manual_seed(0)
    m2, x = M2(1, 3, 1, (8,)), torch.randn(40, 1)
    m2.q_y = torch.nn.Linear(1, 3)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    q, moved = (D.Categorical(logits=m2.q_y(x + delta)) for delta in (0.0, 2.0))
    oracle = D.kl_divergence(D.Categorical(logits=q.logits.detach()), moved)
    assert_equal_with_gradients(m2.roughness(x, m2.log_q_y(x), 2.0), oracle, m2.q_y)


def test_roughness_keeps_the_running_statistics_those_of_x():
    """They are what classifies later, so they may not move, while q(y|x+delta) is computed."""
    m2 = small_m2(batch_norm="all").train()
    x = torch.rand(50, 6)
    log_q = m2.log_q_y(x)
    before = {name: buffer.clone() for name, buffer in m2.named_buffers()}
    m2.roughness(x, log_q, 2.0).sum().backward()
    for name, buffer in m2.named_buffers():
        assert buffer.equal(before[name]), name
    assert any(name.endswith("running_mean") for name in before)


def test_M1M2_bound():
    """Through both layers: -bound against log p(x) integrated over z1 (2-D, one unused) and z2."""
    torch.manual_seed(0)
    m1 = scrambled(M1(6, z_dim=2, hidden=(5,)))
    with torch.no_grad():  # dimension 1 of z1 is unused: q(z1|x) = N(0, 1) there
        m1.q_z[-1].weight[[1, 3]] = 0.0
        m1.q_z[-1].bias[[1, 3]] = 0.0
    m2 = scrambled(M2(1, 3, z_dim=1, hidden=(4,), likelihood="gaussian"), scale=0.5)
    stack = M1M2(m1, m2, torch.tensor([0])).eval()
    x = (torch.rand(1, 6) < 0.5).float()
    with torch.no_grad():
        z, log_dz = grid(301)
        log_p_z1 = torch.stack([torch.logsumexp(quadrature(m2, value[None])[0], 0) for value in z])
        assert torch.logsumexp(log_p_z1 + log_dz, 0).abs() < 0.02  # a density
        a, b = torch.meshgrid(z[:, 0], z[:, 0], indexing="ij")
        both = torch.stack([a.flatten(), b.flatten()], 1)
        log_p = m1.log_density(x.expand(len(both), -1), *m1.decode(both))
        log_p = log_p + log_p_z1.repeat_interleave(301) + D.Normal(0, 1).log_prob(both[:, 1])
        log_p_x = torch.logsumexp(log_p + 2 * log_dz, 0)
        bound = stack.bound(x.expand(DRAWS, -1))
        assert bound.mean() < log_p_x + 5 * bound.std() / DRAWS**0.5
        # exp(bound) is an importance weight less M2's own gap: its mean does not exceed p(x)
        assert bound.exp().mean() < log_p_x.exp() * 1.1
        log_w = stack.log_weight(x.expand(DRAWS, -1))
        assert near((log_w - log_p_x).exp(), 1.0)  # E[w] = p(x)


def small_stack(**kw):
    """An M1 of three dimensions, an M2 of the first and the third of them, and their stack."""
    torch.manual_seed(0)
    m1 = scrambled(M1(6, z_dim=3, hidden=(5,)))
    m2 = scrambled(M2(2, 3, z_dim=1, hidden=(4,), likelihood="gaussian", **kw), scale=0.5)
    return m1, m2, M1M2(m1, m2, torch.tensor([0, 2]))


def test_M1M2_bound_by_hand(fixed_noise):
    """The stack's bound term by term, over all classes in spite of a threshold, with z1 = mu +
    0.3 sigma; what is generated from y and z2; and z2 and x from the means of q and p."""
    m1, m2, stack = small_stack(threshold=0.16)
    x, y = (torch.rand(4, 6) < 0.5).float(), torch.tensor([0, 1, 2, 0])
    mu, logvar = m1.q_z(x).chunk(2, -1)
    q_z1 = D.Normal(mu, (logvar / 2).exp())
    z1 = mu + 0.3 * q_z1.scale
    q = m2.q_y(mu[:, [0, 2]]).softmax(-1)
    L = torch.stack([m2.L(z1[:, [0, 2]], torch.full((4,), k)) for k in range(3)], 1)
    U = (q * L).sum(1) - D.Categorical(probs=q).entropy()
    oracle = D.Bernoulli(logits=m1.p_x(z1)).log_prob(x).sum(1) - U
    oracle = oracle + D.Normal(0, 1).log_prob(z1[:, 1]) - q_z1.log_prob(z1).sum(1)
    torch.testing.assert_close(stack.bound(x), oracle)
    z2, z1 = torch.randn(4, 1), torch.zeros(4, 3)
    z1[:, [0, 2]] = m2.decode(y, z2)[0]
    torch.testing.assert_close(stack.generate(y, z2), m1.p_x(z1).sigmoid())
    z2 = m2.q_z[1:](m2.q_z[0](mu[:, [0, 2]]) + m2.q_z_y(y))[:, :1]
    torch.testing.assert_close(stack.infer(x, y), z2)
    by_z1, by_z2 = stack.reconstruct(x)
    torch.testing.assert_close(by_z1, m1.p_x(mu).sigmoid())
    answer = q.argmax(1)
    torch.testing.assert_close(by_z2, stack.generate(answer, stack.infer(x, answer)))


@pytest.mark.parametrize("sees", ["mean", "draw"])
def test_stack_objective_by_hand(fixed_noise, monkeypatch, sees):
    """Eq. 8 and 9 with z1 = mu + 0.3 sigma for x, U fading in and, in q(y|.), and so in balance and
    roughness, the mean or that draw. The frozen M1 stays in evaluation mode."""
    m1, m2, stack = small_stack()
    assert stack.train().m2.training and not m1.training
    stack.eval()
    x_l, x_u, y = torch.rand(3, 6), torch.rand(4, 6), torch.tensor([0, 1, 2])
    s = {"alpha": 0.7, "balance": 0.5, "smooth": 0.1, "trust": 1, "classifier_sees": sees}
    rough = lambda seen, log_q, distance: distance * (seen.sum(1) + log_q[:, 0])
    monkeypatch.setattr(m2, "roughness", rough)
    monkeypatch.setattr(torch, "rand", lambda size: torch.zeros(size))  # the coin: with weight 2
    encode = lambda x: torch.cat(stack.encode(x), 1)
    found = stack.objective(encode(x_l), y, encode(x_u), 1, 4, 0.3, s)
    means, draws = [], []
    for x in (x_l, x_u):
        mu, logvar = (part[:, [0, 2]] for part in m1.q_z(x).chunk(2, -1))
        means.append(mu)
        draws.append(mu + 0.3 * (logvar / 2).exp())
    seen = means if sees == "mean" else draws
    q_l, q_u = (m2.q_y(z).softmax(-1) for z in seen)
    every = lambda z: torch.stack([m2.L(z, torch.full((len(z),), k)) for k in range(3)], 1)
    U = (q_u * every(draws[1])).sum(1) - D.Categorical(probs=q_u).entropy()
    oracle = 0.2 * every(draws[0])[range(3), y].mean() + 0.8 * 0.3 * U.mean()
    oracle = oracle - 0.7 * q_l[range(3), y].log().mean()
    rough = torch.cat(seen).sum(1) + torch.cat([q_l, q_u])[:, 0].log()
    kl = D.kl_divergence(D.Categorical(torch.ones(3)), D.Categorical(q_u.mean(0)))
    oracle = oracle + 2 * 0.1 * rough.mean() + 0.5 * 4 / (50 * 3) * kl
    assert_equal_with_gradients(found, oracle, m2)


# ---- numbers at the edges ------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [0.0, 1.0])
@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("bf16", [False, True])
def test_losses_and_gradients_stay_finite(fill, size, bf16):
    """All-black and all-white images, tiny minibatches, certain classifiers, both precisions."""
    torch.manual_seed(0)
    x, y = torch.full((size, 20), fill), torch.arange(size) % 2
    s = {"alpha": 1.0, "beta": 1.0, "balance": 1.0, "smooth": 1.0, "trust": 0}
    s["classifier_sees"] = "mean"
    m1, m2 = M1(20, 3, (8,)), M2(20, 2, 3, (8,), threshold=0.01)
    m2.q_y[-1].bias.data = torch.tensor([1e4, -1e4])
    stack = M1M2(M1(20, 3, (8,)), M2(3, 2, 1, (8,), likelihood="gaussian"), torch.arange(3)).train()
    for model in (m1, m2, stack):
        seen = torch.cat(model.encode(x), 1) if model is stack else x
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = sum(model.objective(seen, y, seen, 1, 1, 1.0, s) for _ in range(8))
            found = [*m1.encode(x), *m2.encode(x, y), m2.log_q_y(x)]
            found += [model.bound(x), model.log_weight(x)]  # bfloat16 is for the products alone
            assert all(value.dtype == torch.float32 for value in found)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("seed", range(20))
def test_shapes_and_settings_at_random(seed):
    """Shapes, signs and finite gradients of every model function, for sizes drawn at random."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    x_dim, K, z_dim, B, units = (int(n) for n in rng.integers([1, 2, 1, 2, 1], [30, 12, 9, 9, 20]))
    likelihood = ["bernoulli", "gaussian"][seed % 2]
    hidden = (units,) * int(rng.integers(1, 4))
    threshold = float(rng.choice([0, 0.01, 0.3, 1.0]))
    how = {
        "activation": str(rng.choice(["relu", "softplus"])),
        "batch_norm": str(rng.choice(["all", "none"])),
        "init_std": float(rng.choice([0.0, 0.001])),
    }
    m1 = M1(x_dim, z_dim, hidden, likelihood, **how)
    m2 = M2(x_dim, K, z_dim, hidden, likelihood, threshold=threshold, **how)
    x, y = (torch.rand(B, x_dim) < 0.5).float(), torch.randint(K, (B,))
    assert m1.J(x).shape == m2.L(x, y).shape == m2.bound(x).shape == (B,)
    assert m2.U(x, threshold=m2.threshold).shape == (B,)
    q = m2.classify(x).exp()
    assert q.shape == (B, K)
    torch.testing.assert_close(q.sum(1), torch.ones(B))
    mu, logvar = m1.encode(x)
    assert mu.shape == logvar.shape == (B, z_dim)
    assert (ssvae.kl_gaussian(mu, logvar) > -1e-6).all()
    if likelihood == "bernoulli":  # probabilities: every term of the bound is a cost
        assert (m1.J(x) > 0).all() and (m2.L(x, y) > 0).all()
    s = {"alpha": 1.0, "beta": 1.0, "balance": 1.0, "smooth": 2.0 * (seed % 3), "trust": seed % 2}
    for model in (m1, m2):
        model.objective(x, y, x, 5, 5, float(rng.random()), s).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("recipe", ["fast", "paper"])
@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_no_tensor_is_left_on_the_cpu(recipe, likelihood):
    """A training step and the evaluation of every model on PyTorch's meta device, which computes
    shapes alone but, as a GPU does, refuses the CPU's tensors: a check of the code for GPUs (where
    the threshold is 0) on a machine that has none."""
    torch.manual_seed(0)
    on = {"device": torch.device("meta")}
    images, y = torch.zeros(8, 20, dtype=torch.uint8, **on), torch.zeros(8, dtype=torch.long, **on)
    sets = images, y, images, images, y, images, y
    data = ssvae.Data("", (1, 4, 5), 4, likelihood, None, 0, *sets)
    for name in ssvae.MODELS:
        s = ssvae.settings_of(name, recipe) | {"model": name}
        s |= {"m1_" + key: value for key, value in ssvae.settings_of("m1", recipe).items()}
        s |= {"threshold": 0.0} if "threshold" in s else {}
        model = ssvae.assemble(s, data, active=torch.arange(5, **on) if name == "m1+m2" else None)
        x = ssvae.observe(images, likelihood)
        seen = torch.cat(model.encode(x), 1) if name == "m1+m2" else x
        labelled = seen[:0] if name == "m1" else seen
        model.train()
        for _ in range(8):  # half of them, at random, have a roughness
            loss = model.objective(labelled, y, seen, 1, 9, 0.1, s)
            loss.backward()
        model.eval()
        if name == "m1":
            f = ssvae.tsvm(ssvae.features(model, images), y[:6], 4)
            model.classifier = NearestPoint(ssvae.features(model, images), f)
        else:
            assert model.generate(y, model.infer(x, y)).shape == (8, 20)
        assert model.classify(x).shape == (8, 4)
        assert model.bound(x).shape == model.log_weight(x).shape == (8,)
        assert all(value.is_meta for value in (loss, *model.state_dict().values()))


# ---- classifiers on M1's features ----------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 30, 2003])
def test_knn_against_numpy(n):
    """Neighbours and the nearest one's class against a full sort of all distances."""
    points, y, z = torch.randn(n, 4), torch.randint(3, (n,)), torch.randn(50, 4)
    answers = NearestPoint(points, F.one_hot(y, 3).float())(z).argmax(1)
    for i in range(50):
        nearest = np.argsort(((points - z[i]) ** 2).sum(1).numpy())[:5]
        assert (ssvae.nearest(z, points, 5)[i].numpy() == nearest).all()
        assert answers[i] == y[nearest[0]]


def test_svm_step_is_the_minimum():
    """Against a search over a fine grid of f."""
    f = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    for m in (-2.0, -0.4, 0.3, 1.0, 1.7):
        for t in (-1.0, 1.0):
            for a in (0.1, 3.0):
                cost = (f - m) ** 2 + a * (1 - t * f).clamp_min(0) ** 2
                step = ssvae.svm_step(torch.tensor(m), torch.tensor(t), a)
                assert step.item() == pytest.approx(f[cost.argmin()].item(), abs=2e-4)


def test_tsvm_steps_minimise_each_points_own_terms():
    """Two steps to the mean of the neighbours (by a full sort); two more, in which it is scaled to
    equal shares and then, for every y, the f is found that lowers |f - m|^2 + 0.3 hinge(f, y) most,
    and the best of these y's. Labelled points keep their scores."""
    torch.manual_seed(0)
    z, y = torch.randn(60, 2), torch.arange(12) % 3
    t = 2.0 * torch.eye(3) - 1  # [y, class]
    f = torch.cat([t[y], torch.full((48, 3), -1.0)])
    for step in range(4):
        m = f[torch.cdist(z, z).argsort(1)[:, 1:11]].mean(1)
        if step >= 2:
            m = (m + 1) * 2 / 3 / (m + 1).mean(0) - 1
            each = torch.where(t * m[:, None] < 1, (m[:, None] + 0.3 * t) / 1.3, m[:, None])
            cost = (each - m[:, None]) ** 2 + 0.3 * (1 - t * each).clamp_min(0) ** 2
            best = each[range(60), cost.sum(2).argmin(1)]  # cost: [point, y, class]
            m = torch.where((m == -1).all(1, keepdim=True), -1.0, best)
        f = torch.cat([t[y], m[12:]])
    torch.testing.assert_close(ssvae.tsvm(z, y, 3, steps=4, spread=0.5), f)


def test_tsvm_uses_unlabelled_points():
    """Two long clusters with a gap between, labelled at opposite ends: only the others show it."""
    torch.manual_seed(0)
    n, y = 500, torch.arange(1000) % 2
    z = torch.stack([3 * torch.rand(2 * n) - 1.5, 2.0 * y - 1 + 0.15 * torch.randn(2 * n)], 1)
    ends = torch.where(y == 0, z[:, 0] < -0.5, z[:, 0] > 0.5).nonzero().squeeze(1)[:20]
    order = torch.cat([ends, torch.arange(2 * n)[~torch.isin(torch.arange(2 * n), ends)]])
    z, y = z[order], y[order]
    far = NearestPoint(z[:20] * torch.tensor([1.0, 0.3]), F.one_hot(y[:20], 2).float())
    assert (far(z).argmax(1) != y).float().mean() > 0.15
    answers = ssvae.tsvm(z, y[:20], 2).argmax(1)
    assert (answers != y).float().mean() < 0.02
    assert torch.equal(answers[:20], y[:20])
    assert 0.4 < (answers == 0).float().mean() < 0.6


def test_tsvm_leaves_points_without_a_labelled_neighbour_undecided():
    """A cluster that no label can reach keeps the score of no class."""
    torch.manual_seed(0)
    z = torch.cat([torch.randn(40, 2), 50 + torch.randn(20, 2)])
    f = ssvae.tsvm(z, torch.tensor([0, 1]), 2, k=5)
    assert (f[40:] == -1).all() and (f[:40] > -1).any(1).all()


def test_kernel_machine_has_the_gaussian_kernel_and_minimises_its_aim():
    """The cosines' products against exp(-|u - v|^2 / (2 s^2)), and the aim at W against its
    minimum by lstsq in float64 on the points that a label has reached."""
    torch.manual_seed(0)
    z, f = torch.randn(3000, 3) * torch.tensor([2.0, 1.0, 0.5]), torch.randn(3000, 4)
    f[:500] = -1.0  # reached by no label
    machine = ssvae.kernel_machine(z, f, R=2000)
    phi = torch.cos(z @ machine.omega + machine.phase)[500:].double()
    t = torch.where(f == f.amax(1, keepdim=True), 1.0, -1.0)[500:].double()
    left, right = torch.cat([phi, torch.eye(2000)]), torch.cat([t, torch.zeros(2000, 4)])
    least = torch.linalg.lstsq(left, right).solution
    minimum = (left @ least - right).square().sum()
    aim = (machine(z[500:]).double() - t).square().sum() + machine.W.double().square().sum()
    assert minimum <= aim < 1.0002 * minimum
    u = z[500:] * z[500:].std(0)
    apart = torch.cdist(u, u).double() ** 2
    s2 = apart.mean()  # s^2 is the mean of |u - v|^2
    kernel = torch.exp(-apart / (2 * s2))
    assert (2 / 2000 * phi @ phi.T - kernel).square().mean().sqrt() < 0.03


# ---- data ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small npz of glyphs: 3000 training images, 600 test images."""
    path = tmp_path_factory.mktemp("data") / "small.npz"
    x, y = ssvae.glyphs(3600, seed=1)
    np.savez(path, x_train=x[:3000], y_train=y[:3000], x_test=x[3000:], y_test=y[3000:])
    return path


def run(*args, code=0):
    """ssvae.main in this process."""
    assert ssvae.main([str(a) for a in args]) == code


def test_split_is_balanced_disjoint_and_drawn_by_the_seed():
    y = torch.randint(10, (6000,), generator=torch.Generator().manual_seed(3))
    labelled, unlabelled, valid = ssvae.split(y, 100, seed=5)
    assert torch.bincount(y[labelled]).tolist() == [10] * 10
    assert len(valid) == 1000 and (y[unlabelled].diff() < 0).any()  # not sorted by class
    assert torch.equal(torch.cat([labelled, unlabelled, valid]).sort().values, torch.arange(6000))
    same, other = ssvae.split(y, 100, seed=5), ssvae.split(y, 100, seed=6)
    assert torch.equal(labelled, same[0]) and torch.equal(unlabelled, same[1])
    assert set(labelled.tolist()) != set(other[0].tolist())
    assert set(valid.tolist()) != set(other[2].tolist())
    for seed in range(20):  # of 60, 10 validate, of 18, 3; two at least stay unlabelled
        with pytest.raises(ssvae.BadInput, match="at most 4[2468]"):
            ssvae.split(torch.arange(2).repeat(30), 50, seed)
        with pytest.raises(ssvae.BadInput, match="at most 1[02]"):
            ssvae.split(torch.arange(2).repeat(9), 14, seed)


def test_images_without_a_label_are_for_training_alone(tmp_path):
    """-1 in y_train: among the unlabelled images, all of them; a sixth of the others validates."""
    x, y = np.random.default_rng(0).random((600, 4, 4)), np.arange(600) % 3
    x[::2], y[::2] = 0, -1  # black: to tell them
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=np.arange(600) % 3)
    data = ssvae.load_data(str(tmp_path / "own.npz"), tmp_path, 30, 0, "cpu")
    black = lambda images: int((images == 0).all(1).sum())
    assert [len(a) for a in (data.x_l, data.x_u, data.x_valid)] == [30, 520, 50]
    assert [black(a) for a in (data.x_l, data.x_u, data.x_valid)] == [0, 300, 0]
    assert torch.bincount(data.y_l).tolist() == [10] * 3 and data.y_valid.min() == 0


def test_observe():
    """A pixel of 51 of 255 is on in a fifth of the draws, black never, white always. Gaussian data
    are as stored."""
    grey = torch.tensor([[0, 51, 255]], dtype=torch.uint8).expand(65536, 3)
    x = ssvae.observe(grey, "bernoulli")
    assert set(x.unique().tolist()) == {0, 1} and near(x[:, 1], 0.2)
    assert x[:, [0, 2]].mean(0).tolist() == [0, 1]
    coordinates = torch.randn(5, 3)
    assert torch.equal(ssvae.observe(coordinates, "gaussian"), coordinates)


def test_bounds_are_of_binary_draws_errors_of_grey_images():
    """What a bound, an estimate of log p(x) and a classifier are given."""
    seen = []

    class Recorder:
        bound = log_weight = staticmethod(lambda x: seen.append(x) or x[:, 0])

    grey = torch.full((300, 5), 128, dtype=torch.uint8)
    ssvae.mean_bound(Recorder, grey, "bernoulli")
    ssvae.log_likelihood(Recorder, grey, "bernoulli", 2)
    assert all(set(x.unique().tolist()) == {0, 1} for x in seen)
    seen.clear()
    ssvae.error_rate(lambda x: seen.append(x) or x, grey, torch.zeros(300))
    assert all((x == 128 / 255).all() for x in seen)


def test_active_dimensions():
    """Those whose mean has a deviation of 0.1, or of half the largest if that is less."""
    torch.manual_seed(0)
    m1, x = M1(3, 3, ()), torch.randn(2000, 3)
    for sd in ([1, 0.12, 0.08], [0.01, 0.006, 0.004]):
        m1.q_z[0].weight.data = torch.cat([torch.diag(torch.tensor(sd)), 5 * torch.ones(3, 3)])
        assert ssvae.active_dimensions(ssvae.features(m1, x)).tolist() == [0, 1]


def test_glyphs_are_reproducible_and_not_solved_by_100_labels():
    x, y = (torch.from_numpy(a) for a in ssvae.glyphs(4000))
    assert x.shape == (4000, 28, 28) and x.dtype == torch.uint8
    assert np.array_equal(ssvae.glyphs(4000)[0], x) and sorted(set(y.tolist())) == list(range(10))
    x = x.flatten(1) / 255
    knn = NearestPoint(x[:100], F.one_hot(y[:100], 10).float())
    assert ssvae.error_rate(knn, x[1000:], y[1000:]) > 30


def test_npz_formats(tmp_path, small):
    """uint8 and float, grey and colour, [n,H,W] and [n,H,W,C], any number of classes."""
    rng = np.random.default_rng(0)
    for x, shape, likelihood in (
        (rng.integers(0, 256, (60, 5, 4), dtype=np.uint8), (1, 5, 4), "bernoulli"),
        (rng.random((60, 5, 4, 1)), (1, 5, 4), "bernoulli"),
        (rng.random((60, 5, 4, 3), dtype=np.float32), (3, 5, 4), "gaussian"),
    ):
        y = np.arange(60) % 3
        path = tmp_path / "own.npz"
        np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
        data = ssvae.load_data(str(path), tmp_path, 6, 0, "cpu")
        assert (data.name, data.shape, data.y_dim) == (str(path), shape, 3)
        assert data.likelihood == likelihood
        assert (len(data.x_l), len(data.x_u), len(data.x_valid)) == (6, 44, 10)
        first = np.moveaxis(x.reshape(60, 5, 4, -1)[0], -1, 0).ravel()  # channels first
        if likelihood == "gaussian":
            first = (
                (first - data.pca["mean"].numpy()) @ data.pca["V"].numpy() / data.pca["sd"].numpy()
            )
        assert np.allclose(data.x_test[0].numpy(), first, atol=1e-5)
        run("--dataset", path, "--labels", 6, "--epochs", 1, "--out-dir", tmp_path / likelihood,
            "--overwrite")  # fmt: skip
    as_bytes = (255 * x).round().astype(np.uint8)  # may be mixed
    for mixed in (x, as_bytes), (as_bytes, x):
        np.savez(path, x_train=mixed[0], y_train=y, x_test=mixed[1], y_test=y)
        data = ssvae.load_data(str(path), tmp_path, 6, 0, "cpu")
        found = ssvae.unproject(data.x_test, data.pca).view(60, 3, 5, 4).permute(0, 2, 3, 1)
        assert (found - torch.from_numpy(x)).square().mean() < 0.005


def test_damaged_npz_files_are_not_read_silently(small, tmp_path):
    """Cut at ten random places: refused. With a byte flipped: refused, or read as it was."""
    content, rng, path = small.read_bytes(), np.random.default_rng(0), tmp_path / "bad.npz"
    whole = ssvae.load_npz(small)
    for cut in rng.integers(len(content), size=10):
        path.write_bytes(content[:cut])
        with pytest.raises(ssvae.BadInput):
            ssvae.load_npz(path)
    for place in [*range(0, 200, 5), *rng.integers(len(content), size=10)]:
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        try:
            arrays = ssvae.load_npz(path)
        except ssvae.BadInput:
            continue
        assert all(np.array_equal(a, b) for a, b in zip(arrays, whole, strict=True)), place


def test_principal_components():
    """Against NumPy's SVD; the mean squared error of the way back is the variance dropped."""
    g = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=g) * 0.5 ** torch.arange(12)
    x = (0.5 + 0.05 * torch.randn(400, 12, generator=g) @ mixing.T).clamp(0, 1)
    pca = ssvae.principal_components(x, share=0.95)
    mean = x.numpy().mean(0)
    _, singular, V = np.linalg.svd(x.numpy() - mean, full_matrices=False)
    variance = singular**2 / 400
    d = int(np.searchsorted(variance.cumsum() / variance.sum(), 0.95)) + 1
    assert pca["V"].shape == (12, d) and 1 < d < 12
    overlap = np.abs(V[:d] @ pca["V"].numpy())  # the same directions, up to their sign
    assert np.allclose(overlap, np.eye(d), atol=1e-3)
    z = ssvae.project(x, pca)
    assert torch.allclose(z.T @ z / 400, torch.eye(d), atol=1e-3)
    error = (ssvae.unproject(z, pca) - x).square().sum(1).mean()
    assert np.isclose(error, variance[d:].sum(), rtol=1e-2)
    byte = (255 * x).to(torch.uint8)
    assert torch.allclose(ssvae.project(byte, pca), ssvae.project(byte / 255, pca))
    flat = ssvae.principal_components(torch.full((9, 4), 0.5))  # images that are all alike
    assert ssvae.project(torch.full((9, 4), 0.5), flat).isfinite().all()


def tiny_images(n, size, K, channels=1, seed=0):
    """n images [n, channels, size, size] of K classes, told apart by a bright bar, and labels."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % K
    x = rng.integers(0, 100, (n, channels, size, size))
    for k in range(K):
        width = size // K
        x[y == k, :, :, k * width : (k + 1) * width] += 150
    return x.astype(np.uint8), y


def write_svhn(folder, monkeypatch, n=120):
    """SVHN's two files in their format: X [32, 32, 3, n], y [n, 1] in 1..10, 10 for the digit 0."""
    import hashlib

    from scipy.io import savemat
    from torchvision.datasets import SVHN

    folder.mkdir(exist_ok=True)
    known, written = dict(SVHN.split_list), []
    for seed, part in enumerate(("train", "test")):
        x, y = tiny_images(n, 32, 10, channels=3, seed=seed)
        path = folder / f"{part}_32x32.mat"
        savemat(path, {"X": x.transpose(2, 3, 1, 0), "y": np.where(y == 0, 10, y)[:, None]})
        md5 = hashlib.md5(path.read_bytes()).hexdigest()  # torchvision insists on it
        known[part] = [known[part][0], path.name, md5]
        written += [x, y]
    monkeypatch.setattr(SVHN, "split_list", known)
    return written


def norb_bytes(array, **changes):
    """An array in NORB's format: magic number, number of sizes, three or more sizes, the data."""
    magic = 0x1E3D4C55 if array.dtype == np.uint8 else 0x1E3D4C54
    sizes = list(array.shape) + [1] * (3 - array.ndim)
    header = [changes.get("magic", magic), array.ndim, *changes.get("sizes", sizes)]
    return np.array(header, "<i4").tobytes() + array.tobytes()


def write_norb(folder, n=60, zipped=True):
    """Small NORB's four files of images and labels, gzipped or not. Returns what is in them."""
    import gzip

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for seed, stem in enumerate(("46789x9x18x6x2x96x96-training", "01235x9x18x6x2x96x96-testing")):
        x, y = tiny_images(n, 96, 5, channels=2, seed=seed)
        for kind, array in (("dat", x), ("cat", y.astype("<i4"))):
            content, name = norb_bytes(array), f"smallnorb-5x{stem}-{kind}.mat"
            if zipped:
                content, name = gzip.compress(content, 1), name + ".gz"
            (folder / name).write_bytes(content)
        written += [x, y]
    return written


def test_svhn_is_read_as_written(tmp_path, monkeypatch):
    """x as it was, y 10 read as 0; the 1000 labels of the paper are the default."""
    written = write_svhn(tmp_path, monkeypatch)
    arrays = ssvae.load_known("svhn", tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(arrays, written, strict=True))
    data = ssvae.load_data("svhn", tmp_path, 10, 0, "cpu")
    assert (data.shape, data.y_dim, data.likelihood) == ((3, 32, 32), 10, "gaussian")
    l, u, _ = ssvae.split(torch.from_numpy(written[1]), 10, 0)  # the components see no other image
    mean = written[0][torch.cat([l, u])].reshape(100, -1).mean(0) / 255
    assert np.allclose(data.pca["mean"], mean, atol=1e-5)
    with pytest.raises(ssvae.BadInput, match="--labels 1000"):
        ssvae.load_data("svhn", tmp_path, None, 0, "cpu")


@pytest.mark.parametrize("zipped", [True, False])
def test_norb_is_read_as_written(tmp_path, zipped):
    """The left camera's images, each pixel the mean of 3 x 3, by a loop; labels as they were."""
    x_train, y_train, x_test, y_test = write_norb(tmp_path / "norb", zipped=zipped)
    arrays = ssvae.load_known("norb", tmp_path)
    assert np.array_equal(arrays[1], y_train) and np.array_equal(arrays[3], y_test)
    for array, x in ((arrays[0], x_train), (arrays[2], x_test)):
        assert array.shape == (60, 1, 32, 32)
        for n, i, j in ((0, 0, 0), (59, 31, 31), (7, 3, 20)):
            square = x[n, 0, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            assert np.isclose(array[n, 0, i, j], square.mean() / 255)


def test_interrupted_norb_download_is_started_anew(tmp_path, monkeypatch):
    """What it has written is under no name that is read, and is not taken for whole afterwards."""
    from torchvision.datasets import utils

    written = write_norb(tmp_path / "server")

    def download(url, folder, name):  # as torchvision's: what is there is not fetched again
        file = Path(folder, name)
        if not file.exists():
            content = (tmp_path / "server" / url.rsplit("/", 1)[1]).read_bytes()
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content[:1000] if interrupted else content)
            if interrupted:
                raise KeyboardInterrupt

    monkeypatch.setattr(utils, "download_url", download)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        ssvae.load_known("norb", tmp_path)
    assert not [*(tmp_path / "norb").glob("*.gz"), *(tmp_path / "norb").glob("*.mat")]
    interrupted = False
    assert np.array_equal(ssvae.load_known("norb", tmp_path)[3], written[3])
    assert len(list((tmp_path / "norb").iterdir())) == 4


@pytest.mark.parametrize("dataset", ["svhn", "norb"])
@pytest.mark.parametrize("model", ["m1", "m2", "m1+m2"])
def test_continuous_images_train(tmp_path, monkeypatch, dataset, model):
    """An epoch of each model, its pictures, and the saved model evaluated to the same figures."""
    write_svhn(tmp_path, monkeypatch) if dataset == "svhn" else write_norb(tmp_path / "norb")
    options = ("--model", model, "--dataset", dataset, "--data-dir", tmp_path, "--labels", 20)
    more = ("--m1-epochs", 1) if model == "m1+m2" else ()
    out = tmp_path / "out"
    options += ("--device", "cpu", "--epochs", 1, "--batch-size", 20)
    run(*options, *more, "--out-dir", out)
    results = json.loads((out / "results.json").read_text())
    assert np.isfinite(results["bound"])
    again = ssvae.load_saved(out / "model.pt", "cpu")
    data = ssvae.load_data(dataset, tmp_path, 20, 0, "cpu", again)
    restored = ssvae.rebuild(out / "model.pt", again, data)
    assert ssvae.mean_bound(restored, data.x_test, data.likelihood) == results["bound"]
    assert (out / "samples.png").stat().st_size > 1000


def test_damaged_norb_and_svhn_files_are_named(tmp_path, monkeypatch, capsys):
    """Truncated, wrong magic number, wrong sizes, wrong labels, unreadable: code 2, one line."""
    folder, dat = tmp_path / "norb", "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat"
    x, y, *_ = write_norb(folder, zipped=False)
    cat, good_dat, labels = dat.replace("dat", "cat"), norb_bytes(x), y.astype("<i4")
    bad = [
        (dat, good_dat[:-1]), (dat, good_dat[:3]), (dat, b""), (dat, good_dat + b"x"),
        (dat, norb_bytes(x, magic=7)), (dat, norb_bytes(x, sizes=[60, 2, 96, 95])),
        (dat, norb_bytes(x, sizes=[120, 1, 96, 96])), (dat, norb_bytes(labels)),
        (cat, norb_bytes(labels + 1)), (cat, norb_bytes(labels - 1)), (cat, norb_bytes(labels[1:])),
        (cat, norb_bytes(labels)[:-2]),
    ]  # fmt: skip
    for name, content in bad:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        run("--dataset", "norb", "--data-dir", tmp_path, "--labels", 20, code=2)
        err = capsys.readouterr().err
        named = name in err or err.startswith("ssvae: norb: ")  # by check
        assert err.count("\n") == 1 and named, (name, content[:30], err)
        (folder / name).write_bytes(good)
    zipped = tmp_path / "zipped" / "norb"
    write_norb(zipped)
    (zipped / (dat + ".gz")).write_bytes((zipped / (dat + ".gz")).read_bytes()[:-500])
    run("--dataset", "norb", "--data-dir", zipped.parent, "--labels", 20, code=2)
    assert dat in capsys.readouterr().err

    write_svhn(tmp_path / "svhn", monkeypatch)
    file = tmp_path / "svhn" / "test_32x32.mat"
    file.write_bytes(file.read_bytes()[:-100])  # another md5: torchvision wants to download it
    run("--dataset", "svhn", "--data-dir", tmp_path / "svhn", "--labels", 20, code=2)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "test_32x32.mat" in err[0]


# ---- pictures ------------------------------------------------------------------------------------


def test_mosaic_puts_every_image_in_its_place():
    """Rows and columns of single-coloured images: the pixel in the middle of each tile."""
    images = torch.arange(6.0).view(2, 3, 1).expand(2, 3, 48) / 5
    for shape, breaks in (((1, 8, 6), ()), ((3, 4, 4), (1,))):
        page = np.array(ssvae.mosaic(images, shape, breaks=breaks))
        scale = 60 // max(shape[1:])
        for r in range(2):
            for c in range(3):
                top = 4 + r * (scale * shape[1] + 4)
                left = 4 + c * (scale * shape[2] + 4) + 12 * sum(c >= b for b in breaks)
                tile = page[top : top + scale * shape[1], left : left + scale * shape[2]]
                assert (tile == round(255 * images[r, c, 0].item())).all()
        assert (page[:4] == 255).all() and (page[-4:] == 255).all()


def test_pictures_show_what_they_say(small, tmp_path):
    """styles.png only for two dimensions; analogies: a test image, its z decoded as every digit;
    mistakes are wrong."""
    data = ssvae.load_data(str(small), tmp_path, 10, 0, "cpu")
    torch.manual_seed(0)
    for z_dim in (2, 3):
        m2 = scrambled(M2(784, 10, z_dim, (8,)))
        found = ssvae.pictures(m2, data)
        assert ("styles.png" in found) == (z_dim == 2)
        analogies = np.array(found["analogies.png"].convert("RGB"))
        for k in range(10):
            image = data.x_test[data.y_test == k][0].view(28, 28)
            tile = analogies[4 + 60 * k : 60 + 60 * k : 2, 4:60:2, 0]
            assert np.array_equal(tile, image.numpy())
            with torch.no_grad():
                z = m2.encode(image.view(1, -1) / 255, torch.tensor([k]))[0]
                images = m2.decode(torch.arange(10), z.expand(10, -1))[0].sigmoid()
            for c, image in enumerate((255 * images.view(10, 28, 28)).round().int()):
                tile = analogies[4 + 60 * k : 60 + 60 * k : 2, 76 + 60 * c : 132 + 60 * c : 2, 0]
                assert np.abs(tile - image.numpy()).max() <= 1

    answers = F.one_hot(data.y_test, 10).float()  # perfect but for one image, a 3 called 7
    first = int((data.y_test == 3).nonzero()[0, 0])
    answers[first] = F.one_hot(torch.tensor(7), 10).float()
    left = list(answers.split(1))
    m2.classify = lambda x: torch.cat([left.pop(0) for _ in x])
    mistakes = ssvae.pictures(m2, data)["mistakes.png"]
    wrong = data.x_test[first].view(28, 28)
    assert mistakes.width == 64 and np.array_equal(np.array(mistakes)[4:60:2, 4:60:2], wrong)
    left = list(F.one_hot(data.y_test, 10).split(1))
    assert "mistakes.png" not in ssvae.pictures(m2, data)


def test_curves_rise_where_the_values_do():
    """The line's height follows the values: top and bottom of the panels, one row and many. What
    the first tenth of a stage's epochs had does not matter."""
    epochs = [("m1", epoch + 1) for epoch in range(10)]
    epochs += [("m1+m2", epoch + 1) for epoch in range(20)]
    rows = [
        {"stage": stage, "epoch": epoch, "bound": -100.0 + i, "valid_error": 50.0 - i}
        for i, (stage, epoch) in enumerate(epochs)
    ]
    page = np.array(ssvae.curves(rows)).astype(int)
    navy = (page[..., 2] > page[..., 0] + 60) & (page[..., 0] < 60)
    for left, sign in ((80, -1), (570, 1)):
        panel = navy[46:305, left + 1 : left + 360]
        heights = [np.nonzero(column)[0].mean() for column in panel.T if column.any()]
        assert sign * (heights[-1] - heights[0]) > 200
    for i in (0, 10, 11):
        rows[i] |= {"bound": -1e4, "valid_error": 95.0}
    assert np.array_equal(page, np.array(ssvae.curves(rows)))
    ssvae.curves(rows[:1])


def test_load_evaluates_and_redraws(small, narrow, tmp_path, capsys, monkeypatch):
    """--load gives the run's own figures, restores a deleted picture, and contradicts nothing."""
    for model in MODELS:
        out = tmp_path / model
        run(*quick(model), "--dataset", small, "--out-dir", out)
        results = json.loads((out / "results.json").read_text())
        before = (out / "mistakes.png").read_bytes()
        (out / "mistakes.png").unlink()
        capsys.readouterr()
        run("--load", out / "model.pt", "--device", "cpu")  # as in quick: others draw other noise
        assert (out / "mistakes.png").read_bytes() == before
        line = capsys.readouterr().out
        assert f"test error {results['test_error']:.2f} %" in line
        assert f"bound {results['bound']:.2f} nats" in line
    run("--load", out / "model.pt", "--no-images", "--dataset", small)
    run("--load", out / "model.pt", "--out-dir", tmp_path / "m2", code=2)  # m2's pictures are there
    run("--load", out / "model.pt", "--out-dir", tmp_path / "new")
    assert (tmp_path / "new" / "samples.png").exists()
    capsys.readouterr()
    run("--load", out / "model.pt", "--no-images", "--nll", 3)
    assert "log p(x)" in capsys.readouterr().out
    other = tmp_path / "other.npz"
    np.savez(other, **{**np.load(small), "y_test": np.zeros(600, dtype=int)})
    monkeypatch.setattr(ssvae, "glyphs", lambda make=ssvae.glyphs: make(1400))  # 70,000 take long
    for wrong in (
        ("--model", "m2"), ("--labels", 5), ("--seed", 3), ("--epochs", 3), ("--dataset", "glyphs"),
        ("--dataset", other), ("--resume",), ("--m1", out / "model.pt"), ("--overwrite",),
        ("--classifier", "knn"), ("--seeds", 2), ("--labels", 100, 200), ("--alpha", 0),
    ):  # fmt: skip
        run("--load", out / "model.pt", *wrong, code=2)
        assert capsys.readouterr().err.count("\n") == 1


def test_log_likelihood_is_between_the_bound_and_the_truth():
    """More draws, a higher estimate: from the bound at one draw to log p(x), by quadrature."""
    m1 = scrambled(M1(6, z_dim=1, hidden=(5,)), scale=0.5)
    x = (torch.rand(300, 6, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    with torch.no_grad():
        z, log_dz = grid()
        log_p_z = D.Normal(0, 1).log_prob(z[:, 0])
        log_p_xz = [m1.log_density(one.expand(len(z), -1), *m1.decode(z)) + log_p_z for one in x]
        truth = torch.stack([torch.logsumexp(row + log_dz, 0) for row in log_p_xz]).mean()
    one, ten, many = (ssvae.log_likelihood(m1, x, "bernoulli", S) for S in (1, 10, 2000))
    assert one < ten - 0.01 < many - 0.01
    assert many == pytest.approx(truth.item(), abs=0.02)
    assert ssvae.mean_bound(m1, x, "bernoulli") == pytest.approx(one, abs=0.1)


def test_a_terminal_shows_steps_which_the_line_of_the_epoch_replaces(small, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        isatty = lambda self: True

    monkeypatch.setattr(sys, "stdout", Terminal())
    run(*quick("m2"), "--dataset", small, "--out-dir", tmp_path / "run")
    lines = sys.stdout.getvalue().splitlines()  # split at "\r", too
    steps = [line for line in lines if line.startswith("epoch 1, step")]
    (epoch,) = (line for line in lines if line.startswith("m2 epoch 1/"))
    assert len(steps) > 1
    assert max(map(len, steps)) < len(epoch)


# ---- training ------------------------------------------------------------------------------------

MODELS = ["m1", "m2", "m1+m2"]
# On a CPU, where runs are compared to the last digit: on a GPU some sums are not repeatable.
QUICK = ("--epochs", 2, "--batch-size", 200, "--hidden", 64, "--device", "cpu")


@pytest.fixture
def narrow(monkeypatch):
    """Networks with a layer of 64, the stack's M1 too, which --hidden does not reach."""
    monkeypatch.setitem(ssvae.SETTINGS, "hidden", (((64,),) * 3, *ssvae.SETTINGS["hidden"][1:]))
    monkeypatch.setitem(ssvae.STACKED_M1, "hidden", (64,))


def quick(model):
    more = {"m1": ["--classifier", "knn"], "m2": [], "m1+m2": ["--m1-epochs", 2]}
    return ("--model", model, *QUICK, *more[model])


def outcome(folder):
    """What a run came to, times aside: weights, results and log."""
    results = json.loads((folder / "results.json").read_text())
    for name in ("seconds", "images_per_second"):
        del results[name]
    log = list(csv.DictReader((folder / "log.csv").open()))
    for row in log:
        del row["seconds"], row["images_per_second"]
    return torch.load(folder / "model.pt", weights_only=True), results, log


def assert_same(one, other):
    (weights, *rest), (other_weights, *other_rest) = one, other
    assert rest == other_rest
    for part in ("model", "classifier"):
        assert (weights[part] is None) == (other_weights[part] is None)
        for key, value in (weights[part] or {}).items():
            other_value = other_weights[part][key]
            assert torch.equal(value, other_value)


@pytest.mark.parametrize("model", MODELS)
def test_training_raises_the_bound_and_lowers_the_error(small, tmp_path, model):
    """The bound by 5 nats from the first epoch to the last; the error well under chance, 90 %."""
    run("--model", model, "--dataset", small, "--epochs", 8, "--batch-size", 100,
        "--hidden", 200, 200, "--out-dir", tmp_path,
        *(["--m1-epochs", 8] if model == "m1+m2" else []))  # fmt: skip
    _, results, log = outcome(tmp_path)
    assert len(log) == (16 if model == "m1+m2" else 8)
    assert float(log[-1]["bound"]) > float(log[0]["bound"]) + 5
    assert results["bound"] > float(log[0]["bound"]) + 5
    assert results["test_error"] < 65
    if model != "m1":  # the validation images were seen in evaluation mode, and left no trace
        assert float(log[-1]["valid_error"]) == results["valid_error"]
    assert results.keys() >= {
        *("model", "dataset", "labels", "seed", "epochs", "alpha", "lr", "batch_size"),
        *("device", "torch", "parameters", "valid_error", "test_error", "bound"),
    }


def numbered_images(path):
    """Writes 120 images of two classes. The first eight pixels are the image's number, in binary;
    the others are grey. Returns the function from images to their numbers."""
    number = np.arange(120)[:, None] >> np.arange(8) & 1
    x, y = np.full((120, 4, 4), 128, np.uint8), np.arange(120) % 2
    x[:, :2] = 255 * number.reshape(120, 2, 4)
    np.savez(path, x_train=x, y_train=y, x_test=x[:9], y_test=y[:9])
    return lambda x: (x[:, :8] @ 2.0 ** torch.arange(8)).long()


def test_the_loop_hands_the_right_things_to_the_objective(tmp_path, monkeypatch):
    """Every unlabelled image once per epoch, in a new order and with new draws; labelled ones with
    their labels; and N, M, how far U is faded in, the step size and the precision of each
    step."""
    index = numbered_images(tmp_path / "own.npz")
    optimizers, steps = [], []

    class Adam(torch.optim.Adam):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            optimizers.append(self)

    def recorded(self, *args):
        assert self.training and torch.is_autocast_enabled("cpu")
        steps.append((*args, optimizers[0].param_groups[0]["lr"]))
        return objective(self, *args)

    objective = M2.objective
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    monkeypatch.setattr(M2, "objective", recorded)
    run("--dataset", tmp_path / "own.npz", "--labels", 40, "--batch-labelled", 8, "--epochs", 2,
        "--batch-size", 10, "--lr", 0.01, "--lr-decay", 0.5, "--ramp", 0.75,
        "--precision", "bfloat16", "--device", "cpu", "--out-dir", tmp_path / "run")  # fmt: skip
    assert len(steps) == 12  # 60 unlabelled images, 10 at a time, twice
    labelled = set()
    for k, (x_l, y_l, x_u, N, M, fade, _, lr) in enumerate(steps):
        assert (len(x_l), len(x_u), N, M) == (8, 10, 40, 60)
        assert fade == pytest.approx(min(1, k / 9))
        assert lr == pytest.approx(0.01 * (1 - 0.5 * k / 12))
        assert torch.equal(y_l, index(x_l) % 2)
        labelled |= set(index(x_l).tolist())
    assert 20 < len(labelled) <= 40  # drawn afresh at every step
    first, second = (torch.cat([step[2] for step in part]) for part in (steps[:6], steps[6:]))
    order, other = index(first), index(second)
    assert torch.equal(order.sort().values, other.sort().values) and len(order.unique()) == 60
    assert not torch.equal(order, other) and not torch.equal(order, order.sort().values)
    assert labelled.isdisjoint(order.tolist())
    grey, again = first[order.argsort(), 8:], second[other.argsort(), 8:]
    assert set(grey.unique().tolist()) == {0, 1} and not torch.equal(grey, again)


@pytest.mark.parametrize("model", MODELS)
def test_what_each_model_trains_on(tmp_path, monkeypatch, model):
    """Binary draws of all images (M1) or of the unlabelled ones, each image once per epoch; or, in
    the stack, what the frozen M1 makes of these images in grey. And the fade, in float32."""
    index, steps = numbered_images(tmp_path / "own.npz"), []
    kind, more = {"m1": (M1, ["--classifier", "knn"]), "m2": (M2, []),
                  "m1+m2": (M1M2, ["--m1-epochs", 1])}[model]  # fmt: skip
    objective = kind.objective

    def recorded(self, *args):
        assert self.training and not torch.is_autocast_enabled("cpu")
        steps.append(args)
        return objective(self, *args)

    monkeypatch.setattr(kind, "objective", recorded)
    path = tmp_path / "run" / "model.pt"
    run("--model", model, "--dataset", tmp_path / "own.npz", "--labels", 40, "--epochs", 2,
        "--batch-size", 10, "--ramp", 0.75, "--device", "cpu", "--precision", "float32",
        "--out-dir", path.parent, *more)  # fmt: skip
    n = len(steps) // 2
    fades = [min(1, k / (0.75 * 2 * n)) for k in range(2 * n)]
    assert [step[5] for step in steps] == pytest.approx(fades)
    seen = torch.cat([step[2] for step in steps[:n]])
    if model == "m1+m2":
        net, data, _ = ssvae.load_model(path, tmp_path, "cpu")
        encoded = torch.cat(net.encode(ssvae.pixels(data.x_u)), 1)
        apart = (seen[:, None] - encoded).abs().amax(2)  # [seen, image]
        assert apart.amin(1).max() < 1e-4 and len(apart.argmin(1).unique()) == 60
    else:
        assert set(seen.unique().tolist()) == {0, 1}
        assert len(index(seen).unique()) == len(seen) == (100 if model == "m1" else 60)


@pytest.mark.parametrize(
    ("labels", "n_l", "sizes", "steps", "visits"),
    # 0: in proportion, 10 * 36 / 64, rounded; 7: 60 labelled images need 9 steps, 90 unlabelled
    [(36, 0, (6, 10), 6, {1}), (60, 7, (7, 10), 9, {2, 3})],
)
def test_sizes_and_number_of_minibatches(tmp_path, monkeypatch, labels, n_l, sizes, steps, visits):
    """As many labelled images as asked or in proportion; steps enough for the labelled images, too,
    for which the unlabelled ones are gone through again, each about as often."""
    index, batches, objective = numbered_images(tmp_path / "own.npz"), [], M2.objective

    def recorded(self, x_l, y_l, x_u, *rest):
        batches.append((x_l, x_u))
        return objective(self, x_l, y_l, x_u, *rest)

    monkeypatch.setattr(M2, "objective", recorded)
    run("--dataset", tmp_path / "own.npz", "--labels", labels, "--batch-labelled", n_l,
        "--batch-size", 10, "--epochs", 1, "--device", "cpu",
        "--out-dir", tmp_path / "run")  # fmt: skip
    assert [tuple(map(len, batch)) for batch in batches] == [sizes] * steps
    seen = index(torch.cat([x_u for _, x_u in batches])).bincount(minlength=120)
    assert set(seen[seen > 0].tolist()) == visits


def test_batch_normalisation_is_not_given_one_image(small, tmp_path):
    """Of one it would have no variance; so a minibatch has two labelled ones where one is asked."""
    how = ("--dataset", small, "--labels", 50, "--batch-labelled", 1, "--no-images")
    run(*quick("m1+m2"), *how, "--out-dir", tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_same_seed_same_result_and_resume_changes_nothing(
    small, narrow, tmp_path, model, monkeypatch
):
    """Run whole, run again, and run with an interruption after each epoch's checkpoint."""
    args = (*quick(model), "--dataset", small, "--labels", 50, "--seed", 3, "--out-dir")
    run(*args, tmp_path / "a")
    run(*args, tmp_path / "b")
    assert_same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))

    save = ssvae.Run.save

    def interrupted(*args, **how):
        save(*args, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(ssvae.Run, "save", interrupted)
    run(*args, tmp_path / "c", code=130)
    run(*args, tmp_path / "c", code=2)  # neither --resume nor --overwrite
    for _ in range(4 if model == "m1+m2" else 2):  # the last time, all is done but results.json
        run(*args, tmp_path / "c", "--resume", code=130)
    monkeypatch.setattr(ssvae.Run, "save", save)
    run(*args, tmp_path / "c", "--resume", "--lr", 0.1, code=2)  # contradicts the first call
    run(*args, tmp_path / "c", "--resume")
    assert_same(outcome(tmp_path / "a"), outcome(tmp_path / "c"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("model", MODELS)
def test_a_recorded_step_does_what_the_step_does(small, tmp_path, monkeypatch, model):
    """The first epoch by a CUDA graph and without one: the same random numbers, so the same losses,
    but for the order of sums on a GPU."""
    losses = []
    for recorded in (ssvae.record, lambda f, *inputs: f):
        monkeypatch.setattr(ssvae, "record", recorded)
        run("--model", model, "--dataset", small, "--epochs", 1, "--overwrite",
            "--out-dir", tmp_path, "--no-images", "--precision", "float32",
            *(["--m1-epochs", 1] if model == "m1+m2" else []))  # fmt: skip
        rows = csv.DictReader((tmp_path / "log.csv").open())
        losses.append([float(row["loss"]) for row in rows])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
def test_a_recording_keeps_the_tensors_it_reads():
    """Others must not take their place in memory when nothing else refers to them."""
    plus_one = lambda x: lambda: x + 1
    replay = ssvae.record(plus_one(torch.ones(1000, device="cuda")))
    others = [torch.zeros(1000, device="cuda") for _ in range(100)]
    assert (replay() == 2).all() and not any(other.any() for other in others)


def test_paper_recipe_is_the_published_one(small, tmp_path):
    """The published settings as the run itself records them; what its networks are; and it runs."""
    published = {
        "m1": {"hidden": [600, 600], "lr": 3e-4, "z_dim": 50, "activation": "softplus"},
        "m2": {"hidden": [500], "alpha": 0.1, "weight_prior": 1.0, "init_std": 0.001},
        "m1+m2": {"hidden": [500], "m1_hidden": [600, 600], "alpha": 0.1, "weight_prior": 1.0,
                  "classifier_sees": "draw", "m1_lr": 3e-4, "m1_epochs": 1, "z_dim": 50},
    }  # fmt: skip
    for model in MODELS:
        line = ["--model", model, "--recipe", "paper", "--dataset", small, "--epochs", 1]
        line += ["--m1-epochs", 1] if model == "m1+m2" else []
        run(*line, "--out-dir", tmp_path / model, "--no-images")
        results = json.loads((tmp_path / model / "results.json").read_text())
        also = {"batch_norm": "none", "lr_decay": 0, "ramp": 0, "recipe": "paper"}
        assert results.items() >= (published[model] | also).items()
        assert ssvae.settings_of(model, "paper")["epochs"] == 3000
    m2 = ssvae.build(M2, ssvae.settings_of("m2", "paper"), 784, 10, likelihood="bernoulli")
    kinds = {type(module) for module in m2.modules()} - {M2, torch.nn.Sequential}
    assert kinds == {torch.nn.Linear, torch.nn.Embedding, torch.nn.Softplus}
    assert [p.shape[0] for p in m2.q_y.parameters()] == [500, 500, 10, 10]


def test_small_recipe_is_fast_with_smaller_networks(small, tmp_path, monkeypatch):
    """A run by it records fast's settings but for what SMALL says, in a folder of its own; its
    networks have fewer weights; a data set's own settings apply too, and the command line wins."""
    monkeypatch.chdir(tmp_path)
    results = {}
    for recipe in ("fast", "small"):
        line = ["--model", "m1+m2", "--recipe", recipe, "--dataset", small, "--epochs", 1]
        run(*line, "--m1-epochs", 1, "--no-images")
        name = f"m1+m2-{small.name}-100-0" + "-small" * (recipe == "small")
        results[recipe] = json.loads((tmp_path / "runs" / name / "results.json").read_text())
    fast, tiny = results["fast"], results["small"]
    differ = {key for key in ssvae.SETTINGS if fast.get(key) != tiny.get(key)}
    assert differ == {"hidden", "threshold"} and tiny["epochs"] == 1
    assert tiny["hidden"] == [200, 200] and tiny["m1_hidden"] == [500, 500]
    assert tiny["parameters"] < fast["parameters"] / 2
    own = dict(ssvae.STACKED_M1, epochs=1, hidden=list(ssvae.STACKED_M1["hidden"]))
    assert fast.items() >= {"m1_" + key: value for key, value in own.items()}.items()
    assert tiny["m1_ramp"] == fast["m1_ramp"] > ssvae.settings_of("m1")["ramp"]
    for model in MODELS:
        fast, tiny = ssvae.settings_of(model), ssvae.settings_of(model, "small")
        assert tiny == fast | ssvae.SMALL[model] and tiny["epochs"] < fast["epochs"]
    assert ssvae.settings_of("m1", "small", "fashion")["beta"] == 0.3


def test_networks_are_as_the_settings_say():
    """Weights drawn with that standard deviation and biases 0; batch normalisation in all networks
    or none; the decoders' layers in the encoders' order reversed."""
    torch.manual_seed(0)
    m2 = M2(200, 10, 50, (500, 300), batch_norm="none", init_std=0.01, activation="softplus")
    for layer in m2.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Embedding):
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)
            assert getattr(layer, "bias", None) is None or not layer.bias.any()
    for batch_norm, expected in (("none", []), ("all", ["q_y", "q_z", "p_x"])):
        m2 = M2(20, 10, 5, (8,), batch_norm=batch_norm)
        found = {n[:3] for n, m in m2.named_modules() if isinstance(m, torch.nn.BatchNorm1d)}
        assert found == set(expected)
    for p_x in (M1(20, 3, (9, 8)).p_x, M2(20, 10, 3, (9, 8)).p_x):
        linear = [layer for layer in p_x if isinstance(layer, torch.nn.Linear)]
        assert [layer.out_features for layer in linear] == [8, 9, 20]


def test_weight_prior_is_minus_log_of_a_standard_normal(small, tmp_path, monkeypatch):
    """An epoch with weight_prior 1 against one with -log N(w; 0, I) / (N + M) added to the loss."""
    args = ("--dataset", small, "--labels", 50, "--epochs", 1, "--precision", "float32")
    args += ("--hidden", 64, "--device", "cpu")  # where nothing is recorded
    run(*args, "--weight-prior", 1, "--out-dir", tmp_path / "a", "--no-images")
    run(*args, "--out-dir", tmp_path / "none", "--no-images")
    plain = M2.objective

    def with_prior(self, *rest):
        prior = D.Normal(0, 1)
        log_p = sum(prior.log_prob(p).sum() for p in self.parameters())
        return plain(self, *rest) - log_p / 2500  # of the 3000 images, 500 are for validation

    monkeypatch.setattr(M2, "objective", with_prior)
    run(*args, "--out-dir", tmp_path / "b", "--no-images")
    a, b, none = (outcome(tmp_path / name)[0]["model"] for name in ("a", "b", "none"))
    key = "p_x.2.weight"
    torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)
    assert (a[key] - none[key]).abs().max() > 20 * (a[key] - b[key]).abs().max()


def test_other_seeds_draw_other_labels(small, tmp_path):
    one, other = (ssvae.load_data(str(small), tmp_path, 50, seed, "cpu") for seed in (0, 1))
    assert not torch.equal(one.x_l, other.x_l) and torch.equal(one.x_test, other.x_test)


@pytest.mark.parametrize("model", MODELS)
def test_hidden_labels_and_the_test_set_do_not_influence_training(
    small, narrow, tmp_path, model, monkeypatch
):
    """Corrupt every label but those of labelled and validation images, and the whole test set."""
    arrays = dict(np.load(small))
    labelled, unlabelled, valid = ssvae.split(torch.from_numpy(arrays["y_train"]), 50, 0)
    monkeypatch.setattr(ssvae, "split", lambda *_: (labelled, unlabelled, valid))
    rng = np.random.default_rng(0)
    arrays["y_train"][unlabelled] = rng.integers(0, 10, len(unlabelled))
    arrays["x_test"] = rng.integers(0, 256, arrays["x_test"].shape, dtype=np.uint8)
    arrays["y_test"] = rng.integers(0, 10, 600)
    corrupt = tmp_path / small.name
    np.savez(corrupt, **arrays)
    args = (*quick(model), "--labels", 50, "--dataset")
    run(*args, small, "--out-dir", tmp_path / "a")
    run(*args, corrupt, "--out-dir", tmp_path / "b")
    (one, results, log), (other, other_results, other_log) = map(
        outcome, (tmp_path / "a", tmp_path / "b")
    )
    assert results["test_error"] != other_results["test_error"]
    for name in ("test_error", "bound", "dataset", "checksum"):
        del results[name], other_results[name]
    assert_same((one, results, log), (other, other_results, other_log))


def test_stack_on_a_trained_m1_and_knn(small, tmp_path):
    """--m1 FILE gives the stack that very M1, and M1's other classifier runs on it."""
    run(*quick("m1"), "--dataset", small, "--out-dir", tmp_path / "m1")
    args = ("--m1", tmp_path / "m1" / "model.pt", "--dataset", small, "--device", "cpu")
    run("--model", "m1+m2", *QUICK, *args, "--out-dir", tmp_path / "stack")
    run("--model", "m1", "--classifier", "knn", *args, "--out-dir", tmp_path / "knn")
    paths = [tmp_path / name / "model.pt" for name in ("m1", "stack", "knn")]
    saved = [torch.load(path, weights_only=True) for path in paths]
    m1, stack, knn = (s["model"] for s in saved)
    for key in m1:
        assert torch.equal(m1[key], stack["m1." + key]) and torch.equal(m1[key], knn[key])
    points = saved[2]["classifier"]["points"]  # the file holds them alone, not all features
    assert points.untyped_storage().nbytes() == 4 * points.numel()
    _, results, log = outcome(tmp_path / "m1")  # from the features of all images; of the labelled
    assert results["valid_error"] == float(log[-1]["valid_error"])


@pytest.mark.parametrize("model", MODELS)
def test_the_smallest_minibatches(small, tmp_path, model):
    """Of two unlabelled images; 60 training images, one label a class."""
    path, x, y = tmp_path / "tiny.npz", np.load(small)["x_train"], np.arange(60) % 2
    np.savez(path, x_train=x[:60], y_train=y, x_test=x[60:120], y_test=y)
    args = (*quick(model), "--epochs", 1, "--labels", 2, "--batch-size", 2)
    run(*args, "--dataset", path, "--out-dir", tmp_path / "run")
    assert np.isfinite(outcome(tmp_path / "run")[1]["bound"])


def test_a_loss_that_is_not_a_number_stops_the_run(small, tmp_path, capsys, monkeypatch):
    """In the epoch where it happens; the checkpoint of the last good epoch is kept."""
    args = ("--dataset", small, "--hidden", 64, "--out-dir")
    run(*args, tmp_path / "a", "--epochs", 3, "--lr", 1e16, code=1)
    assert "epoch 1;" in capsys.readouterr().err
    assert not (tmp_path / "a" / "results.json").exists()

    good, calls = M2.objective, []

    def objective(self, *args):
        calls.append(1)
        return good(self, *args) * (float("nan") if len(calls) == 15 else 1.0)

    monkeypatch.setattr(M2, "objective", objective)
    steps = ("--epochs", 3, "--batch-size", 200, "--device", "cpu")  # where nothing is recorded
    run(*args, tmp_path / "b", *steps, code=1)
    assert "epoch 2;" in capsys.readouterr().err and 15 <= len(calls) < 30
    assert torch.load(tmp_path / "b" / "model.pt", weights_only=True)["rows"][-1]["epoch"] == 1
    monkeypatch.setattr(ssvae, "mean_bound", lambda *_: float("nan"))  # by the last update
    run(*args, tmp_path / "c", "--epochs", 1, code=1)
    assert not list((tmp_path / "c").iterdir())


# ---- the command line ----------------------------------------------------------------------------


def test_a_finished_run_is_not_lost(small, tmp_path, capsys):
    """The same command reports it, another one is refused, --overwrite trains afresh."""
    args = ("--dataset", small, *QUICK, "--out-dir", tmp_path)
    run(*args)
    before = outcome(tmp_path)
    written = (tmp_path / "results.json").stat().st_mtime_ns
    run(*args)
    assert "--overwrite" in capsys.readouterr().out
    run(*args, "--alpha", 3, code=2)
    assert (tmp_path / "results.json").stat().st_mtime_ns == written
    (tmp_path / "model.pt").unlink()  # to save space: the results remain
    run(*args)
    assert (tmp_path / "results.json").stat().st_mtime_ns == written
    figures = ("test_error", "bound", "seconds")
    settings = {key: value for key, value in before[1].items() if key not in figures}
    for damaged in (5, settings):
        (tmp_path / "results.json").write_text(json.dumps(damaged))
        run(*args, code=2)
    run(*args, "--overwrite")
    assert_same(before, outcome(tmp_path))


def bad_files(folder, small):
    """Files that are not what they should be, by name."""
    arrays = dict(np.load(small))

    def npz(name, **changes):
        np.savez(folder / name, **{**arrays, **changes})

    content = small.read_bytes()
    (folder / "short.npz").write_bytes(content[: len(content) // 2])
    (folder / "empty.npz").write_bytes(b"")
    npz("object.npz", y_train=np.array([{}] * 3000, dtype=object))
    npz("shape.npz", x_train=arrays["x_train"][:, 0])
    npz("first.npz", **{name: arrays[name][:, None] for name in ("x_train", "x_test")})
    npz("mask.npz", x_train=arrays["x_train"] // 128)
    npz("range.npz", x_train=arrays["x_train"].astype(float))
    npz("nan.npz", x_test=np.full((600, 28, 28), np.nan))
    npz("type.npz", x_train=arrays["x_train"].astype(int))
    npz("length.npz", y_train=arrays["y_train"][1:])
    npz("negative.npz", y_train=arrays["y_train"] - 2)
    npz("gap.npz", y_train=np.where(arrays["y_train"] == 3, 4, arrays["y_train"]))
    npz("newclass.npz", y_test=arrays["y_test"] + 5)
    np.savez(folder / "missing.npz", x_train=arrays["x_train"])
    (folder / "file").write_text("")
    (folder / "loop.npz").symlink_to(folder / "loop.npz")

    class Malicious:
        def __reduce__(self):
            return os.mkdir, (str(folder / "was run"),)

    (folder / "malicious.pt").write_bytes(pickle.dumps(Malicious()))
    torch.save(Malicious(), folder / "malicious2.pt")
    (folder / "text.pt").write_text("hello")
    torch.save({"weights": 1}, folder / "foreign.pt")


BAD = """
    --model m3 | --model | --nonsense | surplus | --dataset cifar | --dataset= | --dataset no.npz
    --labels 0 | --labels -10 | --labels ten | --labels 1.5 | --labels nan | --labels 1e3
    --labels 9 | --labels 101 | --labels 5000 | --labels 99999999999999999999 | --labels=
    --epochs 0 | --epochs -1 | --epochs x | --epochs 1.5 | --epochs inf | --epochs= | --epochs HUGE
    --batch-size 0 | --batch-size 1 | --batch-size -5 | --batch-size a | --batch-size=
    --lr 0 | --lr -1 | --lr nan | --lr inf | --lr x | --lr=
    --alpha -1 | --alpha nan | --alpha inf | --alpha x | --model m1 --alpha 1
    --seed -1 | --seed x | --seed 0.5 | --seed 4294967296 | --seed=
    --device nonsense | --device cuda:99 | --device meta | --device=
    --m1-epochs 5 | --model m1+m2 --m1-epochs 0 | --model m1 --m1-epochs 3
    --m1 no.pt | --model m1+m2 --m1 no.pt | --model m1+m2 --m1 text.pt | --model m1 --m1 foreign.pt
    --model m1+m2 --m1 malicious.pt | --model m1 --m1 malicious2.pt | --model m1+m2 --m1 .
    --model m1+m2 --m1 text.pt --m1-epochs 2 | --model m1 --m1 text.pt --epochs 2
    --classifier knn | --model m1 --classifier tree | --model m1+m2 --classifier tsvm
    --resume --overwrite | --out-dir file | --out-dir file/below | --out-dir /proc/none
    --dataset mnist --data-dir file | --dataset mnist --data-dir /proc/none | --dataset short.npz
    --dataset empty.npz | --dataset object.npz | --dataset shape.npz | --dataset range.npz
    --dataset nan.npz | --dataset type.npz | --dataset length.npz | --dataset negative.npz
    --labels 10 20 | --seeds 2 | --reproduce --seed 1 | --reproduce --labels 0 | --nll 5
    --reproduce --seeds 0 | --load no.pt --nll 0 | --reproduce --labels 20 7 | --reproduce --resume
    --reproduce --alpha 2 | --reproduce --load no.pt
    --hidden 0 | --hidden | --smooth x | --ramp 2 | --threshold -1 | --lr-decay 2 | --init-std -1
    --activation tanh | --batch-norm some | --classifier-sees x | --classifier-sees mean
    --hidden 999999999999 | --reproduce --model m2 --m1-epochs 5 | --load no.pt --precision bfloat16
    --reproduce --model m1 --m1-epochs 5 | --model m1 --m1 no.pt --recipe paper
    --reproduce --model m1+m2 --beta 0.5 | --beta 1 | --model m1 --smooth 1 | --recipe slow
    --recipe= | --weight-prior -1 | --balance x
    --load no.pt --recipe paper | --batch-labelled -1 | --reproduce --balance 1 | --reproduce --m1 x
    --load no.pt | --load text.pt | --load foreign.pt | --load malicious.pt | --load . | --load=
    --precision half | --precision= | --z-dim 0 | --z-dim x | --dataset svhn --data-dir /proc/none
    --dataset norb --data-dir file | --dataset norb --data-dir nowhere | --dataset svhn --data-dir x
    --dataset first.npz | --dataset mask.npz | --dataset loop.npz
    --out-dir LONG | --reproduce --out-dir LONG | --reproduce --model m2 --out-dir LONG
    --dataset gap.npz | --dataset newclass.npz | --dataset missing.npz | --dataset file.npz
"""


def test_bad_input_ends_with_one_line_and_code_2(small, tmp_path, monkeypatch, capsys):
    """Options wrong in many ways: exit code 2, one line on stderr, no file left behind."""
    bad_files(tmp_path, small)
    monkeypatch.chdir(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    bad = BAD.replace("LONG", 256 * "x").strip()  # longer than the name of a file may be
    bad = bad.replace("HUGE", 350 * "9")  # more than a float holds
    cases = [case.split() for line in bad.splitlines() for case in line.split("|")]
    assert len(cases) >= 60
    for case in cases:
        args = case if "--dataset" in " ".join(case) else ["--dataset", str(small), *case]
        assert ssvae.main(args) == 2, case
        out, err = capsys.readouterr()
        assert err.startswith("ssvae: ") and err.count("\n") == 1 and len(err) < 500, (case, err)
        assert out == "", case
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == before
    assert not (tmp_path / "was run").exists() and not (tmp_path / "runs").exists()


def command(*args, **how):
    """ssvae.py as a user calls it."""
    line = [sys.executable, str(HERE / "ssvae.py"), *map(str, args)]
    return subprocess.run(line, capture_output=True, text=True, check=False, **how)


def test_standard_output_closed_or_full_is_one_line_and_code_2(small, tmp_path):
    """A closed one is no error; into a full device nothing can be printed."""
    args = (*quick("m2"), "--dataset", small, "--no-images", "--out-dir", tmp_path / "run")
    line = shlex.join([sys.executable, str(HERE / "ssvae.py"), *map(str, args)])
    shell = {"shell": True, "capture_output": True, "text": True}
    full = subprocess.run(f"{line} >/dev/full", check=False, **shell)
    assert full.returncode == 2 and full.stderr.startswith("ssvae: cannot print (")
    assert full.stderr.count("\n") == 1
    closed = subprocess.run(f"{line} --resume >&-", check=False, **shell)
    assert (closed.returncode, closed.stderr) == (0, "")
    assert (tmp_path / "run" / "results.json").exists()


def test_a_second_process_in_the_folder_ends_a_run_before_anything_is_lost(
    small, tmp_path, monkeypatch, capsys
):
    """model.pt written by somebody else after the first epoch stays as it is."""
    end_epoch = ssvae.Run.end_epoch

    def and_another(self, *args):
        end_epoch(self, *args)
        (tmp_path / "model.pt").write_bytes(b"another's")

    monkeypatch.setattr(ssvae.Run, "end_epoch", and_another)
    run(*quick("m2"), "--dataset", small, "--no-images", "--out-dir", tmp_path, code=2)
    assert "another process" in capsys.readouterr().err
    assert (tmp_path / "model.pt").read_bytes() == b"another's"


def test_files_that_no_run_wrote_are_not_replaced(small, tmp_path, capsys):
    (tmp_path / "log.csv").write_text("my notes")
    run(*quick("m2"), "--dataset", small, "--out-dir", tmp_path, code=2)
    assert "log.csv is of no run" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["my notes"]


@pytest.mark.parametrize("model", ["m1", "m1+m2"])
def test_pictures_missed_by_an_interruption_are_drawn_when_resumed(
    small, tmp_path, monkeypatch, model
):
    """Interrupted at the last epoch's curves.png, then at the pictures of the end."""
    args = (*quick(model), "--dataset", small, "--out-dir", tmp_path)
    write = ssvae.write_pictures

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ssvae, "write_pictures", interrupted)
    for resume in range(8):
        run(*args, *["--resume"] * (resume > 0), code=130)
    assert not (tmp_path / "results.json").exists()
    monkeypatch.setattr(ssvae, "write_pictures", write)
    run(*args, "--resume")
    assert {"curves.png", "samples.png", "reconstructions.png"} <= {
        p.name for p in tmp_path.iterdir()
    }


def test_reproduce_asks_every_seed_whether_its_labels_suffice(tmp_path, capsys):
    """Of 60 images of 3 classes the validation images leave 45 to be labelled with seeds 0 and 1,
    with seed 2 42."""
    x, y = (np.arange(60 * 4).reshape(60, 2, 2) % 256).astype(np.uint8), np.arange(60) % 3
    np.savez(tmp_path / "x.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    args = ("--reproduce", "--dataset", tmp_path / "x.npz", "--labels", 45)
    for seed in (0, 1):
        ssvae.split(torch.from_numpy(y), 45, seed)  # raises nothing
    run(*args, "--out-dir", tmp_path / "q", code=2)
    assert "at most 42" in capsys.readouterr().err and not (tmp_path / "q").exists()


def test_command_good_and_bad(small, tmp_path):
    """As a subprocess: exit codes, no traceback, also where the console lacks a letter of the data
    set's name; without CUDA, --device cuda is an error."""
    own, ascii_only = tmp_path / "größe.npz", os.environ | {"PYTHONIOENCODING": "ascii"}
    own.write_bytes(small.read_bytes())
    args = ("--dataset", own, "--out-dir", tmp_path / "run")
    good = command(*quick("m1+m2"), *args, env=ascii_only)
    assert good.returncode == 0, good.stderr
    lines = good.stdout.splitlines()
    assert "test error" in lines[-2] and good.stdout.count(" epoch ") == 4
    assert lines[0].startswith("m1: 2,500 images, no labels, 2 epochs of 5 steps (few")
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "analogies.png", "curves.png", "log.csv", "mistakes.png", "model.pt",
        "reconstructions.png", "results.json", "samples.png"]  # fmt: skip
    cases = [("--dataset", "nothing"), ("--dataset", tmp_path / "no.npz"), ("--labels", "x")]
    if not torch.cuda.is_available():
        cases.append(("--dataset", small, "--device", "cuda"))
    with ThreadPoolExecutor(2) as pool:  # two at a time
        bads = pool.map(lambda case: command(*case, "--out-dir", tmp_path / "bad"), cases)
    for case, bad in zip(cases, bads, strict=True):
        assert bad.returncode == 2 and bad.stderr.count("\n") == 1, (case, bad.stderr)
        assert "Traceback" not in bad.stderr and not (tmp_path / "bad").exists()


def test_extreme_but_valid_values_run(small, tmp_path):
    """The ends of some options' ranges, on M2."""
    tiny, arrays = tmp_path / "tiny.npz", dict(np.load(small))  # for minibatches of two images
    np.savez(tiny, **arrays | {name: arrays[name][:200] for name in ("x_train", "y_train")})
    cases = [
        (small, "--batch-size", 10**12),
        (small, "--lr", 1e-30),
        (small, "--alpha", 0),
        (small, "--alpha", 1e6),
        (small, "--seed", 2**32 - 1),
        (small, "--labels", 10),
        (tiny, "--labels", 20, "--batch-size", 2),
    ]
    for k, (path, *extreme) in enumerate(cases):
        small_run = ("--dataset", path, "--epochs", 1, "--hidden", 64)
        run(*small_run, *extreme, "--out-dir", tmp_path / str(k))


def test_damaged_checkpoints_are_refused(small, tmp_path, monkeypatch, capsys):
    """Truncated, foreign, older, altered and malicious ones: one line, exit code 2, nothing run."""
    args = (*quick("m2"), "--dataset", small, "--out-dir", tmp_path / "run")
    save = ssvae.Run.save

    def interrupted(*args, **how):
        save(*args, **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(ssvae.Run, "save", interrupted)
    run(*args, code=130)
    assert "--resume" in capsys.readouterr().err
    checkpoint = tmp_path / "run" / "model.pt"
    run("--load", checkpoint, code=2)
    assert "unfinished" in capsys.readouterr().err
    whole = checkpoint.read_bytes()
    bad_files(tmp_path, small)
    names = ["text.pt", "foreign.pt", "malicious.pt", "malicious2.pt"]
    names += ["no optimizer.pt", "no pca.pt", "no rows.pt"]
    for key in ("optimizer", "pca", "rows"):
        lacking = torch.load(checkpoint, weights_only=True)
        del lacking[key]
        torch.save(lacking, tmp_path / f"no {key}.pt")
    for part in ({"rows": [5]}, {"rows": [{"stage": "m2"}]}, {"model": []}):
        names.append(f"altered {len(names)}.pt")
        torch.save(torch.load(checkpoint, weights_only=True) | part, tmp_path / names[-1])
    rng = np.random.default_rng(0)
    cuts = [whole[: rng.integers(len(whole))] for _ in range(10)]
    middle = len(whole) // 2  # where the weights are
    flipped = whole[:middle] + bytes([whole[middle] ^ 0x40]) + whole[middle + 1 :]
    for content in [flipped, *cuts, *[(tmp_path / name).read_bytes() for name in names]]:
        checkpoint.write_bytes(content)
        run(*args, "--resume", code=2)
        err = capsys.readouterr().err
        assert err.startswith("ssvae: ") and err.count("\n") == 1
    assert not (tmp_path / "was run").exists()


def test_altered_models_are_refused(small, narrow, tmp_path, capsys):
    """model.pt with settings, weights or classifier that do not belong there: code 2, one line."""
    out = tmp_path / "out"
    wrong = {
        "m1": [("settings", "text"), ("settings", {}), ("classifier", None), ("model", {}),
               ("classifier", {"points": torch.ones(3, 4), "votes": torch.ones(3, 10), "k": 1}),
               ("classifier", lambda old: {name: value[..., :1] for name, value in old.items()}),
               ("labels", "six"), ("seed", "x"), ("seed", 2**70), ("checksum", 3),
               ("rows", 7), ("seconds", "x"),
               ("model name", "m3"), ("model name", "m2"), ("hidden", "wide"), ("z_dim", 10**9)],
        "m1+m2": [("active", torch.tensor([99])), ("active", torch.tensor([0.5])), ("active", 3),
                  ("active", lambda old: torch.full_like(old, 99))],
    }  # fmt: skip
    for model, changes in wrong.items():
        run(*quick(model), "--dataset", small, "--out-dir", out, "--overwrite", "--no-images")
        for key, value in changes:
            content = torch.load(out / "model.pt", weights_only=True)
            part = content if key in content else content["settings"]
            part = content["model"] if key == "active" else part
            name = "model" if key == "model name" else key
            part[name] = value(part[name]) if callable(value) else value
            torch.save(content, tmp_path / "bad.pt")
            capsys.readouterr()
            lines = [("--load", tmp_path / "bad.pt", "--out-dir", tmp_path / "none")]
            if model == "m1" and key not in ("classifier", "labels"):
                lines += [("--m1", tmp_path / "bad.pt", "--model", "m1+m2", "--dataset", small)]
            for line in lines:
                run(*line, code=2)
                assert capsys.readouterr().err.count("\n") == 1, (key, value)
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_keeps_its_principal_components(tmp_path, monkeypatch):
    """Though computing them again may give other signs. Altered ones: code 2."""
    x, y = np.random.default_rng(0).random((60, 4, 4, 3)), np.arange(60) % 3
    np.savez(tmp_path / "own.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    line = ("--dataset", tmp_path / "own.npz", "--labels", 6, "--epochs", 2, "--no-images")
    line += ("--device", "cpu")  # where training is repeatable to the last bit
    run(*line, "--out-dir", tmp_path / "whole")
    end_epoch, compute = ssvae.Run.end_epoch, ssvae.principal_components

    def interrupted(*args):
        end_epoch(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(ssvae.Run, "end_epoch", interrupted)
    run(*line, "--out-dir", tmp_path / "part", code=130)
    monkeypatch.setattr(ssvae.Run, "end_epoch", end_epoch)
    flipped = lambda images: {name: -a if name == "V" else a for name, a in compute(images).items()}
    monkeypatch.setattr(ssvae, "principal_components", flipped)
    run(*line, "--out-dir", tmp_path / "part", "--resume")
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "part"))
    saved = torch.load(tmp_path / "part" / "model.pt", weights_only=True)
    for wrong in (7, None, {}, {"mean": torch.zeros(3)}):
        torch.save(saved | {"pca": wrong}, tmp_path / "bad.pt")
        run("--load", tmp_path / "bad.pt", code=2)


def test_an_m1_keeps_its_settings_and_is_not_lost(small, tmp_path, capsys):
    """--model m1 --m1 FILE records what M1 was trained with; no run overwrites the file."""
    first = ("--model", "m1", "--dataset", small, "--epochs", 1, "--no-images")
    run(*first, "--recipe", "paper", "--z-dim", 7, "--out-dir", tmp_path / "a")
    m1 = tmp_path / "a" / "model.pt"
    run("--model", "m1", "--dataset", small, "--m1", m1, "--out-dir", tmp_path / "b", "--no-images")
    results = json.loads((tmp_path / "b" / "results.json").read_text())
    assert (results["recipe"], results["z_dim"], results["epochs"]) == ("paper", 7, 1)
    run("--load", tmp_path / "b" / "model.pt", "--no-images")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "model.pt").write_bytes(m1.read_bytes())
    stack = ("--model", "m1+m2", "--dataset", small, "--epochs", 1, "--no-images")
    kept = ("--m1", tmp_path / "c" / "model.pt", "--out-dir", tmp_path / "c")
    run(*stack, *kept, code=2)
    run(*stack, *kept, "--overwrite", code=2)
    (tmp_path / "link.pt").symlink_to(tmp_path / "c" / "model.pt")
    run(*stack, "--m1", tmp_path / "link.pt", *kept[2:], "--overwrite", code=2)
    assert (tmp_path / "c" / "model.pt").read_bytes() == m1.read_bytes()
    run(*stack, "--m1", m1, "--seed", 3, "--out-dir", tmp_path / "d", code=2)
    assert "seed" in capsys.readouterr().err.splitlines()[-1]
    other = tmp_path / "e" / small.name  # another file of the same name
    other.parent.mkdir()
    arrays = dict(np.load(small))
    np.savez(other, **(arrays | {"x_train": 255 - arrays["x_train"]}))
    line = ["--model", "m1+m2", "--dataset", other, "--m1", m1, "--out-dir", tmp_path / "d"]
    run(*line, code=2)
    assert "was trained on" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of Unix")
def test_a_full_disk_ends_the_run_with_one_line(small, tmp_path):
    """No file may grow over 50 kB: the first checkpoint cannot be written."""
    import resource

    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    bad = command(*quick("m2"), "--dataset", small, "--out-dir", tmp_path / "o", preexec_fn=limit)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1, bad.stderr
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "o"])


@pytest.mark.parametrize("model", MODELS)
def test_killed_at_random_moments_and_resumed(small, tmp_path, model):
    """SIGKILL, SSVAE_KILLS times (1), each about within an epoch of a checkpoint: the same
    weights, results and log as without."""
    kills = int(os.environ.get("SSVAE_KILLS", "1"))
    args = ("--model", model, "--dataset", small, "--epochs", 3 + 3 * kills, "--batch-size", 100)
    args += ("--hidden", 64, "--device", "cpu", "--no-images")  # see QUICK
    args += {"m1": ("--classifier", "knn"), "m2": (), "m1+m2": ("--m1-epochs", 2)}[model]
    again = [sys.executable, HERE / "ssvae.py", *args, "--out-dir", tmp_path / "b", "--resume"]
    log, rng = tmp_path / "b" / "log.csv", np.random.default_rng(0)
    rows = lambda: list(csv.DictReader(log.open())) if log.exists() else []
    for _ in range(kills):
        done = len(rows())
        process = subprocess.Popen(list(map(str, again)), stdout=subprocess.DEVNULL)
        while len(rows()) == done and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.random() * float(rows()[-1]["seconds"]))
        assert process.poll() is None  # there was something to kill
        process.kill()
        process.wait()
    run(*args, "--out-dir", tmp_path / "a")
    run(*args, "--out-dir", tmp_path / "b", "--resume")
    assert_same(outcome(tmp_path / "a"), outcome(tmp_path / "b"))


def test_reproduce_continues_and_makes_the_table(small, narrow, tmp_path, capsys, monkeypatch):
    """Interrupted, the same command goes on without repeating runs; means and standard deviations
    by NumPy from the runs' own results; a seed's stacks share an M1, its runs of m1 another."""
    line = ["--reproduce", "--dataset", small, "--labels", 20, 50, "--seeds", 2, "--epochs", 1]
    line += ["--m1-epochs", 1, "--out-dir", tmp_path, "--no-images"]
    trained, train = [], ssvae.train

    def counted(model, *args):
        if len(trained) == 4:
            trained.append("interrupted")
            raise KeyboardInterrupt
        trained.append(type(model).__name__)
        train(model, *args)

    monkeypatch.setattr(ssvae, "train", counted)
    run(*line, code=130)
    run(*line)
    assert trained.count("M1") == 4 and len(trained) == 4 + 4 + 4 + 1
    table = (tmp_path / "table.md").read_text()
    results = json.loads((tmp_path / "table.json").read_text())
    assert len(results) == 12
    lr = ssvae.settings_of("m1")["lr"]
    assert {r["lr"] for r in results if r["model"] == "m1"} == {lr}
    assert {r.get("m1_lr") for r in results} == {None, ssvae.STACKED_M1["lr"]}
    for model in MODELS:
        for N in (20, 50):
            found = [r for r in results if (r["model"], r["labels"]) == (model, N)]
            errors = [r["test_error"] for r in found]
            assert sorted(r["seed"] for r in found) == [0, 1]
            assert f"{np.mean(errors):.2f} +- {np.std(errors, ddof=1):.2f}" in table
    i = line.index("--m1-epochs")
    m1_alone = [*line[:i], *line[i + 2 :], "--model", "m1"]
    for other in (["--classifier", "knn"], ["--z-dim", 7]):  # the runs, the shared M1 are not so
        capsys.readouterr()
        run(*m1_alone, *other, code=2)
        assert f"with {other[0].strip('-').replace('-', '_')}" in capsys.readouterr().err
    line[line.index(20)] = 30  # another N first: the same M1s serve
    trained.append("not to be interrupted")
    run(*line)
    assert trained.count("M1") == 4 and len(trained) == 4 + 4 + 4 + 1 + 1 + 4
    results = json.loads((tmp_path / "table.json").read_text())
    assert sorted(r["labels"] for r in results) == [30] * 6 + [50] * 6  # what was asked
    finished = (tmp_path / "table.json").read_text()
    for option in ("--epochs", "--m1-epochs"):
        other = list(line)
        other[line.index(option) + 1] = 2
        capsys.readouterr()
        run(*other, code=2)
        assert "--overwrite" not in capsys.readouterr().err  # which --reproduce would refuse
        assert (tmp_path / "table.json").read_text() == finished
    run(*line)
    assert (tmp_path / "table.json").read_text() == finished
    calls, go = itertools.count(), ssvae.train_and_evaluate

    def interrupted(args):  # in the second seed
        if next(calls) == 9:
            raise KeyboardInterrupt
        return go(args)

    monkeypatch.setattr(ssvae, "train_and_evaluate", interrupted)
    run(*line, code=130)
    assert (tmp_path / "table.json").read_text() == finished


@pytest.mark.parametrize(
    ("features", "faster"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, True),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, False),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
        ({"avx2": True}, False),
    ],
)
def test_bfloat16_only_where_it_was_measured_to_be_faster(monkeypatch, features, faster):
    """By the CPU's features; the timings are in the function's docstring."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    assert ssvae.bfloat16_is_faster(torch.device("cpu")) is faster


def test_precision(small, tmp_path):
    """Both train, and the results say which it was."""
    for precision in ("float32", "bfloat16"):
        out = tmp_path / precision
        how = ("--precision", precision, "--no-images")
        run(*quick("m2"), "--dataset", small, "--out-dir", out, *how)
        assert json.loads((out / "results.json").read_text())["precision"] == precision


def test_readme_and_help_name_the_same_options():
    """Every option in README exists, and every option but the settings is in its table."""
    known = set(re.findall(r"(?<=[ \[])--[a-z][a-z0-9-]+", command("--help").stdout))
    readme = (HERE / "README.md").read_text()
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", readme)) <= known
    table = readme.split("\n## Options\n")[1].split("\n## ")[0]
    settings = {"--" + name.replace("_", "-") for name in ssvae.SETTINGS}
    assert settings <= known
    assert known - settings - {"--help"} <= set(re.findall(r"(?<=`)--[a-z][a-z0-9-]+", table))


def test_auto_falls_back_on_glyphs_and_says_so(tmp_path, monkeypatch, capsys):
    """Where MNIST is neither on disk nor downloadable; an explicit mnist is an error there."""
    from torchvision import datasets

    def offline(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno network")

    monkeypatch.setattr(datasets.MNIST, "download", offline)
    args = ("--data-dir", tmp_path / "none", "--out-dir", tmp_path / "out", "--epochs", 1)
    run(*args, "--dataset", "mnist", code=2)
    assert "no network" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(ssvae, "glyphs", lambda make=ssvae.glyphs: make(1400))
    run(*args)
    assert "glyphs" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["dataset"] == "glyphs"


def real_files(dataset):
    """The folder of a data set's files. The test is skipped without it."""
    root = os.environ.get("SSVAE_DATA_DIR") or pytest.skip("SSVAE_DATA_DIR is not set")
    source = Path(root) / {"mnist": "MNIST", "fashion": "FashionMNIST"}[dataset] / "raw"
    return source if source.exists() else pytest.skip(f"{source} is not there")


@pytest.mark.parametrize("dataset", ["mnist", "fashion"])
def test_truncated_data_files_are_not_read_silently(dataset, tmp_path):
    """One of the four files cut at ten random places, then each byte of its header flipped."""
    source = real_files(dataset)
    raw = tmp_path / source.parent.name / "raw"
    raw.mkdir(parents=True)
    for path in source.glob("*-ubyte"):
        (raw / path.name).symlink_to(path)
    rng = np.random.default_rng(0)
    for k in range(18):
        path = sorted(raw.iterdir())[k % 4]
        content = bytearray((source / path.name).read_bytes())
        if k < 10:
            content = content[: rng.integers(len(content))]
        else:
            content[k - 10] ^= 0xFF
        path.unlink()
        path.write_bytes(content)
        with pytest.raises(ssvae.BadInput):
            ssvae.load_known(dataset, tmp_path)
        path.unlink()
        path.symlink_to(source / path.name)
    assert [len(a) for a in ssvae.load_known(dataset, tmp_path)] == [60000] * 2 + [10000] * 2


@pytest.mark.parametrize(("dataset", "most"), [("mnist", 15), ("fashion", 28)])
def test_short_run_on_real_images(tmp_path, dataset, most):
    """M2 with 1000 labels, one epoch: less than this error, in %, on the test set."""
    real_files(dataset)
    run("--dataset", dataset, "--labels", 1000, "--epochs", 1, "--hidden", 200, 200,
        "--out-dir", tmp_path, "--no-images")  # fmt: skip
    assert outcome(tmp_path)[1]["test_error"] < most


def test_readme_python_runs(small, tmp_path, monkeypatch, capsys):
    """README's lines for a trained model, with another path: distributions over classes, bounds."""
    out = tmp_path / "runs" / "m2-mnist-100-0"
    run(*quick("m2"), "--dataset", small, "--out-dir", out, "--no-images")
    assert not list(out.glob("*.png"))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    lines = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines, namespace)  # noqa: S102
    q, bound = namespace["model"].classify(namespace["x"]).exp(), namespace["model"].bound
    torch.testing.assert_close(q.sum(1), torch.ones(5))
    assert bound(namespace["x"]).shape == (5,) and "tensor" in capsys.readouterr().out


def test_classes_can_be_pasted_elsewhere():
    """The building blocks and one class at a time, in a namespace with torch alone."""
    source = (HERE / "ssvae.py").read_text()
    heads = ["\n# 1. BUILDING", "\n# 2. M1:", "\n# 3. M2:", "\n# 4. M1+M2:", "\n# 5. CLASSIFIERS"]
    cuts = [source.index(head) for head in heads]
    blocks, m1, m2, stack = (source[a:b] for a, b in itertools.pairwise(cuts))
    imports = "import math\nimport torch\nfrom torch import Tensor, nn\n"
    imports += "import torch.nn.functional as F\n"
    x, y = (torch.rand(50, 20) < 0.5).float(), torch.arange(50) % 2
    s = {"alpha": 1.0, "beta": 1.0, "balance": 1.0, "smooth": 1.0, "trust": 0}
    s["classifier_sees"] = "mean"
    for pasted, make in (
        (m1, "M1(20, 3, (8,))"),
        (m2, "M2(20, 2, 3, (8,))"),
        (m1 + m2 + stack, "M1M2(M1(20, 3), M2(3, 2, 1, likelihood='gaussian'), torch.arange(3))"),
    ):
        namespace = {}
        exec(imports + blocks + pasted, namespace)  # noqa: S102
        torch.manual_seed(0)
        model = eval(make, namespace)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
        losses = []
        seen = torch.cat(model.eval().train().encode(x), 1) if "M1M2" in make else x
        for _ in range(100):
            loss = model.objective(seen, y, seen, 1, 1, 1.0, s)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-20:]) < sum(losses[:20])


def test_readme_paste_runs():
    """README's lines for a pasted M2, on the paper's minibatch (one labelled image): the loss is at
    first near 784 log 2 nats, every pixel being guessed, and falls."""
    source = (HERE / "ssvae.py").read_text()
    heads = ("\n# 1. BUILDING", "\n# 2. M1:", "\n# 3. M2:", "\n# 4. M1+M2:")
    blocks, m1, m2, stack = (source.index(head) for head in heads)
    imports = "import math\nimport torch\nfrom torch import Tensor, nn\n"
    imports += "import torch.nn.functional as F\n"
    torch.manual_seed(0)
    namespace = {"x_l": (torch.rand(1, 784) < 0.1).float(), "y_l": torch.tensor([3]), "N": 1}
    namespace |= {"x_u": (torch.rand(9, 784) < 0.1).float(), "M": 9}
    exec(imports + source[blocks:m1] + source[m2:stack], namespace)  # noqa: S102
    lines = (HERE / "README.md").read_text().split("```python\n")[2].split("```")[0]
    start, step = lines.split("# for each minibatch")
    exec(start, namespace)  # noqa: S102
    losses = []
    for _ in range(30):
        exec("#" + step, namespace)  # noqa: S102
        losses.append(namespace["loss"].item())
    assert abs(losses[0] - 784 * np.log(2)) < 20 and losses[-1] < losses[0] - 30


# ---- the benchmark: python test_ssvae.py --------------------------------------------------------


def seconds(f, repeat=5):
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(repeat + 1):
        start = time.perf_counter()
        f()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def trainable(model, recorded=False):
    """Twenty training steps (for they differ: M2.objective), to be called, of a model with its
    settings and made-up data; recorded: forward and backward as a CUDA graph, as train has them."""
    device = ssvae.pick_device("auto")
    bf16 = ssvae.bfloat16_is_faster(device)
    s = ssvae.settings_of(model)
    if device.type != "cpu" and model != "m1":
        s["threshold"] = 0.0  # the default there
    x = (torch.rand(600, 784, device=device) < 0.2).float()
    y = torch.arange(100, device=device) % 10
    if model == "m1":
        net = ssvae.build(M1, s, 784, likelihood="bernoulli")
    else:
        x_dim, likelihood = (784, "bernoulli") if model == "m2" else (30, "gaussian")
        net = ssvae.build(M2, s, x_dim, 10, likelihood=likelihood)
        with torch.no_grad():
            net.q_y[-1].bias[0] = 30.0  # sure of itself, as after some epochs: one label per image
        if model == "m1+m2":
            net = M1M2(M1(784), net, torch.arange(30))
    net = net.to(device).train()
    x = torch.cat(net.encode(x), 1) if model == "m1+m2" else x
    # lr 0: as much work, but what is timed does not change (nor does q_y become less sure)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learned, lr=0.0, fused=True)
    x_l, x_u = (x[:0], x[:500]) if model == "m1" else (x[:100], x[100:])

    def gradients():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = net.objective(x_l, y[: len(x_l)], x_u, 100, 49_900, 1.0, s)
        optimizer.zero_grad()
        loss.backward()

    forward_and_backward = ssvae.record(gradients) if recorded else gradients

    def steps():
        torch.manual_seed(0)
        for _ in range(20):
            forward_and_backward()
            optimizer.step()

    return steps


class Products(TorchDispatchMode):
    """Notes the operands of every matrix product that is computed meanwhile."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.operands.append([torch.randn_like(a) for a in args[-2:]])  # strides are kept
        return op(*args, **(kwargs or {}))


def benchmark_steps():
    print("\nA training step beside the bare matrix products it needs (same shapes and type):")
    print(f"{'model':8}{'step, ms':>10}{'products, ms':>14}{'ratio':>8}{'images/s':>12}")
    cuda = ssvae.pick_device("auto").type == "cuda"
    for model in MODELS:
        steps = trainable(model)
        steps()
        with Products() as made:
            steps()

        def products(operands=made.operands):
            for a, b in operands:
                a @ b

        if cuda:
            steps, products = trainable(model, recorded=True), ssvae.record(products)
        whole, bare = seconds(steps) / 20, seconds(products) / 20
        print(
            f"{model:8}{1e3 * whole:10.1f}{1e3 * bare:14.1f}{whole / bare:8.2f}{500 / whole:12,.0f}"
        )


def epoch_seconds(x, y, out, epochs, *options, first=2):
    """Mean time of M2's epochs from `first` on, on these images, by the command itself."""
    path = out / "images.npz"
    np.savez(path, x_train=x, y_train=y, x_test=x[:1000], y_test=y[:1000])
    args = ["--dataset", path, "--epochs", epochs, "--out-dir", out / "run", *options]
    with contextlib.redirect_stdout(io.StringIO()):
        run(*args, "--overwrite", "--no-images")
    rows = list(csv.DictReader((out / "run" / "log.csv").open()))
    return float(np.mean([float(row["seconds"]) for row in rows[first - 1 :]]))


def benchmark_epochs(out):
    n = 60_000
    if os.environ.get("SSVAE_DATA_DIR"):
        x, y, *_ = ssvae.load_known("mnist", Path(os.environ["SSVAE_DATA_DIR"]))
        name, x = "MNIST", x[:, 0]
    else:
        name, (x, y) = "glyphs", ssvae.glyphs(n)
    print(f"\nAn epoch of M2 on {name}, 50,000 images, 3000 labels, mean of epochs 2 to 10:")
    all_labels = epoch_seconds(x, y, out, 10, "--labels", 3000, "--threshold", 0)
    kept = epoch_seconds(x, y, out, 10, "--labels", 3000, "--threshold", 0.01)
    for what, t in (("threshold 0.01", kept), ("threshold 0", all_labels)):
        print(f"{what:20}{t:8.2f} s {50_000 / t:10,.0f} images/s")
    print(f"{'ratio':20}{all_labels / kept:8.2f}")
    print("\nAn epoch of M2, by number of images (mean of epochs 2 to 6, 1000 labels):")
    for n in (12_000, 24_000, 60_000):  # of which a sixth are validation images
        t = epoch_seconds(x[:n], y[:n], out, 6, "--labels", 1000)
        print(f"{n * 5 // 6:20,}{t:8.2f} s {n * 5 / 6 / t:10,.0f} images/s")
    print("\nAn epoch of M2 by number of classes K (20,000 images, mean of epochs 11 to 15):")
    ten = epoch_seconds(x[:24_000], y[:24_000], out, 15, "--labels", 1000, first=11)
    fine = y[:24_000] * 10 + np.arange(24_000) % 10  # ten arbitrary parts of every class
    # the parts are told apart by a bright mark at the top, so that there is something to learn
    marked = x[:24_000].copy()
    for part in range(10):
        marked[fine % 10 == part, :4, 4 + part * 2 : 6 + part * 2] = 255
    hundred = epoch_seconds(marked, fine, out, 15, "--labels", 1000, first=11)
    for what, t in (("K = 10", ten), ("K = 100", hundred), ("ratio", hundred / ten)):
        print(f"{what:20}{t:8.2f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"bfloat16 {ssvae.bfloat16_is_faster(ssvae.pick_device('auto'))}")  # fmt: skip
    benchmark_steps()
    with tempfile.TemporaryDirectory() as folder:
        benchmark_epochs(Path(folder))
