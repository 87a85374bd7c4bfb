"""Ridge regression from a stream of rows, in closed form.

Only the moments of the rows are kept, in float64: what a fit takes does not grow with the rows. Columns are
centred and scaled, and every fifth row is held back: the strength that predicts those best is used for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from droidspeak.errors import UsageError

__all__ = ["LinearMap", "RidgeFit"]

_STRENGTHS = (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_HELD_BACK = 5
# A column whose variance is a smaller share of its squared mean is constant but for rounding.
_CONSTANT = 1e-20


@dataclass(frozen=True)
class LinearMap:
    """`y = x @ weight + bias`; `weight` is `[features, outputs]` and `bias` `[outputs]`, float32."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Of rows `[rows, features]` of any float; gives `[rows, outputs]` float32."""
        return torch.addmm(self.bias, x.float(), self.weight)


class RidgeFit:
    """Collects rows of features and outputs. Takes `16 * features * (features + outputs)` bytes.

    Args:
        features: columns of x.
        outputs: columns of y.
        device: where the moments are kept; it must know float64.

    Attributes:
        outputs: as given.
    """

    def __init__(self, features: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self._used = _Moments.none(features, outputs, device)
        self._held_back = _Moments.none(features, outputs, device)
        self.outputs = outputs

    @property
    def rows(self) -> int:
        """Rows so far."""
        return self._used.rows + self._held_back.rows

    def add(self, x: Tensor, y: Tensor) -> None:
        """Rows `[rows, features]` and what they should give, `[rows, outputs]`, of any float."""
        held_back = (torch.arange(len(x), device=x.device) + self.rows) % _HELD_BACK == _HELD_BACK - 1
        self._used += _Moments.of(x[~held_back], y[~held_back])
        self._held_back += _Moments.of(x[held_back], y[held_back])

    def merge(self, other: RidgeFit) -> None:
        """Adds the rows of another fit; those that it held back stay held back."""
        self._used += other._used
        self._held_back += other._held_back

    def solve(self, features: int | None = None) -> LinearMap:
        """The map from the leading `features` columns, all by default.

        Raises:
            UsageError: fewer than five rows, or rows that are not finite.
        """
        if self.rows < _HELD_BACK:
            raise UsageError(f"a ridge fit of {self.rows} rows: allowed are {_HELD_BACK} or more")
        used, held_back = (moments.leading(features) for moments in (self._used, self._held_back))
        everything = used + held_back
        if not everything.finite:
            raise UsageError("rows of a ridge fit are not finite")
        errors = [held_back.error(solution) for solution in used.ridge(_STRENGTHS)]
        (best,) = everything.ridge([_STRENGTHS[errors.index(min(errors))]])
        return LinearMap(best.weight.float(), best.bias.float())


@dataclass(frozen=True)
class _Moments:
    """Means of rows, and sums of products about them: they add up without cancellation (Chan et al. 1979)."""

    rows: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def none(cls, features: int, outputs: int, device: torch.device | str) -> _Moments:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            0, zeros(features), zeros(outputs), zeros(features, features), zeros(features, outputs), zeros()
        )

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> _Moments:
        if not len(x):
            return cls.none(x.shape[1], y.shape[1], x.device)
        x, y = x.double(), y.double()
        mean_x, mean_y = x.mean(0), y.mean(0)
        x, y = x - mean_x, y - mean_y
        return cls(len(x), mean_x, mean_y, x.T @ x, x.T @ y, y.square().sum())

    def __add__(self, other: _Moments) -> _Moments:
        rows = self.rows + other.rows
        if not rows:
            return self
        x, y, share = other.x - self.x, other.y - self.y, other.rows / rows
        weight = self.rows * share
        return _Moments(
            rows,
            self.x + share * x,
            self.y + share * y,
            (self.xx + other.xx).addr_(x, x, alpha=weight),
            (self.xy + other.xy).addr_(x, y, alpha=weight),
            self.yy + other.yy + weight * y.square().sum(),
        )

    @property
    def finite(self) -> bool:
        return bool(self.xx.isfinite().all() and self.xy.isfinite().all() and self.yy.isfinite())

    def leading(self, features: int | None) -> _Moments:
        """Of the leading `features` columns."""
        kept = slice(features)
        return _Moments(self.rows, self.x[kept], self.y, self.xx[kept, kept], self.xy[kept], self.yy)

    def ridge(self, strengths: Sequence[float]) -> list[LinearMap]:
        """One solution per strength, float64."""
        variance = self.xx.diagonal() / self.rows
        scale = torch.where(variance > _CONSTANT * self.x.square(), variance.rsqrt(), 0)
        correlation = self.xx / self.rows * scale.outer(scale)
        cross = self.xy / self.rows * scale[:, None]
        found = []
        for strength in strengths:
            regular = correlation.clone()
            regular.diagonal().add_(strength)
            weight = scale[:, None] * torch.cholesky_solve(cross, torch.linalg.cholesky(regular))
            found.append(LinearMap(weight, self.y - self.x @ weight))
        return found

    def error(self, solution: LinearMap) -> float:
        """Sum of squares that `solution` leaves of these rows."""
        weight, offset = solution.weight, self.y - self.x @ solution.weight - solution.bias
        left = self.yy - (weight * (2 * self.xy - self.xx @ weight)).sum()
        return (left + self.rows * offset.square().sum()).item()
