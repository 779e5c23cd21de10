"""Integers for grids and tiles, on the host."""


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The least power of two that is at least `number`, which is positive."""
    return 1 << (number - 1).bit_length()
