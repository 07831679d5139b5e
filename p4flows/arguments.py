"""Checks of arguments that many constructors share, with one wording."""

import numbers
from collections.abc import Sequence
from typing import TypeGuard

import torch


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an int, Python's or NumPy's; True and False are not."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def check_positive_int(name: str, value: object) -> None:
    """Refuse what is not a positive int, Python's or NumPy's.

    Args:
        name: the argument's name, for the message.
        value: what came.

    Raises:
        TypeError: when the value is not an int (True and False are not).
        ValueError: when it is below one.

    Example:
        >>> check_positive_int("blocks", 0)
        Traceback (most recent call last):
        ...
        ValueError: blocks must be a positive int, got 0
    """
    if not is_int(value):
        raise TypeError(f"{name} must be a positive int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be a positive int, got {value}")


def check_module(module: object) -> None:
    """Refuse what is not an nn.Module.

    Args:
        module: what came.

    Raises:
        TypeError: when it is not an nn.Module.

    Example:
        >>> check_module([torch.nn.Linear(2, 2)])
        Traceback (most recent call last):
        ...
        TypeError: module must be an nn.Module, got list
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")


def check_floating(inputs: object) -> None:
    """Refuse what is not a floating-point tensor with a batch dimension.

    Args:
        inputs: what came.

    Raises:
        TypeError: when it is not a floating-point tensor.
        ValueError: when it is a scalar.

    Example:
        >>> check_floating(torch.ones(5, dtype=torch.int64))
        Traceback (most recent call last):
        ...
        TypeError: inputs must be a floating-point tensor, got torch.int64
    """
    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor, got {found}")
    if inputs.dim() == 0:
        raise ValueError("inputs must have a batch dimension, got a scalar")


def check_rows(inputs: torch.Tensor, features: int) -> None:
    """Refuse what is not a floating-point batch of rows of shape `(N, features)`.

    Args:
        inputs: what came.
        features: the expected number of columns.

    Raises:
        TypeError: when it is not a floating-point tensor.
        ValueError: when its shape is another one.

    Example:
        >>> check_rows(torch.ones(5, 3), 2)
        Traceback (most recent call last):
        ...
        ValueError: inputs must have shape (N, 2), got (5, 3)
    """
    check_floating(inputs)
    if inputs.dim() != 2 or inputs.shape[1] != features:
        raise ValueError(f"inputs must have shape (N, {features}), got {tuple(inputs.shape)}")


def check_like(
    name: str, value: torch.Tensor, dtypes: tuple[torch.dtype, ...] | None, device: torch.device
) -> None:
    """Refuse a tensor of another dtype or on another device than that of a layer.

    Args:
        name: the argument's name, for the message.
        value: what came.
        dtypes: that of the layer first, and others that will do; None for any.
        device: that of the layer.

    Raises:
        TypeError: when the dtype is another one.
        ValueError: when the device is another one.

    Example:
        >>> check_like("inputs", torch.ones(2), (torch.float64,), torch.device("cpu"))
        Traceback (most recent call last):
        ...
        TypeError: inputs must be torch.float64 as the layer is, got torch.float32: use .to()
    """
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must be {dtypes[0]} as the layer is, got {value.dtype}: use .to()")
    if value.device != device:
        raise ValueError(
            f"{name} must be on {device} as the layer is, got {value.device}: use .to()"
        )


def check_count(name: str, value: object) -> None:
    """As `check_positive_int`, for what may be zero.

    Args:
        name: the argument's name, for the message.
        value: what came.

    Raises:
        TypeError: when the value is not an int.
        ValueError: when it is negative.
    """
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def check_positive_ints(name: str, values: object) -> None:
    """Refuse what is not a sequence of positive ints.

    Args:
        name: the argument's name, for the message.
        values: what came.

    Raises:
        TypeError: when it is not a sequence, or an element not an int.
        ValueError: when an element is below one.

    Example:
        >>> check_positive_ints("hidden", (60, 0))
        Traceback (most recent call last):
        ...
        ValueError: hidden[1] must be a positive int, got 0
    """
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of widths, got {type(values).__name__}")
    for index, value in enumerate(values):
        check_positive_int(f"{name}[{index}]", value)


def check_context(context: object, rows: torch.Tensor, context_features: int) -> None:
    """Refuse a context that a layer was not built for, or the lack of one that it was.

    Args:
        context: what came.
        rows: inputs of shape `(N, features)`.
        context_features: the expected number of columns; 0 for none.

    Raises:
        TypeError: when a context is missing or not a floating-point tensor.
        ValueError: when its shape is not `(N, context_features)`, or none was expected.

    Example:
        >>> check_context(torch.ones(2, 1), torch.ones(2, 3), 0)
        Traceback (most recent call last):
        ...
        ValueError: context came to a layer without: build it with context_features=1
    """
    if context_features == 0:
        if context is not None:
            width = context.shape[-1] if isinstance(context, torch.Tensor) else "..."
            raise ValueError(
                f"context came to a layer without: build it with context_features={width}"
            )
        return
    if not isinstance(context, torch.Tensor) or not context.is_floating_point():
        found = context.dtype if isinstance(context, torch.Tensor) else type(context).__name__
        raise TypeError(f"context must be a floating-point tensor, got {found}")
    if context.shape != (len(rows), context_features):
        raise ValueError(
            f"context must have shape ({len(rows)}, {context_features}), got {tuple(context.shape)}"
        )


def check_columns(name: str, columns: object, features: int) -> None:
    """Refuse what is not a sequence of different column numbers.

    Args:
        name: the argument's name, for the message.
        columns: what came.
        features: the number of columns there are.

    Raises:
        TypeError: when it is not a sequence of ints.
        ValueError: when one is out of range or comes twice.

    Example:
        >>> check_columns("circular", [3], 3)
        Traceback (most recent call last):
        ...
        ValueError: circular must hold columns from 0 to 2, got 3
    """
    if not isinstance(columns, Sequence) or isinstance(columns, str):
        raise TypeError(f"{name} must be a sequence of columns, got {type(columns).__name__}")
    for column in columns:
        if not is_int(column):
            raise TypeError(f"{name} must hold ints, got {type(column).__name__}")
        if not 0 <= column < features:
            raise ValueError(f"{name} must hold columns from 0 to {features - 1}, got {column}")
    if len(set(columns)) != len(columns):
        raise ValueError(f"{name} must hold each column once, got {list(columns)}")
