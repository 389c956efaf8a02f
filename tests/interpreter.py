"""Triton's interpreter in half the time, with the same numbers; where Triton's insides are others than these, it takes its own time."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any


def hurry() -> None:
    """Leave out what the interpreter does for nothing.

    - Every integer operation is computed again in 64 bits to check it for overflow, and nothing is asserted unless Triton is told to debug. (An
      overflow is found by its wrong numbers: tests/contract/test_large_index.py.) Without it, a third less time.
    - Every call of a function inside a kernel puts the interpreter's versions of ``tl.load``, ``tl.dot`` and all others in place again, which the
      kernel's own launch has done. Without it, a third less of the rest.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from triton import language as tl
        from triton.runtime import interpreter

        interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        patch, unchanged = interpreter._patch_lang, interpreter._LangPatchScope

        def patch_once(function: Any) -> Any:
            languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
            in_place = languages and not any(tl.core.is_builtin(language.load) for language in languages)
            return unchanged() if in_place else patch(function)

        interpreter._patch_lang = patch_once
