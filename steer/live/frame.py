"""What one forward pass is over: which text each token belongs to, and how far that text's reply has come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from steer.live.receipts import Tally


@dataclass(eq=False)
class TextPass:
    """One forward pass over `[batch, new]` tokens, or over `[1, tokens]` of several texts packed together."""

    row: Int[Tensor, " texts"] | None = None
    """Which of the applied rows each text of the batch goes by, or, packed, each token. None: the batch's own order,
    or the one row that there is."""
    index: Int[Tensor, "batch new"] | None = None
    """The reply token that each position writes: its place in the text less (prompt length - 1). Those of the prompt
    are negative, but for its last one, which writes reply token 0. Wanted where `Steering.timed`."""
    packed: bool = False
    """Whether `row` counts tokens."""
    valid: Bool[Tensor, "batch new"] | None = None
    """False for padding, which receipts leave out. None: there is none."""
    tally: Tally | None = None
    """What is told what the moves did."""
    gates: dict[object, Float[Tensor, "batch new 1"]] = field(default_factory=dict)
    """The gates read so far in this pass: 1 where open."""

    def of_rows(self, table: Float[Tensor, "rows 1 n"]) -> Float[Tensor, "batch new n"]:
        """Each token's row of a table; sizes of 1 where it is the same for all."""
        if self.row is None or table.shape[0] == 1:
            return table
        chosen = table.index_select(0, self.row.to(table.device))
        return chosen.transpose(0, 1) if self.packed else chosen
