"""Which layers have experts, as Megatron's --moe-layer-freq says it: a number, or a list as Python writes it."""

from __future__ import annotations

import ast

MOST_LAYERS = 4096
"""More than any model has."""


def parse_layer_frequency(text: str) -> int | list[int]:
    """Return n of "every n-th layer", or one number a layer: 1 with experts, 0 without.

    Knows whole numbers, lists, `+` and `*`; nothing is evaluated. Raises ValueError for anything else.
    """
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("it is not a list of numbers") from error
    if isinstance(value, int):
        if value < 1:
            raise ValueError("it must be at least 1")
        return value
    if set(value) - {0, 1}:
        raise ValueError("a list has 1 for layers with experts and 0 for others")
    return value


def expert_layers(frequency: int | list[int], layers: int) -> list[int]:
    """Return 1 for each of `layers` layers that has experts, else 0."""
    if isinstance(frequency, int):
        return [int(layer % frequency == 0) for layer in range(layers)]
    return frequency


def _value(node: ast.expr) -> int | list[int]:
    match node:
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            return number
        case ast.List(elts=elements):
            numbers = [_value(element) for element in elements]
            if all(isinstance(number, int) for number in numbers):
                return [number for number in numbers if isinstance(number, int)]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            one, two = _value(left), _value(right)
            if isinstance(one, list) and isinstance(two, list):
                return _bounded(len(one) + len(two)) and one + two
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            one, two = _value(left), _value(right)
            if isinstance(one, list) and isinstance(two, int):
                return _bounded(len(one) * two) and one * two
            if isinstance(one, int) and isinstance(two, list):
                return _bounded(len(two) * one) and two * one
    raise ValueError("it is not a list of numbers")


def _bounded(length: int) -> bool:
    if not 0 < length <= MOST_LAYERS:
        raise ValueError(f"it has {length} layers")
    return True
