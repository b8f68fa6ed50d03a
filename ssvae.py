r"""Semi-supervised learning with deep generative models: M1, M2 and M1+M2, in one file.

    D. P. Kingma, D. J. Rezende, S. Mohamed, M. Welling,
    "Semi-Supervised Learning with Deep Generative Models", NIPS 2014, arXiv 1406.5298v2.

Equation and section numbers below are that paper's. Run it:

    python ssvae.py --model m2 --dataset mnist

THE PROBLEM.  60,000 images of digits are cheap; the labels are not. Say N = 100 images have one.
A classifier trained on those 100 alone errs on about a fifth to a quarter of new digits. Can the
other images, unlabelled, teach it the rest? If we model how images arise, p(x), from a digit class
and a style, then to explain the unlabelled images well is to find out which class each belongs to.

THE MODELS.  Circles in (parentheses) are latent, boxes in [brackets] observed, arrows generate.
z is the style: everything about the image that is not the class.

    M1 (section 2.1)          M2 (section 2.2)              M1+M2 (section 3.1.3)

        (z)                    [y] or (y)    (z)            [y] or (y)    (z2)
         |                           \       /                    \       /
         v                            v     v                      v     v
        [x]                             [x]                         (z1)
                                                                     |
    labels are not used;        y is observed for the                v
    a classifier is then        labelled images only                [x]
    trained on z

All three are trained alike: log p(x), the quantity we want high, is an intractable integral over
the latent variables, so we raise a lower bound on it that we can compute (derived at M1).

NOTATION (the paper's)
    x           an image as a vector of D pixels, [B, D] in a minibatch of B
    y           its class, an integer in 0..K-1, [B]
    z, z1, z2   continuous latent variables, [B, Z]
    p_theta     the generative model or "decoder":  p(y) p(z) p(x|y,z)
    q_phi       the recognition model or "encoder": q(z|x), q(z|x,y) and the classifier q(y|x)
    L, U, J     losses, i.e. minus a lower bound: labelled (eq. 6), unlabelled (eq. 7), both
                (eq. 8; the paper writes J for M1's too, eq. 5)
    alpha       weight of the classification loss (eq. 9; in the code per image, see WHAT ALPHA IS)
    N, M        the number of labelled and of unlabelled training images
The three models' losses are in nats (natural logarithm). E_q[.] is an expectation over q,
KL(q || p) = E_q[log q - log p] >= 0 the divergence, H(q) = -E_q[log q] the entropy.

Read on from top to bottom: 1 settings, 2 building blocks, 3 M1, 4 M2, 5 M1+M2, 6 classifiers on
M1's features, 7 data, 8 training, 9 evaluation, 10 the command line.
"""

import argparse
import csv
import io
import json
import math
import os
import shlex
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# =================================================================================================
# 1. SETTINGS: one table, one column a model
# =================================================================================================
# Chosen on MNIST with N = 100, by the error on the 10,000 validation images (whose labels are used
# for that, as in the paper: N labels alone would be a poor guide). For the stack, M1's stage takes
# the column "m1", its M2 stage the column "m1+m2".

SETTINGS = {
    "m1": {
        "epochs": 30,  # passes over the training images
        "batch_size": 500,  # unlabelled images in a minibatch
        "lr": 3e-3,  # Adam's first step size; it falls linearly to 0 over training
        "z_dim": 50,  # dimensions of z (paper: 50)
        "hidden": (600, 600),  # units in the hidden layers of every network (paper: 600, 600)
        "ramp": 0.15,  # fraction of training in which the KL term fades in (see M1.objective)
    },
    "m2": {
        "epochs": 40,
        "batch_size": 500,
        "batch_labelled": 100,  # labelled images in a minibatch, beside the unlabelled ones
        "lr": 2e-3,
        "z_dim": 50,
        "hidden": (500, 500),
        "batch_norm": False,  # in q(z|x,y) and p(x|y,z); the classifier q(y|x) always has it
        "dropout": 0.5,  # in the classifier
        "alpha": 10.0,  # of the classification loss, per image: a in WHAT ALPHA IS (paper: 0.1)
        "ramp": 0.5,  # fraction of training in which unlabelled images fade in (see M2.objective)
        "threshold": 0.01,  # on CPUs, labels with q(y|x) below it are left out of U (see M2)
    },
    "m1+m2": {
        "epochs": 100,
        "batch_size": 500,
        "batch_labelled": 100,
        "lr": 3e-3,
        "z_dim": 50,
        "hidden": (500, 500),
        "batch_norm": True,
        "dropout": 0.2,
        "alpha": 1.0,
        "ramp": 0.5,
        "threshold": 0.01,
    },
}

# What differs for a data set.
OVERRIDES = {"glyphs": {"m1": {"epochs": 15}}}  # kNN error as after 30, in half the time

# The paper's test errors in % (Table 1: mean, +-) for MNIST, shown beside ours at the end of a run.
PAPER = {
    "m1": {100: (11.82, 0.25), 600: (5.72, 0.05), 1000: (4.24, 0.07), 3000: (3.49, 0.04)},
    "m2": {100: (11.97, 1.71), 600: (4.94, 0.13), 1000: (3.60, 0.56), 3000: (3.92, 0.63)},
    "m1+m2": {100: (3.33, 0.14), 600: (2.59, 0.05), 1000: (2.40, 0.02), 3000: (2.18, 0.04)},
}

# =================================================================================================
# 2. BUILDING BLOCKS shared by the three models
# =================================================================================================


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation over [B, D]; a minibatch of one is normalised by running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


def mlp(d: int, *sizes: int, batch_norm: bool = True, dropout: float = 0.0) -> nn.Sequential:
    """Multilayer perceptron with d inputs and layers of these sizes; the last is the output."""
    *hidden, outputs = sizes
    layers = []
    for units in hidden:
        norm = [BatchNorm(units)] if batch_norm else []
        noise = [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(d, units), *norm, nn.ReLU(), *noise]
        d = units
    return nn.Sequential(*layers, nn.Linear(d, outputs))


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x) of independent Bernoulli pixels: x, logits [B, D] -> [B], nats per image.

    Pixel d is on with probability s_d = sigmoid(l_d) = 1 / (1 + exp(-l_d)), so
        log p(x) = sum_d  x_d log s_d + (1 - x_d) log(1 - s_d),
    the negative of the binary cross-entropy, which PyTorch computes from the logits l_d without
    ever forming log(0). Summed over pixels, not averaged: pixels are D pieces of evidence about
    one z, and averaging would make the KL term D times too heavy. Summed in float32.
    """
    bce = F.binary_cross_entropy_with_logits(logits, x.to(logits.dtype), reduction="none")
    return -bce.sum(-1, dtype=torch.float32)


def log_gaussian(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mu, diag(exp(logvar))), all [B, D] -> [B], nats per data point.

    The log of the Gaussian density, written with logvar = log sigma^2 so that a network may output
    any real number:  sum_d  -1/2 [ log 2 pi + log sigma_d^2 + (x_d - mu_d)^2 / sigma_d^2 ].
    """
    mu, logvar = mu.float(), logvar.float()
    return -0.5 * (math.log(2 * math.pi) + logvar + (x - mu) ** 2 * torch.exp(-logvar)).sum(-1)


