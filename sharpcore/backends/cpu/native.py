"""The compiled module of the cpu backend: imported when first asked for, or a sentence why it cannot be."""

from __future__ import annotations

import importlib
from types import ModuleType

from sharpcore.errors import InvalidInput

_extension: ModuleType | None = None
_import_error: str | None = None


def extension() -> ModuleType | None:
    """The compiled module ``sharpcore._C``, imported at the first call, or None where it cannot be.

    Raises:
        InvalidInput: the environment variable SHARPCORE_CPU_ISA asks for an instruction set that does not
            exist, or that this CPU lacks.
    """
    global _extension, _import_error
    if _extension is None and _import_error is None:
        try:
            module = importlib.import_module("sharpcore._C")
        except ImportError as error:
            _import_error = str(error)
            return None
        try:
            module.isa()
        except (ValueError, RuntimeError) as error:
            raise InvalidInput(str(error)) from error
        _extension = module
    return _extension


def why_missing() -> str:
    """A sentence that says why :func:`extension` is None and how to get it."""
    return (
        "the cpu backend needs the compiled module sharpcore._C, which cannot be imported "
        f"({_import_error}); install a C++17 compiler and then sharpcore again, with "
        "SHARPCORE_REQUIRE_EXTENSION=1 to see why a build fails"
    )
