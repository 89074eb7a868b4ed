"""Half the time of Triton's interpreter, of which the kernels' tests spend minutes."""

import dataclasses
from typing import Any


def quicken() -> None:
    """Leave out what the interpreter does again and again for nothing.

    At each call of one kernel function by another it replaces the whole language by its own
    functions, although the first call has; and it computes every integer sum twice to see whether
    it overflows, which on volumes as small as the tests' none does.
    """
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    replaced = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in replaced:
            replaced.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
