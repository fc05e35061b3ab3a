"""The losses as plain differentiable PyTorch, from their formulas: what the tests compare with, in float64."""

import torch


def lse(a):
    return -torch.logsumexp(-a, 1).sum()


def var(a, eps=1e-6):
    return -torch.log(a.var(0) + eps).sum()


def tc(a):
    centred = a - a.mean(0)
    covariance = centred.T @ centred / (len(a) - 1)
    deviation = a.std(0) + 1e-8
    correlation = covariance / deviation / deviation[:, None]
    return (correlation * (1 - torch.eye(a.shape[1], dtype=a.dtype))).square().sum()


def wr(W):
    unit = W / (W.norm(dim=1, keepdim=True) + 1e-8)
    return (unit @ unit.T - torch.eye(len(W), dtype=W.dtype)).square().sum()


def total(a, W, lambda_lse=1.0, lambda_var=1.0, lambda_tc=1.0, lambda_wr=0.0, variance_eps=1e-6):
    return lambda_lse * lse(a) + lambda_var * var(a, variance_eps) + lambda_tc * tc(a) + lambda_wr * wr(W)


def gradients(loss, *tensors):
    """The value of a loss and its gradients, in float64 at the tensors' values."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    value = loss(*wide)
    return value.detach(), torch.autograd.grad(value, wide, allow_unused=True)