def kl_gaussian(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL( N(mu, diag(sigma^2)) || N(0, I) ), both [B, Z] -> [B], nats per data point (appendix B).

    For one dimension, with E_q[(z - mu)^2] = sigma^2 and so E_q[z^2] = mu^2 + sigma^2:
        KL = E_q[ log q(z) ]                                  - E_q[ log p(z) ]
           = -1/2 E_q[ log 2 pi sigma^2 + (z - mu)^2/sigma^2 ] + 1/2 E_q[ log 2 pi + z^2 ]
           = -1/2 [ log 2 pi + log sigma^2 + 1 ]               + 1/2 [ log 2 pi + mu^2 + sigma^2 ]
           =  1/2 [ mu^2 + sigma^2 - 1 - log sigma^2 ],
    and dimensions are independent, so they add up.
    """
    return 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(-1)


def sample_gaussian(mu: Tensor, logvar: Tensor) -> Tensor:
    """Draw z ~ N(mu, diag(exp(logvar))), reparameterised: all [B, Z] (section 3.1).

    z = mu + sigma * eps with eps ~ N(0, I). The randomness no longer depends on the parameters, so
    grad E_q[f(z)] = E_eps[grad f(mu + sigma * eps)]: the gradient of an average is an average of
    gradients, and one draw estimates it without bias. (The alternative, the score function
    E_q[f(z) grad log q(z)], uses only the value of f, not its slope, and is usually far noisier.)
    """
    return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)


def fade_in(t: float, ramp: float) -> float:
    """A weight that grows from 0 to 1 while t, the part of training that is done, reaches ramp."""
    return min(1.0, t / ramp) if ramp else 1.0


# What is assumed of x, the data set's choice: the number of decoder outputs per dimension of x, and
# log p(x|.) as a function of x and those outputs, each [B, D] -> [B].
LIKELIHOODS = {
    "bernoulli": (1, log_bernoulli),  # x is 0 or 1; one logit a pixel
    "gaussian": (2, log_gaussian),  # x is real; a mean and a log-variance a dimension
}

# =================================================================================================
# 3. M1: a variational autoencoder on all images, labels unused (section 2.1)
# =================================================================================================
#
# p(z) = N(0, I),   p(x|z) = f(x; z, theta),   q(z|x) = N(mu(x), diag sigma^2(x))         (eq. 1, 3)
#
# The bound. log p(x) is the log of an integral over z. Multiply and divide by any density q(z|x):
#     log p(x) = log integral p(x|z) p(z) dz = log E_q(z|x)[ p(x|z) p(z) / q(z|x) ]
#             >= E_q(z|x)[ log p(x|z) + log p(z) - log q(z|x) ]       (Jensen: log is concave)
#              = E_q(z|x)[ log p(x|z) ] - KL( q(z|x) || p(z) )  =: -J(x)                     (eq. 5)
# How much do we lose? Put p(x|z) p(z) = p(z|x) p(x) into the second line; log p(x) leaves E_q:
#     -J(x) = log p(x) - KL( q(z|x) || p(z|x) ),
# so lowering J raises log p(x) or draws q(z|x) to the true posterior: fitting the model and doing
# inference are one minimisation. The first term of -J rewards z that reconstructs x; the KL is the
# price of what z says about x: its mean over x is their mutual information plus the divergence of
# the mean q(z) from p(z).


class M1(nn.Module):
    """Latent-feature model. likelihood: a key of LIKELIHOODS. x: [B, x_dim], z: [B, z_dim]."""

    def __init__(self, x_dim: int, z_dim=50, hidden=(600, 600), likelihood="bernoulli"):
        super().__init__()
        self.outputs, self.log_density = LIKELIHOODS[likelihood]
        self.q_z = mlp(x_dim, *hidden, 2 * z_dim)  # mu(x) and log sigma^2(x)
        self.p_x = mlp(z_dim, *reversed(hidden), x_dim * self.outputs)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar of q(z|x), both [B, Z]. mu is the feature vector of x (section 2.1)."""
        mu, logvar = self.q_z(x).float().chunk(2, -1)
        return mu, logvar

    def log_p_x(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z), [B], nats."""
        return self.log_density(x, *self.p_x(z).chunk(self.outputs, -1))

    def J(self, x: Tensor, beta: float = 1.0) -> Tensor:
        """Eq. 5 with one draw of z, [B], nats per image. If beta = 1, -J <= log p(x) on average."""
        mu, logvar = self.encode(x)
        z = sample_gaussian(mu, logvar)
        return -self.log_p_x(x, z) + beta * kl_gaussian(mu, logvar)

    def objective(self, x_l, y_l, x_u, labelled: float, t: float, s) -> Tensor:
        """Training loss, a scalar in nats per image; t in [0, 1] is how much of training is done.

        Why the ramp. Early on the decoder is too poor to use z, so the cheapest thing a latent
        dimension can do is to pay no KL: q(z_d|x) = p(z_d). The decoder then learns to ignore it,
        and gradients rarely bring it back (posterior collapse). A KL weight beta that grows from
        0 to 1 lets the decoder learn to use z first. Batch normalisation helps as well: it keeps
        what the last hidden layer tells mu(x) varying over the images of a minibatch.
        """
        return self.J(x_u, beta=fade_in(t, s["ramp"])).mean()

    def bound(self, x: Tensor) -> Tensor:
        """-J(x), [B], nats per image: <= log p(x) on average over its draw of z."""
        return -self.J(x)


# =================================================================================================
# 4. M2: the class is a latent variable, observed for the labelled images (section 2.2)
# =================================================================================================
#
# p(y) = Cat(1/K, ..., 1/K),  p(z) = N(0, I),  p(x|y,z) = f(x; y, z, theta)                  (eq. 2)
# q(z|x,y) = N(mu(x,y), diag sigma^2(x,y)),    q(y|x) = Cat(pi(x))                           (eq. 4)
# (The paper has sigma^2(x); the authors' code lets it depend on y as well, and so do we.)
#
# LABELLED images. x and y are both observed, z is latent: M1's derivation with (x, y) for x gives
#     log p(x,y) >= E_q(z|x,y)[ log p(x|y,z) + log p(y) + log p(z) - log q(z|x,y) ]
#                 = E_q(z|x,y)[ log p(x|y,z) ] + log p(y) - KL(q(z|x,y) || p(z)) =: -L(x,y)  (eq. 6)
#
# UNLABELLED images. y is latent too. Take q(y,z|x) = q(y|x) q(z|x,y) and the same Jensen step:
#     log p(x) >= E_q(y,z|x)[ log p(x|y,z) + log p(y) + log p(z) - log q(z|x,y) - log q(y|x) ]
#               = sum_y q(y|x) [ -L(x,y) ] - sum_y q(y|x) log q(y|x)
#               = sum_y q(y|x) [ -L(x,y) ] + H( q(y|x) )                            =: -U(x) (eq. 7)
# z is drawn, because a continuous z can be reparameterised; y is summed over, because a discrete y
# cannot, and there are only K of them.
# What does U teach q(y|x)? Let r(y) = softmax_y( -L(x,y) ), Bayes' rule with the bounds in place of
# log p(x,y), so that L(x,y) = -log r(y) - log sum_y' exp(-L(x,y')). Put that into U:
#     U(x) = KL( q(y|x) || r(y) ) - log sum_y' exp( -L(x,y') ),
# least at q = r: the classifier learns to agree with the generative model. H makes the answer a
# softmax: without H the best q is certain of the smallest L, however small the difference.
#
# THE WHOLE SET of N labelled and M unlabelled images:
#     J = sum_labelled L(x,y) + sum_unlabelled U(x)                                          (eq. 8)
# L(x,y) does not contain q(y|x), yet that is the classifier we want. So it is given the labels too:
#     J^alpha = J + alpha * E_labelled[ -log q(y|x) ]                                        (eq. 9)
#
# WHAT ALPHA IS. The paper sets alpha = 0.1 * N without saying which N, and E_labelled is a mean
# over labelled points. The authors' code multiplies each labelled point's -log q(y|x), in the sum
# over the set, by 0.1 (N + M) / N. The two agree if the paper's N is the size of the WHOLE set,
# here N + M. Divide J^alpha by it and everything is per image, whatever the size of the set:
#     J^alpha / (N + M) = mean of the bound terms + a * mean_labelled[ -log q(y|x) ],
# a = alpha / (N + M). This a is our --alpha: 0.1 is the paper's. Reading N as the number of labels
# would make the classification loss (N + M) / N times weaker: 500 times for 100 of 50,000 images.
#
# SUMMING OVER y FOR LESS. Eq. 7 holds for any distribution over y. Take q(y|x), drop the labels to
# which it gives less than a threshold, and renormalise what is left to q~(y|x): U with q~ in place
# of q is again minus a lower bound on log p(x), by the formula above as tight as q~ is close to r.
# It costs one L(x,y) per label kept: once q(y|x) is sure of most images, little more than one.
# At threshold 0 it is U itself. The price: a label cut for x gets no say until q(y|x) changes.


class M2(nn.Module):
    """Generative semi-supervised model. x: [B, x_dim], y: [B] in 0..y_dim-1, z: [B, z_dim]."""

    def __init__(
        self,
        x_dim: int,
        y_dim: int,
        z_dim=50,
        hidden=(500, 500),
        likelihood="bernoulli",
        batch_norm=True,
        dropout=0.0,
        threshold=0.0,
    ):
        super().__init__()
        self.y_dim, self.threshold = y_dim, min(threshold, 0.5 / y_dim)  # never cut the largest
        self.outputs, self.log_density = LIKELIHOODS[likelihood]
        self.q_y = mlp(x_dim, *hidden, y_dim, dropout=dropout)
        # q(z|x,y) and p(x|y,z) take two inputs. Their first layer is linear in [x, one-hot(y)]:
        # W [x, one-hot(y)] = W_x x + (column y of W_y). So W_x is the first layer of an ordinary
        # MLP on x and W_y a table of K vectors, and W_x x is computed once for all labels of x.
        # The tables start with larger entries than W_x, so that y matters from the start.
        self.q_z = mlp(x_dim, *hidden, 2 * z_dim, batch_norm=batch_norm)
        self.q_z_y = nn.Embedding(y_dim, hidden[0])
        outputs = x_dim * self.outputs
        self.p_x = mlp(z_dim, *reversed(hidden), outputs, batch_norm=batch_norm)
        self.p_x_y = nn.Embedding(y_dim, hidden[-1])
        for table in (self.q_z_y, self.p_x_y):
            nn.init.normal_(table.weight, std=0.5)

    def log_q_y(self, x: Tensor) -> Tensor:
        """log q(y|x) for every y, [B, K]."""
        return F.log_softmax(self.q_y(x).float(), -1)

    def encode(self, x: Tensor, y: Tensor, i: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """mu and logvar of q(z|x_i,y) for P pairs: x [B, D], y [P], i [P] (see L) -> [P, Z]."""
        h = self.q_z[0](x)
        h = h if i is None else h.index_select(0, i)
        mu, logvar = self.q_z[1:](h + self.q_z_y(y).to(h.dtype)).float().chunk(2, -1)
        return mu, logvar

    def decode(self, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
        """Parameters of p(x|y,z), each [P, D]: the logits, or the mean and the log-variance."""
        h = self.p_x[0](z)
        return self.p_x[1:](h + self.p_x_y(y).to(h.dtype)).chunk(self.outputs, -1)

    def L(self, x: Tensor, y: Tensor, i: Tensor | None = None) -> Tensor:
        """Eq. 6 with one draw of z, [P], nats per pair: -L(x,y) <= log p(x,y) on average.

        Pair number p is (x[i[p]], y[p]): x [B, D], y [P], i [P]. Without i it is (x[p], y[p]).
        """
        mu, logvar = self.encode(x, y, i)
        z = sample_gaussian(mu, logvar)
        x = x if i is None else x.index_select(0, i)
        log_p_x = self.log_density(x, *self.decode(y, z))  # log p(x|y,z)
        log_p_y = -math.log(self.y_dim)  # log p(y), uniform: a constant
        return -(log_p_x + log_p_y - kl_gaussian(mu, logvar))

    def U(self, x: Tensor, log_q: Tensor | None = None, threshold: float | None = None) -> Tensor:
        """Eq. 7, [B], nats per image. log_q = log q(y|x), [B, K]; threshold as in the settings."""
        B, K = len(x), self.y_dim
        log_q = self.log_q_y(x) if log_q is None else log_q
        threshold = self.threshold if threshold is None else threshold
        keep = log_q.exp() >= threshold  # [B, K]; the largest is >= 1/K and stays
        log_q = log_q - (log_q.exp() * keep).sum(-1, keepdim=True).log()  # log q~(y|x)
        # List the kept pairs: number p is (x[i[p]], y[p]). All B * K are known without asking the
        # device; fewer are counted, and their list is repeated from its start up to a multiple of
        # B/2: CPU libraries prepare anew for every shape they meet, so let them meet few.
        n = B * K if threshold == 0 else int(keep.sum())
        P = n if threshold == 0 else math.ceil(2 * n / B) * math.ceil(B / 2)
        p = torch.arange(P, device=x.device)
        i, y = (p // K, p % K) if threshold == 0 else keep.nonzero()[p % n].unbind(1)
        log_q = log_q.flatten().index_select(0, i * K + y)  # [P]
        q = log_q.exp() * (p < n)  # the repeated pairs have weight 0
        terms = q * (self.L(x, y, i) + log_q)  # q~(y|x) [ L(x,y) + log q~(y|x) ]
        return torch.zeros(B, device=x.device).index_add(0, i, terms)  # sum over y

    def J_alpha(
        self,
        x_l: Tensor,
        y_l: Tensor,
        x_u: Tensor,
        labelled: float,
        alpha: float,
        ramp: float = 1.0,
    ) -> Tensor:
        """Eq. 8 and 9 per image of the whole set, estimated from a minibatch: a scalar, nats.

        labelled = N / (N + M). The N labelled images are few, so every minibatch takes many of
        them beside its unlabelled ones. The two means are weighed by their shares of the whole set,
        not of the minibatch, so this estimates J^alpha / (N + M). alpha is a of WHAT ALPHA IS; ramp
        multiplies U.
        """
        log_q = self.log_q_y(torch.cat([x_l, x_u]))  # together: one batch normalisation of q(y|x)
        log_q_l, log_q_u = log_q[: len(x_l)], log_q[len(x_l) :]
        J = labelled * self.L(x_l, y_l).mean()
        if len(x_u):
            J = J + (1 - labelled) * ramp * self.U(x_u, log_q_u).mean()
        return J + alpha * F.nll_loss(log_q_l, y_l)

    def objective(self, x_l, y_l, x_u, labelled: float, t: float, s) -> Tensor:
        """Training loss, a scalar in nats per image; t in [0, 1] is how much of training is done.

        The failure to avoid: q(y|x) soon fits the few labels and is certain everywhere, right or
        wrong. In eq. 7 it then sees only its own guess, and the generative model learns the wrong
        class from it. So U fades in from weight 0 to 1 while t goes from 0 to s["ramp"] (the
        labels speak first), dropout keeps q(y|x) from fitting them too closely, and an alpha larger
        than the paper's keeps the few labels from being outvoted by the many guesses. After the
        ramp the loss is J^alpha / (N + M). (At t = 0 the decoder has only L, with weight
        N / (N + M); Adam's steps do not depend on the scale of the loss.)
        """
        return self.J_alpha(x_l, y_l, x_u, labelled, s["alpha"], fade_in(t, s["ramp"]))

    def classify(self, x: Tensor) -> Tensor:
        """Scores of the K classes, [B, K]; the largest is the answer."""
        return self.log_q_y(x)

    def bound(self, x: Tensor) -> Tensor:
        """-U(x) over all labels, [B], nats per image: <= log p(x) on average over its draw of z."""
        return -self.U(x, threshold=0.0)


# =================================================================================================
# 5. M1+M2: M2 on M1's features (section 3.1.3)
# =================================================================================================
#
#     p(x, y, z1, z2) = p(y) p(z2) p(z1|y,z2) p(x|z1)
#     q(z1|x) from M1;  q(y|z1) and q(z2|z1,y) from M2
#
# Why stack? On pixels, M2's loss counts nats, and a digit's class is at most log 10 = 2.3 of the
# 100 or so that an image costs: how thick, slanted and placed the strokes are costs far more, and a
# flexible decoder can explain an image well under the wrong class. M1 first finds a few dozen
# features that explain the pixels; in those terms the class is a larger part of the story.
#
# The bound. With z1 and M1's q(z1|x), the derivation of eq. 5 reads
#     log p(x) >= E_q(z1|x)[ log p(x|z1) + log p(z1) - log q(z1|x) ],
# where p(z1) is now no longer N(0, I) but M2's sum_y p(y) integral p(z2) p(z1|y,z2) dz2, for which
# eq. 7 gives a bound, log p(z1) >= -U(z1). Hence
#     log p(x) >= E_q(z1|x)[ log p(x|z1) - U(z1) - log q(z1|x) ].
# Training is in two stages. M1 is trained with p(z1) = N(0, I) and then frozen: p(x|z1) and q(z1|x)
# no longer change, so raising this bound is lowering E_q(z1|x)[ U(z1) ]: M2, with a Gaussian
# p(z1|y,z2), on a fresh draw z1 ~ q(z1|x) at every visit of x. For labelled x, log p(x,y) has the
# same bound with -L(z1,y) <= log p(z1,y) in place of -U(z1).
# What two stages give up: the bound is still a bound, but no longer maximised over all parameters
# together; q(z1|x) was fitted to another prior and does not learn of the classes.
# M1 leaves some dimensions unused: their mean does not vary and q(z1_d|x) is close to N(0, 1). They
# keep N(0, 1) as a prior, a factor of p(z1) in the bound; M2 models only the active ones.


class M1M2(nn.Module):
    """The stack. m1 is frozen here; active: indices of the dimensions of z1 that m2 models."""

    def __init__(self, m1: M1, m2: M2, active: Tensor):
        super().__init__()
        self.m1, self.m2 = m1.requires_grad_(False), m2
        self.register_buffer("active", active)

    def train(self, mode: bool = True):
        """Training mode for m2 only: a frozen M1 must not update its batch statistics."""
        super().train(mode)
        self.m1.eval()
        return self

    def objective(self, x_l, y_l, x_u, labelled: float, t: float, s) -> Tensor:
        """M2.objective on z1 ~ q(z1|x). Nats of a density of z1, not to be compared with M2's."""
        z1 = sample_gaussian(*self.m1.encode(torch.cat([x_l, x_u])))[:, self.active]
        return self.m2.objective(z1[: len(x_l)], y_l, z1[len(x_l) :], labelled, t, s)

    def classify(self, x: Tensor) -> Tensor:
        """Scores of the K classes, [B, K]: q(y|z1) at the mean of q(z1|x), as in the paper."""
        return self.m2.classify(self.m1.encode(x)[0][:, self.active])

    def bound(self, x: Tensor) -> Tensor:
        """The bound on log p(x) derived above, [B], nats per image: one draw of z1 and of z2."""
        mu, logvar = self.m1.encode(x)
        z1 = sample_gaussian(mu, logvar)
        log_q_z1 = log_gaussian(z1, mu, logvar)
        unused = torch.ones_like(mu[0], dtype=torch.bool)
        unused[self.active] = False
        zeros = torch.zeros_like(z1[:, unused])
        log_p_z1 = self.m2.bound(z1[:, self.active]) + log_gaussian(z1[:, unused], zeros, zeros)
        return self.m1.log_p_x(x, z1) + log_p_z1 - log_q_z1


# =================================================================================================
# 6. CLASSIFIERS ON M1's FEATURES (section 2.1): the mean of q(z|x) stands for x
# =================================================================================================


class KNN(nn.Module):
    """k-nearest neighbours: the label most frequent among the k labelled z_l nearest to z."""

    def __init__(self, z_l: Tensor, y_l: Tensor, y_dim: int, k: int = 1):
        super().__init__()
        self.k = k
        self.register_buffer("z_l", z_l)
        self.register_buffer("votes", F.one_hot(y_l, y_dim).float())

    def forward(self, z: Tensor) -> Tensor:
        """Votes for the K classes, [B, Z] -> [B, K]."""
        nearest = torch.cdist(z, self.z_l).topk(self.k, largest=False).indices
        return self.votes[nearest].sum(1)


class TSVM(nn.Module):
    """Transductive support vector machine, one score f_k(z) a class, trained by gradient descent.

    Write t_k(y) = +1 if k = y, else -1. A support vector machine wants t_k(y) f_k(z) >= 1 for each
    class k against the rest, and pays for what is missing, here by its square:
        hinge(f(z), y) = sum_k max(0, 1 - t_k(y) f_k(z))^2.
    An unlabelled z has no y, so y is minimised over as well. The minimum is at y = argmax_k f_k(z)
    (y = j instead of k changes the hinge by g(f_j) - g(f_k), and the function
    g(f) = max(0, 1 - f)^2 - max(0, 1 + f)^2 decreases in f), which gradient steps hold fixed. This
    pushes the boundaries f_k = 0 to where there are few points. It has one foolish optimum: all
    points on one side. So the mean score of each class over the unlabelled points, whose classes
    are taken to be about equally many, is held near its mean over the class-balanced labelled
    ones. In all, with weights w of the scores:
        mean_labelled hinge(f(z), y)  +  r mean_unlabelled min_y hinge(f(z), y)
        + b sum_k ( mean_unlabelled f_k - mean_labelled f_k )^2  +  c/2 |w|^2,
    where r grows from 0 to 1 during the first half of training, since the first guesses are poor.

    The scores are linear in random Fourier features phi(z) = sqrt(2/R) cos(W z + u), W Gaussian
    with standard deviation 1/width, u uniform in [0, 2 pi]. In their products phi(z) . phi(z'),
    2 cos(a + u) cos(a' + u) = cos(a - a') + cos(a + a' + 2u), the last term averages out, and the
    mean of cos(W (z - z')) over W is exp(-|z - z'|^2 / (2 width^2)): the usual Gaussian kernel
    (Rahimi and Recht 2007).
    """

    def __init__(self, z_dim: int, y_dim: int, width: float = 1.0, features: int = 2000):
        super().__init__()
        self.register_buffer("W", torch.randn(z_dim, features) / width)
        self.register_buffer("u", 2 * math.pi * torch.rand(features))
        self.linear = nn.Linear(features, y_dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Scores f_k(z), [B, Z] -> [B, K]."""
        return self.linear(math.sqrt(2 / len(self.u)) * torch.cos(z @ self.W + self.u))

    def loss(self, z_l, y_l, z_u, r: float, b: float = 10.0, c: float = 1e-4) -> Tensor:
        """The sum above, a scalar."""

        def hinge(f, y):
            t = 2 * F.one_hot(y, f.shape[1]) - 1
            return F.relu(1 - t * f).square().sum(1).mean()

        f_l, f_u = self(z_l), self(z_u)
        balance = (f_u.mean(0) - f_l.mean(0)).square().sum()
        norm = self.linear.weight.square().sum()
        return hinge(f_l, y_l) + r * hinge(f_u, f_u.argmax(1)) + b * balance + c / 2 * norm


def fit_tsvm(
    z_l: Tensor, y_l: Tensor, z_u: Tensor, y_dim: int, steps=2000, batch_size=1000
) -> TSVM:
    """Train a TSVM on labelled features z_l [N, Z], y_l [N] and others, z_u [n, Z], without labels.

    The kernel's width is 0.57 of the median distance, by validation error, as are b and c of loss.
    """
    sample = z_u[torch.randperm(len(z_u), device=z_u.device)[:1000]]
    width = max(0.57 * torch.cdist(sample, sample).median().item(), 1e-3)
    svm = TSVM(z_l.shape[1], y_dim, width).to(z_l.device)
    optimizer = torch.optim.Adam(svm.linear.parameters())
    for step in range(steps):
        t = step / steps
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - t)
        l = torch.randint(len(z_l), (min(len(z_l), batch_size),), device=z_l.device)
        u = torch.randint(len(z_u), (batch_size,), device=z_u.device)
        loss = svm.loss(z_l[l], y_l[l], z_u[u], r=min(1.0, 2 * t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return svm


# =================================================================================================
# 7. DATA: MNIST, Fashion-MNIST, built-in glyphs or your own npz file
# =================================================================================================


class BadInput(Exception):
    """Something the user can mend. main() prints it as one line and exits with code 2."""


class Data(NamedTuple):
    """What training and evaluation see. Images: [n, D], uint8 in 0..255 or float in [0, 1]."""

    name: str
    shape: tuple[int, int, int]  # of an image: channels, height, width; D is their product
    y_dim: int  # K
    likelihood: str  # a key of LIKELIHOODS
    x_l: Tensor  # the N labelled training images ...
    y_l: Tensor  # ... and their labels
    x_u: Tensor  # the M unlabelled training images; their labels are not kept
    x_valid: Tensor
    y_valid: Tensor
    x_test: Tensor
    y_test: Tensor


def glyphs(n: int = 70_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """n digits from Pillow's bundled font, distorted at random: [n, 28, 28] uint8 and labels [n].

    Each has its own stroke width, affine map (rotation, scale, shear, shift), smooth elastic warp
    and pixel noise. 1-nearest-neighbour on 100 labelled images errs on 47 %, on 60,000 on 9 %.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(46)
    ink = torch.empty(3, 10, 1, 56, 56)  # [stroke, digit, 1, height, width]
    for stroke in range(3):
        for digit in range(10):
            image = Image.new("L", (56, 56))
            ImageDraw.Draw(image).text(
                (28, 28), str(digit), fill=255, font=font, anchor="mm", stroke_width=stroke
            )
            ink[stroke, digit, 0] = torch.from_numpy(np.array(image)) / 255
    g = torch.Generator().manual_seed(seed)
    x, y = [], torch.randint(10, (n,), generator=g)
    for digit in y.split(1000):
        B = len(digit)
        angle, shear, shift_x, shift_y = (2 * torch.rand(4, B, generator=g) - 1) * torch.tensor(
            [[0.25], [0.3], [0.1], [0.1]]
        )
        scale_x, scale_y = 0.8 + 0.35 * torch.rand(2, B, generator=g)
        cos, sin = angle.cos(), angle.sin()
        row_x = [scale_x * cos, shear * cos - scale_y * sin, shift_x]
        row_y = [scale_x * sin, shear * sin + scale_y * cos, shift_y]
        affine = torch.stack(row_x + row_y, -1).view(B, 2, 3)
        warp = F.interpolate(0.06 * torch.randn(B, 2, 5, 5, generator=g), (28, 28), mode="bicubic")
        grid = F.affine_grid(affine, [B, 1, 28, 28], align_corners=False) + warp.permute(0, 2, 3, 1)
        stroke = torch.randint(3, (B,), generator=g)
        image = F.grid_sample(ink[stroke, digit], grid, align_corners=False)[:, 0]
        image = image * (1 - 0.15 * torch.rand(B, 28, 28, generator=g))
        x.append((255 * image.clamp(0, 1)).to(torch.uint8))
    return torch.cat(x).numpy(), y.numpy()


def load_torchvision(dataset: str, data_dir: Path) -> list[np.ndarray]:
    """x_train, y_train, x_test, y_test of mnist or fashion, read from data_dir or downloaded there.

    Raises BadInput if the files are neither there nor to be had, or do not read as they should.
    """
    from torchvision import datasets  # here, since it takes a second to import

    kind = {"mnist": datasets.MNIST, "fashion": datasets.FashionMNIST}[dataset]
    raw = data_dir / kind.__name__ / "raw"
    was_there = [folder for folder in (raw, *raw.parents) if folder.exists()]
    try:
        sets = [kind(str(data_dir), train=train, download=True) for train in (True, False)]
    except Exception as error:  # torchvision raises of every kind here: network, format, disk
        for folder in (raw, *raw.parents):  # leave no empty folder behind
            if folder not in was_there and folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadInput(
            f"cannot read or download {dataset} in {data_dir} ({reason}): give --data-dir a folder "
            f"that holds {kind.__name__}/raw/ with the four idx files, or use --dataset glyphs"
        ) from error
    return [a for s in sets for a in (s.data.numpy(), s.targets.numpy())]


def load_npz(path: Path) -> list[np.ndarray]:
    """x_train, y_train, x_test, y_test of a user's own file. Raises BadInput if it is not one."""
    names = ["x_train", "y_train", "x_test", "y_test"]
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in names]
    except Exception as error:  # a zip, zlib, KeyError, pickle or OS error: all mean the same
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"cannot read {path} ({reason}): it must be an npz file with the arrays "
            f"{', '.join(names)}, without pickled objects"
        ) from error
    x_train, y_train, x_test, y_test = arrays
    for x, y, part in ((x_train, y_train, "train"), (x_test, y_test, "test")):
        if x.ndim not in (3, 4) or 0 in x.shape or x.shape[1:] != x_train.shape[1:]:
            raise BadInput(f"{path}: x_{part} has shape {x.shape}, not [n, H, W] or [n, H, W, C]")
        if x.dtype != np.uint8 and x.dtype.kind != "f":
            raise BadInput(f"{path}: x_{part} has type {x.dtype}, not uint8 or float")
        if x.dtype.kind == "f" and not (0 <= x.min() and x.max() <= 1):  # false for NaN too
            raise BadInput(f"{path}: x_{part} has values outside [0, 1]; scale it")
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu" or y.min() < 0:
            raise BadInput(f"{path}: y_{part} must be {len(x)} integers from 0, one an image")
    if len(x_train) < 6:
        raise BadInput(f"{path}: {len(x_train)} training images are too few")
    y_dim = int(y_train.max()) + 1
    if y_dim < 2 or y_test.max() >= y_dim or len(np.unique(y_train)) != y_dim:
        raise BadInput(f"{path}: the labels in y_train must be 0..K-1, each present, K >= 2")
    x_train, x_test = (
        x if x.dtype == np.uint8 else x.astype(np.float32) for x in (x_train, x_test)
    )
    return [x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64)]


