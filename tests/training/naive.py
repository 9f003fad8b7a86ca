"""Losses as the papers write them, dense and through autograd, in float64: what the trainer's own gradients are held against."""

import torch


def variance(rows):
    return ((rows - rows.mean(0)) ** 2).sum()


def top_k_loss(weights, x, *, k, dead=None, aux_k=0, aux_coefficient=0.0, batch=False):
    """The loss of TopK or BatchTopK, with that for dead latents; `weights` are leaves."""
    u = x - weights["b_dec"]
    pre = u @ weights["W_enc"].T + weights["b_enc"]
    if batch:
        order = pre.flatten().argsort(descending=True)[: k * len(x)]
        mask = torch.zeros(pre.numel(), dtype=torch.bool)
        mask[order] = True
        mask = mask.view_as(pre)
    else:
        mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(
            1, pre.argsort(dim=1, descending=True)[:, :k], True
        )
    z = torch.where(mask, pre.relu(), 0.0)
    x_hat = z @ weights["W_dec"] + weights["b_dec"]
    loss = ((x - x_hat) ** 2).sum() / variance(x)
    if dead is not None and len(dead):
        e = (x - x_hat).detach()
        of_dead = pre[:, dead]
        kept = min(aux_k, len(dead))
        chosen = of_dead.argsort(dim=1, descending=True)[:, :kept]
        z_aux = torch.zeros_like(of_dead).scatter(1, chosen, of_dead.gather(1, chosen).relu())
        e_hat = z_aux @ weights["W_dec"][dead]
        factor = aux_coefficient * min(len(dead) / aux_k, 1.0)
        loss = loss + factor * ((e - e_hat) ** 2).sum() / variance(e)
    return loss, z


class Step(torch.autograd.Function):
    """Heaviside of pre - threshold, with the paper's pseudo-derivative by the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        inside = (((pre - threshold) / ctx.bandwidth).abs() < 0.5).to(pre.dtype)
        return None, -(inside / ctx.bandwidth * grad).sum(0), None


class JumpReLU(torch.autograd.Function):
    """pre * Heaviside(pre - threshold), with the paper's pseudo-derivative by the threshold."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        inside = (((pre - threshold) / ctx.bandwidth).abs() < 0.5).to(pre.dtype)
        return (pre > threshold) * grad, -(threshold / ctx.bandwidth * inside * grad).sum(0), None


def jumprelu_loss(weights, x, *, k, bandwidth, coefficient):
    """The loss of JumpReLU with a target of L0, after the paper's pseudo-code."""
    pre = ((x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]).relu()
    threshold = weights["log_threshold"].exp()
    z = JumpReLU.apply(pre, threshold, bandwidth)
    x_hat = z @ weights["W_dec"] + weights["b_dec"]
    l0 = Step.apply(pre, threshold, bandwidth).sum(1).mean()
    return ((x - x_hat) ** 2).sum() / variance(x) + coefficient * (l0 / k - 1) ** 2, z
