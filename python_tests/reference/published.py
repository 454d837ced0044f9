"""The generation loops of LLaDA and Dream in the tensor form of their publications, to check `loops.py` against.

They know no cache, no early stop and no ragged block; a position is masked if its token is the mask id. `f` maps token
ids [T] to logits [T, V] of all positions (not shifted). Noise comes from outside, as uniform numbers.
"""

import math

import torch


def first_best(confidence, n):
    """Indices of the n largest; among equals the first (the publications leave that open). confidence [m] -> [n]."""
    return confidence.sort(descending=True, stable=True).indices[:n]


def llada(f, prompt, mask_id, *, gen_length, block_length, steps, token_uniform, select_uniform,
          temperature=0.0, cfg_scale=0.0, remasking="low_confidence"):  # fmt: skip
    """LLaDA, arXiv 2502.09992: semi-autoregressive, low-confidence or random remasking.

    token_uniform(step) -> fp64 [T, V]; select_uniform(step) -> fp64 [T].
    Returns (ids [T], committed positions by step).
    """
    prompt_length = len(prompt)
    x = torch.cat([torch.tensor(prompt, dtype=torch.int64), torch.full((gen_length,), mask_id)])
    is_prompt = x != mask_id
    blocks = gen_length // block_length
    assert gen_length % block_length == 0 and steps % blocks == 0
    steps //= blocks
    committed = []
    for b in range(blocks):
        begin, end = prompt_length + b * block_length, prompt_length + (b + 1) * block_length
        number = int((x[begin:end] == mask_id).sum())
        counts = torch.full((steps,), number // steps)
        counts[: number % steps] += 1
        for t in range(steps):
            step = b * steps + t
            masked = x == mask_id
            logits = f(x)
            if cfg_scale > 0:
                without = torch.where(is_prompt, mask_id, x)
                unconditional = f(without)
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            noisy = logits
            if temperature > 0:
                noisy = logits.double().exp() / (-torch.log(token_uniform(step))) ** temperature
            x0 = noisy.argmax(-1)
            if remasking == "low_confidence":
                confidence = logits.double().softmax(-1).gather(-1, x0[:, None])[:, 0]
            else:
                confidence = select_uniform(step).clone()
            confidence[end:] = -math.inf
            confidence = torch.where(masked, confidence, -math.inf)
            chosen = first_best(confidence, int(counts[t]))
            x[chosen] = x0[chosen]
            committed.append(sorted(chosen.tolist()))
    return x, committed


def dream(f, prompt, mask_id, *, gen_length, steps, token_uniform, select_uniform,
          eps=1e-3, alg="maskgit_plus", temperature=0.0, top_p=None, top_k=None):  # fmt: skip
    """Dream, arXiv 2508.15487: one block, the whole answer. Same arguments and results as `llada`.

    A draw from a categorical distribution is made as argmax(logits + Gumbel noise).
    """
    x = torch.cat([torch.tensor(prompt, dtype=torch.int64), torch.full((gen_length,), mask_id)])
    times = torch.linspace(1, eps, steps + 1)
    committed = []
    for i in range(steps):
        masked = x == mask_id
        logits = f(x)
        logits = torch.cat([logits[:1], logits[:-1]])[masked].double()
        t, s = times[i], times[i + 1]
        if temperature > 0:
            logits = logits / temperature
        lowest = torch.finfo(logits.dtype).min
        if top_p is not None and top_p < 1:
            ordered, indices = logits.sort(descending=True)
            remove = ordered.softmax(-1).cumsum(-1) > top_p
            remove[:, 1:] = remove[:, :-1].clone()  # keep the first token above the threshold too
            remove[:, 0] = False
            logits = logits.masked_fill(torch.zeros_like(remove).scatter(-1, indices, remove), lowest)
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], lowest)
        p = logits.softmax(-1)
        score = logits
        if temperature > 0:
            score = logits - torch.log(-torch.log(token_uniform(i)[masked]))
        x0 = score.argmax(-1)
        positions = masked.nonzero()[:, 0]
        if alg == "origin":
            rate = 1 - s / t if i < steps - 1 else 1
            chosen = select_uniform(i)[masked] < rate
            x[positions[chosen]] = x0[chosen]
            committed.append(positions[chosen].tolist())
            continue
        if alg == "maskgit_plus":
            confidence = p.gather(-1, x0[:, None])[:, 0]
        elif alg == "topk_margin":
            best = p.sort(descending=True).values
            confidence = best[:, 0] - best[:, 1]
        else:
            confidence = (p * torch.log(p + 1e-10)).sum(-1)
        number = masked.sum() / 1  # fp32, as a mean over a batch of one
        n = int(number * (1 - s / t)) if i < steps - 1 else int(number)
        chosen = first_best(confidence, n)
        x[positions[chosen]] = x0[chosen]
        committed.append(sorted(positions[chosen].tolist()))
    return x, committed
