"""dLLM-Cache (arXiv 2506.06295, github.com/maomaocun/dLLM-cache): features of every layer, refreshed bit by bit.

Every step runs all T rows through every layer; a row that a layer does not refresh takes that layer's cached
attention and MLP outputs.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .model import attention, rms_norm, rope


@dataclass
class Features:
    """What one stream keeps of each layer.

    k (rotated), v: [n_layers, T, n_kv_heads, head_dim]; a, f: outputs of attention and of the MLP before they are
    added to the residual stream, [n_layers, T, d]. Entries start as NaN: reading one that was never written shows.
    """

    k: torch.Tensor
    v: torch.Tensor
    a: torch.Tensor
    f: torch.Tensor
    evaluations: int = 0

    @classmethod
    def of(cls, model, length):
        kv = model.new_cache(length)
        out = torch.full((model.shape.n_layers, length, model.shape.d_model), torch.nan, dtype=model.dtype)
        return cls(kv.k, kv.v, out, out.clone())


def least_similar(new, old, n, decisions):
    """Indices of the n rows with the lowest cos(new, old), ascending; ties: lowest first. new, old [R, kv width].

    Rows that did not change tie; torch gives them other last bits where it computes another number of rows, hence the
    rounding.
    """
    new, old = new.double(), old.double()
    cosine = (new * old).sum(-1) / (new.norm(dim=-1) * old.norm(dim=-1))
    cosine = cosine.round(decimals=12).tolist()
    order = sorted(range(len(cosine)), key=lambda i: (cosine[i], i))
    if 0 < n < len(order) and cosine[order[n]] > cosine[order[n - 1]]:
        decisions.note("verify", cosine[order[n]] - cosine[order[n - 1]])
    return sorted(order[:n])


@torch.no_grad()
def forward(model, tokens, features, response, o, decisions):
    """Evaluate tokens (int64 [T]) and update the features in place.

    response: editable positions, ascending; the others are the prompt.
    Returns (final-norm hidden states [T, d], the positions that some layer refreshed).
    """
    s = model.shape
    length = len(tokens)
    prompt = [i for i in range(length) if i not in set(response)]
    t = features.evaluations
    features.evaluations += 1
    touched = set()
    x = model.embed[tokens]
    for layer, w in enumerate(model.layers):
        n = rms_norm(x, w["attn_norm"], s.eps)

        def project(part, rows, width, w=w, n=n):
            """Linear map of some rows of n, by heads: [len(rows), width, head_dim]."""
            return model.linear(n[rows], w[part], w[part + "_bias"]).view(len(rows), width, s.head_dim)

        always = layer in o.always_refresh_layers
        refreshed = []
        if always or t % o.kp == 0:
            refreshed += prompt
        if always or t % o.kr == 0:
            refreshed += response
        elif o.rou > 0:
            v = project("v", response, s.n_kv_heads)
            number = int(o.rou * len(response))  # perhaps none: V of all is replaced even so
            picked = least_similar(v.flatten(1), features.v[layer, response].flatten(1), number, decisions)
            features.v[layer, response] = v
            refreshed += [response[i] for i in picked]
        rows = sorted(refreshed)
        touched |= set(rows)

        if rows:
            at = torch.tensor(rows)
            q = rope(project("q", rows, s.n_heads), at, s.theta, s.rope_full_precision)
            k = rope(project("k", rows, s.n_kv_heads), at, s.theta, s.rope_full_precision)
            features.k[layer, rows] = k
            features.v[layer, rows] = project("v", rows, s.n_kv_heads)
            mixed = attention(q, features.k[layer], features.v[layer])
            features.a[layer, rows] = model.linear(mixed.flatten(1), w["o"])
        x = x + features.a[layer]
        if rows:
            m = rms_norm(x[rows], w["mlp_norm"], s.eps)
            inner = F.silu(model.linear(m, w["gate"])) * model.linear(m, w["up"])
            features.f[layer, rows] = model.linear(inner, w["down"])
        x = x + features.f[layer]
    return rms_norm(x, model.final_norm, s.eps), sorted(touched)