def split(y: Tensor, n_labels: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the labelled, unlabelled and validation images among those labelled y: [n].

    Validation: a sixth (10,000 of 60,000) at random. Labelled: n_labels of the rest,
    equally many of each class. Raises BadInput if n_labels does not allow that.
    """
    K = int(y.max()) + 1
    if n_labels < K or n_labels % K:
        raise BadInput(f"--labels {n_labels}: give a multiple of {K}, the number of classes")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    valid, rest = order[: len(y) // 6], order[len(y) // 6 :]
    by_class = [rest[y[rest] == k] for k in range(K)]
    most = min(len(members) for members in by_class)
    if n_labels // K > most:
        raise BadInput(f"--labels {n_labels} is too many: at most {K * most} can be class-balanced")
    labelled = torch.cat([members[: n_labels // K] for members in by_class])
    unlabelled = rest[~torch.isin(rest, labelled)]  # in an order that does not depend on labels
    return labelled, unlabelled, valid


def load_data(dataset: str, data_dir: Path, n_labels: int, seed: int, device) -> Data:
    """Read a data set, split it by the seed and put it on the device. Raises BadInput."""
    if dataset.endswith(".npz"):
        name, arrays = Path(dataset).name, load_npz(Path(dataset))
    else:
        name = "mnist" if dataset == "auto" else dataset
        if name != "glyphs":
            try:
                arrays = load_torchvision(name, data_dir)
            except BadInput as error:
                if dataset != "auto":
                    raise
                print(f"ssvae: {error}\nssvae: going on with the built-in glyphs", file=sys.stderr)
                name = "glyphs"
        if name == "glyphs":
            x, y = glyphs()
            n = len(x) * 6 // 7  # 60,000 for training, 10,000 for the test
            arrays = [x[:n], y[:n], x[n:], y[n:]]

    x_train, y_train, x_test, y_test = map(torch.from_numpy, arrays)
    if x_train.ndim == 3:
        x_train, x_test = x_train[..., None], x_test[..., None]  # one channel
    shape = (x_train.shape[3], x_train.shape[1], x_train.shape[2])
    x_train, x_test = (x.permute(0, 3, 1, 2).flatten(1) for x in (x_train, x_test))  # [n, D]
    l, u, v = split(y_train, n_labels, seed)
    tensors = [x_train[l], y_train[l], x_train[u], x_train[v], y_train[v], x_test, y_test]
    likelihood = "bernoulli" if shape[0] == 1 else "gaussian"
    y_dim = int(y_train.max()) + 1
    return Data(name, shape, y_dim, likelihood, *(tensor.to(device) for tensor in tensors))


def pixels(images: Tensor) -> Tensor:
    """Stored images as float32 in [0, 1]."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def observe(images: Tensor, likelihood: str) -> Tensor:
    """Draw the x that the models see from stored images: [B, D] -> [B, D] float32.

    Bernoulli: a grey pixel is read as the probability that the pixel is on, and binary images are
    drawn from it, afresh at every visit. So the bound is one on the log probability of a binary
    image, and every epoch sees other ones.
    Gaussian: a stored value stands for an interval of width 1/256, and x is drawn uniformly from
    it. A density could otherwise grow without limit on values that repeat exactly.
    """
    x = pixels(images)
    u = torch.rand_like(x)
    return (u < x).float() if likelihood == "bernoulli" else (255 * x + u) / 256


# =================================================================================================
# 8. TRAINING: one loop for all three models
# =================================================================================================


class Diverged(Exception):
    """A loss became NaN or infinite. main() prints it as one line and exits with code 1."""


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices natively: GPUs since 2020, CPUs with AMX.

    There a matrix product takes a fourth to a tenth of the time. bfloat16 has float32's range with
    8 bits of precision: enough for activations and their gradients, so only those are rounded;
    weights, Adam's moments, log-densities and sums stay float32. Decided by features, not by a
    timing, so that a run on the same CPU always computes the same.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return device.type == "cpu" and bool(capabilities.get("amx_bf16"))


def train(model: nn.Module, data: Data, s: dict, run: "Run", classify=None) -> None:
    """Minimise model.objective with Adam, by the settings s; one row in the log per epoch.

    Everything stays on the device and, on an accelerator, nothing waits for it inside an epoch.
    classify: scores for the validation error, model.classify by default.
    """
    N, M, device = len(data.x_l), len(data.x_u), data.x_l.device
    n_l = min(N, s.get("batch_labelled", 0))  # labelled images in a minibatch
    n_u = min(M, s["batch_size"])  # unlabelled images in it
    # An epoch sees all unlabelled images (but for a last, smaller minibatch) and all labelled ones.
    steps = max(M // n_u if M else 0, math.ceil(N / n_l) if N else 0)
    rounds = math.ceil(steps * n_u / M) if M else 0
    optimizer = torch.optim.Adam(
        model.parameters(), lr=s["lr"], fused=device.type in ("cpu", "cuda")
    )
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_faster(device))
    for epoch in range(run.restore(model, optimizer), s["epochs"]):
        # Every epoch has its own random numbers, so a resumed run needs no record of their state.
        torch.manual_seed((run.settings["seed"] * 1_000_003 + epoch) % 2**63)
        model.train()
        order = [torch.randperm(M, device=device) for _ in range(rounds)]
        order = torch.cat(order) if rounds else torch.zeros(0, dtype=torch.long, device=device)
        losses = torch.zeros(steps, device=device)
        start = time.perf_counter()
        for step in range(steps):
            t = (epoch * steps + step) / (s["epochs"] * steps)
            optimizer.param_groups[0]["lr"] = s["lr"] * (1 - t)
            l = torch.randperm(N, device=device)[:n_l]
            u = order[step * n_u : (step + 1) * n_u]
            with bf16:
                x_l = observe(data.x_l[l], data.likelihood)
                x_u = observe(data.x_u[u], data.likelihood)
                loss = model.objective(x_l, data.y_l[l], x_u, N / (N + M), t, s)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            # Looking at a loss makes the host wait for the device: on a GPU, do it once an epoch.
            if device.type == "cpu" or step + 1 == steps:
                bad = (~losses[: step + 1].isfinite()).nonzero()
                if len(bad):
                    raise Diverged(
                        f"the loss became infinite or NaN in epoch {epoch + 1}, step "
                        f"{bad[0, 0] + 1}; try a learning rate below {s['lr']:g}, with --overwrite"
                    )
            run.tick(epoch, (step + 1) / steps)
        seconds = time.perf_counter() - start
        model.eval()
        row = {
            "epoch": epoch + 1,
            "loss": losses.mean().item(),
            "bound": mean_bound(model, data.x_valid[:1000], data.likelihood),
            "valid_error": error_rate(classify or model.classify, data.x_valid, data.y_valid),
            "images_per_second": steps * (n_u or n_l) / seconds,
            "seconds": seconds,
        }
        run.end_epoch(row, model, optimizer)
    model.eval()


# =================================================================================================
# 9. EVALUATION
# =================================================================================================


@torch.no_grad()
def error_rate(classify, images: Tensor, y: Tensor) -> float:
    """Percentage of images whose largest score is not that of y.

    Pixels go in as stored, which for binary images is the mean of the draws that training saw.
    """
    scores = [classify(pixels(chunk)) for chunk in images.split(1000)]
    return 100 * (torch.cat(scores).argmax(1) != y).float().mean().item()


@torch.no_grad()
def mean_bound(model: nn.Module, images: Tensor, likelihood: str) -> float:
    """Mean of model.bound, nats per image. Draws x and z from a fixed seed, so calls compare."""
    torch.manual_seed(0)
    bounds = [model.bound(observe(chunk, likelihood)) for chunk in images.split(1000)]
    return torch.cat(bounds).mean().item()


@torch.no_grad()
def features(m1: M1, images: Tensor) -> Tensor:
    """Mean of q(z|x) of every image, [n, Z]."""
    return torch.cat([m1.encode(pixels(chunk))[0] for chunk in images.split(1000)])


def active_dimensions(m1: M1, images: Tensor) -> Tensor:
    """Indices of the z_d whose mean varies over the images: std > 0.1, as the authors have it."""
    std = features(m1, images).std(0)
    return (std >= min(0.1, std.max() / 2)).nonzero().squeeze(1)  # never none


# =================================================================================================
# 10. THE COMMAND LINE and what a run writes
# =================================================================================================


def write_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under another name first, then renamed. Raises BadInput."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:  # a full disk, no permission, ...
        beside.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path} ({error.strerror}); try another --out-dir") from error


