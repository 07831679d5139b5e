"""Checks of arguments that many constructors share, with one wording."""

import numbers
from collections.abc import Sequence
from typing import TypeGuard

import torch


def is_int(value: object) -> TypeGuard[int]:
    """Whether it is an int, Python's or NumPy's; True and False are not."""
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def check_positive_int(name: str, value: object) -> None:
    """Refuse what is not a positive int, Python's or NumPy's."""
    if not is_int(value):
        raise TypeError(f"{name} must be a positive int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be a positive int, got {value}")


def check_module(module: object) -> None:
    """Refuse what is not an nn.Module."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")


def check_floating(inputs: object) -> None:
    """Refuse what is not a floating-point tensor with a batch dimension."""
    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        found = inputs.dtype if isinstance(inputs, torch.Tensor) else type(inputs).__name__
        raise TypeError(f"inputs must be a floating-point tensor, got {found}")
    if inputs.dim() == 0:
        raise ValueError("inputs must have a batch dimension, got a scalar")


def check_rows(inputs: torch.Tensor, features: int) -> None:
    """Refuse what is not a floating-point batch of rows of shape `(N, features)`."""
    check_floating(inputs)
    if inputs.dim() != 2 or inputs.shape[1] != features:
        raise ValueError(f"inputs must have shape (N, {features}), got {tuple(inputs.shape)}")


def check_count(name: str, value: object) -> None:
    """As `check_positive_int`, for what may be zero."""
    if not is_int(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}")


def check_positive_ints(name: str, values: object) -> None:
    """Refuse what is not a sequence of positive ints."""
    if not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of widths, got {type(values).__name__}")
    for index, value in enumerate(values):
        check_positive_int(f"{name}[{index}]", value)


def check_context(context: object, rows: torch.Tensor, context_features: int) -> None:
    """Refuse a context that a layer was not built for, or the lack of one that it was."""
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
    """Refuse what is not a sequence of different column numbers."""
    if not isinstance(columns, Sequence) or isinstance(columns, str):
        raise TypeError(f"{name} must be a sequence of columns, got {type(columns).__name__}")
    for column in columns:
        if not is_int(column):
            raise TypeError(f"{name} must hold ints, got {type(column).__name__}")
        if not 0 <= column < features:
            raise ValueError(f"{name} must hold columns from 0 to {features - 1}, got {column}")
    if len(set(columns)) != len(columns):
        raise ValueError(f"{name} must hold each column once, got {list(columns)}")
