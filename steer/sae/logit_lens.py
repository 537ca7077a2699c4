"""Logit lens: the tokens that a residual-stream vector raises, through the final norm's gain and the unembedding.

`labels` takes top tokens from it, `attribution.output_scores` a feature's own tokens.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.model.forward import direct_logits
from steer.model.steered import SteeredModel
from steer.sae.records import Tokens


def logit_lens(model: SteeredModel, rows: Float[Tensor, "n d"], top: int = 8) -> tuple[list[Tokens], list[Tokens]]:
    """(the `top` tokens whose logits each row raises most, those it lowers most), one list per row (nostalgebraist
    2020).

    logit = W_U (g * row), with g the gain of the final RMSNorm; a LayerNorm subtracts the row's mean first. The norm's
    scale depends on the rest of the residual stream and is the same for every token, so it is left out; so is a
    softcap, which acts on the whole sum.
    """
    (high, high_ids), (low, low_ids) = lens_topk(model, rows, top)
    texts = {i: model.tokenizer.decode([i]) for i in set(high_ids.flatten().tolist()) | set(low_ids.flatten().tolist())}

    def named(values: Tensor, ids: Tensor) -> list[Tokens]:
        return [
            [(texts[i], v) for i, v in zip(ids_, values_, strict=True)]
            for ids_, values_ in zip(ids.tolist(), values.tolist(), strict=True)
        ]

    return named(high, high_ids), named(low, low_ids)


@torch.inference_mode()
def lens_topk(
    model: SteeredModel, rows: Float[Tensor, "n d"], top: int
) -> tuple[tuple[Float[Tensor, "n top"], Int[Tensor, "n top"]], tuple[Float[Tensor, "n top"], Int[Tensor, "n top"]]]:
    """(logits, token ids) of the `top` highest and of the `top` lowest logits of each row, on the CPU."""
    top = min(top, model.anatomy.vocab)
    high, low = [], []
    for logits in direct_logits(model, rows):
        high.append(tuple(t.cpu() for t in logits.topk(top)))
        low.append(tuple(t.cpu() for t in logits.topk(top, largest=False)))
    return _joined(high, top), _joined(low, top)


def _joined(parts: list[tuple[Tensor, ...]], top: int) -> tuple[Tensor, Tensor]:
    if not parts:
        return torch.zeros(0, top), torch.zeros(0, top, dtype=torch.long)
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
