"""The exceptions that sharpcore raises; every one derives from SharpcoreError."""

from __future__ import annotations


class SharpcoreError(Exception):
    """Base class of all errors raised by sharpcore."""


class InvalidInput(SharpcoreError, ValueError):
    """An argument is not what the call needs; the message names it, what was expected and what came."""


class UnsupportedModel(SharpcoreError, ValueError):
    """A network, scheduler or pipeline lacks something that a score needs."""


class UnsupportedOperation(SharpcoreError):
    """An operation of the network has no exact derivative here; the message names it and its module."""


class NonFiniteError(SharpcoreError, ArithmeticError):
    """A NaN or an infinity appeared; the message names where it came from first."""


class OutOfMemory(SharpcoreError, MemoryError):
    """Not even the smallest batch fits into memory; the message says what would."""


class MissingDependency(SharpcoreError, ImportError):
    """An optional package is needed for what was asked; the message says how to install it."""
