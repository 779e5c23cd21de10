"""How a prompt becomes one vector."""

from typing import Literal, TypeAlias

import msgspec

from protocol.errors import InvalidRequestError

PoolingType: TypeAlias = Literal["last", "mean"]


class PoolingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """The last token's hidden state, or the mean of all tokens', behind the model's last norm.

    `dimensions` keeps the first so many numbers, for models that were trained for it; then
    `normalize` makes the vector's length 1.
    """

    type: PoolingType = "last"
    normalize: bool = True
    dimensions: int | None = None

    def validate(self, hidden_size: int) -> None:
        """Raises InvalidRequestError."""
        if self.dimensions is not None and not 1 <= self.dimensions <= hidden_size:
            raise InvalidRequestError(
                f"`dimensions` must be between 1 and {hidden_size}, got {self.dimensions}.",
                field="dimensions",
            )
