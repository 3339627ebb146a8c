# SPDX-License-Identifier: Apache-2.0
"""The index branch and its initialisations; training.py goes on from them."""

import torch

from model import rotate


class Index:
    """wq [L][Hkv * Di, hidden], wk [L][Di, hidden]. Di is a multiple of D: each D get the model's RoPE."""

    def __init__(self, model, wq, wk):
        self.model, self.wq, self.wk = model, wq, wk

    def project(self, layer, xs, start=0):
        """xs [T, hidden] -> q_idx [Hkv, T - start, Di], k_idx [T, Di], both rotated."""
        cos, sin = self.model.rope_tables(0, len(xs))
        d = self.wk[layer].shape[0]
        n = d // self.model.d
        q = (
            (xs[start:] @ self.wq[layer].T)
            .view(len(xs) - start, self.model.kv, n, self.model.d)
            .permute(1, 2, 0, 3)
        )
        k = (xs @ self.wk[layer].T).view(len(xs), n, self.model.d).transpose(0, 1)
        q, k = rotate(q, cos[start:], sin[start:]), rotate(k, cos, sin)
        return q.transpose(1, 2).reshape(self.model.kv, len(xs) - start, d), k.transpose(0, 1).reshape(
            len(xs), d
        )


def complex_rows(weight, heads, d):
    """[heads * D, hidden] -> [heads, D/2, hidden] complex: pair (i, i + D/2) is one number."""
    w = weight.view(heads, 2, d // 2, -1)
    return torch.complex(w[:, 0], w[:, 1])


def real_rows(z):
    """[..., D/2, hidden] complex -> [prod * D, hidden]"""
    return torch.cat([z.real, z.imag], -2).reshape(-1, z.shape[-1])


def random_index(model, seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(rows):
        return [
            torch.randn(rows, model.hidden, generator=g) * model.hidden**-0.5 for _ in range(model.layers)
        ]

    return Index(model, draw(model.kv * model.d), draw(model.d))


def mean_index(model):
    wq, wk = [], []
    for layer in range(model.layers):
        q = model.weight(layer, "self_attn.q_proj").view(model.kv, model.group, model.d, -1)
        k = model.weight(layer, "self_attn.k_proj").view(model.kv, model.d, -1)
        wq.append(q.mean(1).reshape(-1, model.hidden).clone())
        wk.append(k.mean(0).clone())
    return Index(model, wq, wk)


def closed_form_index(model, moments, width=1, weighting="mean"):
    """The leading eigenvectors a rotary frequency.

    moments[layer] = E[x x^T] [hidden, hidden] of the layer's normalised input over calibration text: all
    covariances that the method needs are products of it with the weights.
    weighting: "mean" weighs kv head r by the energy of its group-mean query, "sum" by the mean energy of its
    heads' queries, "none" by 1.
    """
    wq, wk = [], []
    for layer in range(model.layers):
        m = moments[layer].to(torch.complex64)
        q = complex_rows(model.weight(layer, "self_attn.q_proj"), model.heads, model.d)
        k = complex_rows(model.weight(layer, "self_attn.k_proj"), model.kv, model.d)
        q = q.view(model.kv, model.group, model.d // 2, -1)
        q_mean = q.mean(1)
        if weighting == "mean":
            energy = torch.einsum("rih,hg,rig->ri", q_mean, m, q_mean.conj()).real
        elif weighting == "sum":
            energy = torch.einsum("raih,hg,raig->ri", q, m, q.conj()).real / model.group
        else:
            energy = torch.ones(model.kv, model.d // 2)
        weight = energy.clamp_min(1e-12).sqrt()
        u = k * weight[..., None]
        covariance = torch.einsum("rih,hg,sig->irs", u, m, u.conj())
        _, vectors = torch.linalg.eigh(covariance)
        qs, ks = [], []
        for n in range(width):
            v = vectors[:, :, -1 - n]  # [D/2, Hkv]
            ks.append(torch.einsum("ir,rih->ih", v.conj(), u))
            qs.append(q_mean * (v.T.conj() / weight)[..., None])
        wk.append(real_rows(torch.stack(ks)))
        wq.append(real_rows(torch.stack(qs, 1)))
    return Index(model, wq, wk)