def save_torch(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def load_torch(path: Path, keys: set[str], device) -> dict:
    """Read what save_torch wrote, running no code from the file. Raises BadInput."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # missing, truncated, foreign or malicious: torch raises many kinds
        reason = str(error).strip().split("\n")[0][:150]
        raise BadInput(
            f"cannot read {path} ({reason}): is it a file written by ssvae.py?"
        ) from error
    if not isinstance(content, dict) or not keys <= set(content):
        raise BadInput(f"{path} was not written by this version of ssvae.py")
    return content


CHECKPOINT_KEYS = {"settings", "stage", "epoch", "model", "optimizer", "rows", "seconds"}


class Run:
    """A run's folder, progress lines and log; with saved, a checkpoint, it goes on from there."""

    def __init__(self, folder: Path, settings: dict, saved: dict | None):
        self.folder, self.settings, self.saved = folder, settings, saved
        self.rows = saved["rows"] if saved else []
        self.start = time.perf_counter() - (saved["seconds"] if saved else 0)
        self.stage, self.epochs, self.last_tick = "", 0, 0.0

    def begin(self, stage: str, epochs: int) -> None:
        """The next rows belong to this stage: "m1", "m2" or, for the stack's second, "m1+m2"."""
        self.stage, self.epochs, self.stage_start = stage, epochs, time.perf_counter()
        self.first_epoch = 0

    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def restore(self, model: nn.Module, optimizer) -> int:
        """Go on from the checkpoint if it is of this stage. Returns the number of epochs done."""
        if self.saved and self.saved["stage"] == self.stage:
            model.load_state_dict(self.saved["model"])
            optimizer.load_state_dict(self.saved["optimizer"])
            self.first_epoch = self.saved["epoch"]
        return self.first_epoch

    def left(self, done: float) -> str:
        """Time left in this stage after so many of its epochs, as minutes:seconds."""
        elapsed = time.perf_counter() - self.stage_start
        left = int(elapsed * (self.epochs - done) / max(done - self.first_epoch, 1e-9))
        return f"{left // 60}:{left % 60:02d} left"

    def tick(self, epoch: int, fraction: float) -> None:
        """In a terminal, a line that is overwritten a few times a second."""
        if sys.stdout.isatty() and time.perf_counter() - self.last_tick > 0.2:
            self.last_tick = time.perf_counter()
            line = f"{self.stage} epoch {epoch + 1}/{self.epochs} {fraction:4.0%}"
            print(f"\r{line}  {self.left(epoch + fraction)}\x1b[K", end="", flush=True)

    def end_epoch(self, row: dict, model: nn.Module, optimizer) -> None:
        """Save a checkpoint, all that the next epoch depends on; then log the row and print it."""
        self.rows.append({"stage": self.stage, **row})
        content = {
            "settings": self.settings,
            "stage": self.stage,
            "epoch": row["epoch"],
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rows": self.rows,
            "seconds": self.seconds(),
        }
        save_torch(self.folder / "checkpoint.pt", content)
        self.write_log()
        print(
            ("\r\x1b[K" if sys.stdout.isatty() else "")
            + f"{self.stage} epoch {row['epoch']}/{self.epochs}  bound {row['bound']:.2f} nats  "
            f"valid error {row['valid_error']:.2f} %  {row['images_per_second']:,.0f} images/s  "
            f"{self.left(row['epoch'])}",
            flush=True,
        )

    def write_log(self) -> None:
        """log.csv, from all rows: one an epoch."""
        if not self.rows:  # --m1 FILE --model m1 trains nothing
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, self.rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_file(self.folder / "log.csv", text.getvalue().encode())


def number(kind, low, low_allowed=True):
    """An argparse type: a finite number of this kind, from low up."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value < math.inf) or (value == low and not low_allowed):
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__} {'from' if low_allowed else 'above'} {low}"  # for messages
    return parse


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    count, positive = number(int, 1), number(float, 0, low_allowed=False)
    parser = Parser(
        prog="ssvae.py",
        description="Semi-supervised learning with deep generative models: M1, M2 and M1+M2.",
        epilog="Settings not given here are in the table SETTINGS at the top of ssvae.py.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", choices=SETTINGS, default="m2", help="default: m2")
    add(
        "--dataset",
        default="auto",
        help="mnist, fashion, glyphs (built in), a file PATH.npz with x_train, y_train, x_test, "
        "y_test, or auto (default): mnist, and glyphs where it cannot be had",
    )
    add("--labels", type=count, default=100, help="N, the number of labelled images (100)")
    add("--epochs", type=count, help="epochs of training; for m1+m2, of its M2 stage")
    add("--batch-size", type=count, help="unlabelled images in a minibatch; as --epochs")
    add("--lr", type=positive, help="Adam's first step size, falls linearly to 0; as --epochs")
    add("--alpha", type=number(float, 0), help="weight of the classification loss (eq. 9)")
    add("--m1-epochs", type=count, help="for m1+m2: epochs of its M1 stage")
    add("--m1", type=Path, metavar="FILE", help="model.pt of an M1 to use instead of training one")
    add("--classifier", choices=["tsvm", "knn"], help="for m1: on its features (default: tsvm)")
    add("--seed", type=number(int, 0), default=0, help="draws splits, weights and noise (0)")
    add("--device", default="auto", help="auto (an accelerator if there is one), cpu, cuda, ...")
    data_dir = os.environ.get("SSVAE_DATA_DIR") or "data"
    add("--data-dir", type=Path, default=Path(data_dir), help="default: $SSVAE_DATA_DIR or data")
    add("--out-dir", type=Path, help="default: runs/<model>-<dataset>-<N>-<seed>")
    add("--resume", action="store_true", help="go on with the run if it was interrupted")
    add("--overwrite", action="store_true", help="train afresh where a run is already")
    args = parser.parse_args(argv)

    known = ("auto", "mnist", "fashion", "glyphs")
    if args.dataset not in known and not args.dataset.endswith(".npz"):
        raise BadInput(f"--dataset {args.dataset}: choose {', '.join(known)} or a file PATH.npz")
    only = {
        "alpha": ("m2", "m1+m2"),
        "m1_epochs": ("m1+m2",),
        "m1": ("m1", "m1+m2"),
        "classifier": ("m1",),
    }
    for name, models in only.items():
        if getattr(args, name) is not None and args.model not in models:
            option = "--" + name.replace("_", "-")
            raise BadInput(
                f"{option} has no meaning for {args.model}, only for {' and '.join(models)}"
            )
    if args.m1 and args.m1_epochs:
        raise BadInput("--m1 gives a trained M1, so --m1-epochs has no meaning; drop one of them")
    if args.m1 and args.model == "m1" and (args.epochs or args.batch_size or args.lr):
        raise BadInput("--m1 gives a trained M1; drop --epochs, --batch-size and --lr")
    if args.resume and args.overwrite:
        raise BadInput("--resume and --overwrite contradict each other; drop one of them")
    if args.seed >= 2**63:
        raise BadInput("--seed must be below 2**63")
    return args


def pick_device(name: str) -> torch.device:
    """The torch.device of that name, tried out. Raises BadInput."""
    try:
        if name == "auto":
            found = torch.accelerator.current_accelerator(check_available=True)
            name = found.type if found else "cpu"
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
        return device
    except Exception as error:  # no such device, no driver, no memory: torch raises many kinds
        reason = str(error).strip().split("\n")[0][:100]
        raise BadInput(f"--device {name} cannot be used here ({reason}); try cpu") from error


def load_m1(path: Path, data: Data, s: dict, device) -> M1:
    """The M1 in a model.pt, if it fits the data. Raises BadInput.

    An M1 of another seed has seen, without labels, images that are validation images here.
    """
    saved = load_torch(path, {"settings", "model", "classifier"}, device)
    m1 = M1(math.prod(data.shape), s["z_dim"], s["hidden"], data.likelihood).to(device)
    if saved["settings"].get("model") != "m1":
        raise BadInput(f"--m1 {path} holds {saved['settings'].get('model')}, not m1")
    if saved["settings"].get("dataset") != data.name:
        raise BadInput(
            f"--m1 {path} was trained on {saved['settings'].get('dataset')}, not {data.name}"
        )
    try:
        m1.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise BadInput(f"--m1 {path} does not fit this model and data") from error
    return m1.eval()


def fingerprint(path: str | Path) -> str:
    """A file's full name and the checksum of its content."""
    return f"{Path(path).resolve()} (crc32 {zlib.crc32(Path(path).read_bytes()):08x})"


def summary(results: dict) -> str:
    """The run's last line."""
    paper = PAPER[results["model"]].get(results["labels"])
    if results["dataset"] != "mnist" or results.get("classifier") == "knn":
        paper = None  # not what the paper's table is about
    return (
        f"{results['model']}, {results['dataset']}, N = {results['labels']}, "
        f"seed {results['seed']}: test error {results['test_error']:.2f} %"
        + (f" (the paper: {paper[0]:.2f} +- {paper[1]:.2f})" if paper else "")
        + f", bound {results['bound']:.2f} nats, {results['seconds']:.0f} s"
    )


def main(argv: list[str] | None = None) -> int:
    """Train and evaluate one model as the command line says. Returns the exit code."""
    try:
        return train_and_evaluate(parse_arguments(argv))
    except BadInput as error:
        print(f"ssvae: {error}", file=sys.stderr)
        return 2
    except Diverged as error:
        print(f"ssvae: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"ssvae: {str(error)[:150]}; try a smaller --batch-size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        argv = [a for a in (sys.argv[1:] if argv is None else argv) if a != "--overwrite"]
        again = shlex.join(["python", sys.argv[0], *argv, *["--resume"][: "--resume" not in argv]])
        print(f"\nssvae: interrupted; go on with: {again}", file=sys.stderr)
        return 130


def find_run(folder: Path, settings: dict, args, device) -> tuple[dict | None, dict | None]:
    """(results of a finished run, checkpoint of an unfinished one) in the folder, None where none.

    Raises BadInput rather than let a run that is there be lost: where its settings are others, or
    it is unfinished and --resume is not given.
    """
    if args.overwrite:
        return None, None
    try:
        if (folder / "results.json").exists():
            results = json.loads((folder / "results.json").read_text())
            if all(results.get(key) == value for key, value in settings.items()):
                return results, None
            raise BadInput(f"{folder} holds another run; give another --out-dir or --overwrite")
        if not (folder / "checkpoint.pt").exists():
            return None, None
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(f"cannot read {folder} ({error}); give another --out-dir") from error
    if not args.resume:
        raise BadInput(f"{folder} holds an unfinished run; go on with --resume or --overwrite")
    saved = load_torch(folder / "checkpoint.pt", CHECKPOINT_KEYS, device)
    for key, value in settings.items():
        if saved["settings"].get(key) != value:
            was = saved["settings"].get(key)
            raise BadInput(f"--resume: {folder} was begun with {key} {was}, not {value}")
    return None, saved


def train_and_evaluate(args: argparse.Namespace) -> int:
    """What main() does when the command line is good."""
    device = pick_device(args.device)
    data = load_data(args.dataset, args.data_dir, args.labels, args.seed, device)
    x_dim = math.prod(data.shape)

    # The settings s are the table's, unless the command line says otherwise. All that a result
    # depends on goes into settings, which go into every file and tell one run from another.
    s = SETTINGS[args.model] | OVERRIDES.get(data.name, {}).get(args.model, {})
    for name in ("epochs", "batch_size", "lr", "alpha"):
        if getattr(args, name) is not None:
            s[name] = getattr(args, name)
    if device.type != "cpu" and "threshold" in s:
        s["threshold"] = 0.0  # counting the kept pairs would make the host wait at every step
    s_m1 = SETTINGS["m1"] | OVERRIDES.get(data.name, {}).get("m1", {})
    s_m1 = s if args.model == "m1" else s_m1
    s_m1["epochs"] = args.m1_epochs or s_m1["epochs"]
    m1 = load_m1(args.m1, data, s_m1, device) if args.m1 else None
    settings = {
        "model": args.model,
        "dataset": data.name,
        "file": fingerprint(args.dataset) if data.name.endswith(".npz") else None,
        "labels": args.labels,
        "seed": args.seed,
        "device": device.type,
        "m1": fingerprint(args.m1) if args.m1 else None,
        "alpha": None,
        **s,
    }
    if args.model == "m1":
        settings["classifier"] = args.classifier or "tsvm"
    if args.model == "m1+m2" and not args.m1:
        settings |= {"m1_" + name: value for name, value in s_m1.items()}
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will in the files

    # What is in the folder already?
    name = f"{args.model}-{data.name}-{args.labels}-{args.seed}"
    folder = args.out_dir or Path("runs") / name
    results, saved = find_run(folder, settings, args, device)
    if results:
        print(summary(results))
        print(f"This run is finished, in {folder}; --overwrite trains it afresh.")
        return 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if args.overwrite:
            for name in ("results.json", "checkpoint.pt", "model.pt", "log.csv"):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(
            f"cannot make {folder} ({error.strerror}); give another --out-dir"
        ) from error

    # Train: M1 where the model has one, then M1's classifier or M2.
    run = Run(folder, settings, saved)
    if args.model != "m2":
        images = torch.cat([data.x_l, data.x_u])
        if m1 is None:
            torch.manual_seed(args.seed)
            m1 = M1(x_dim, s_m1["z_dim"], s_m1["hidden"], data.likelihood).to(device)
            no_labels = data._replace(x_l=images[:0], y_l=data.y_l[:0], x_u=images)

            def nearest(x):  # needs no training: for the progress lines
                z_l = m1.encode(pixels(data.x_l))[0]
                return KNN(z_l, data.y_l, data.y_dim)(m1.encode(x)[0])

            run.begin("m1", s_m1["epochs"])
            if not (saved and saved["stage"] == "m1+m2"):
                train(m1, no_labels, s_m1, run, nearest)
    if args.model == "m1":
        torch.manual_seed(args.seed)
        z_l, z_u = features(m1, data.x_l), features(m1, images)
        if settings["classifier"] == "knn":
            classifier = KNN(z_l, data.y_l, data.y_dim)
        else:
            classifier = fit_tsvm(z_l, data.y_l, z_u, data.y_dim)
        model, classify = m1, lambda x: classifier(m1.encode(x)[0])
    else:
        likelihood, m2_dim = data.likelihood, x_dim
        if args.model == "m1+m2":
            resumed = saved and saved["stage"] == "m1+m2"
            active = saved["model"]["active"] if resumed else active_dimensions(m1, images)
            likelihood, m2_dim = "gaussian", len(active)
        torch.manual_seed(args.seed)
        m2 = M2(
            m2_dim,
            data.y_dim,
            s["z_dim"],
            s["hidden"],
            likelihood,
            s["batch_norm"],
            s["dropout"],
            s["threshold"],
        )
        model = (m2 if args.model == "m2" else M1M2(m1, m2, active)).to(device)
        run.begin(args.model, s["epochs"])
        train(model, data, s, run)
        classify = model.classify

    # Evaluate. This is the only place where the test set is read.
    results = {
        **settings,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "images_per_second": run.rows[-1]["images_per_second"] if run.rows else None,
        "valid_error": error_rate(classify, data.x_valid, data.y_valid),
        "test_error": error_rate(classify, data.x_test, data.y_test),
        "bound": mean_bound(model, data.x_test, data.likelihood),
        "seconds": run.seconds(),
    }
    weights = {"settings": settings, "model": model.state_dict()}
    if args.model == "m1":
        weights["classifier"] = classifier.state_dict()
    run.write_log()
    save_torch(folder / "model.pt", weights)
    write_file(folder / "results.json", json.dumps(results, indent=2).encode())
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    print(summary(results))
    print(f"Written to {folder}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
