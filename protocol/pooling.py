"""How a prompt becomes one vector."""

from typing import Literal, TypeAlias

import msgspec

from protocol.errors import InvalidRequestError

PoolingType: TypeAlias = Literal["last", "mean", "cls"]


class PoolingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """The last token's hidden state, the mean of all tokens', or the first token's, behind the
    model's last norm. The first one's ("cls") says something in encoders only: in a decoder it has
    seen nothing else.

    `dimensions` keeps the first so many numbers, for models that were trained for it; then
    `normalize` makes the vector's length 1.
    """

    type: PoolingType = "last"
    normalize: bool = True
    dimensions: int | None = None

    def validate(self, hidden_size: int, *, is_encoder: bool) -> None:
        """Raises InvalidRequestError."""
        if self.type == "cls" and not is_encoder:
            raise InvalidRequestError(
                "Pooling `type` 'cls' is for encoders: a decoder's first token has seen no other.",
                field="type",
            )
        if self.dimensions is not None and not 1 <= self.dimensions <= hidden_size:
            raise InvalidRequestError(
                f"`dimensions` must be between 1 and {hidden_size}, got {self.dimensions}.",
                field="dimensions",
            )
