"""Models and mathematics to test with: tiny random models, refused models, a slow reference.

Nothing here imports the rest of the library, and transformers is imported only when one of its
models is built. Their classes are in `sparda_compile.testing.minicpm` and `.nosa`.
"""

from __future__ import annotations

from sparda_compile.testing.families import FAMILIES, build_form
from sparda_compile.testing.plain import PlainCausalLM
from sparda_compile.testing.reference import BlockIds, random_forecast, reference_decode
from sparda_compile.testing.unsupported import UNSUPPORTED_MODELS
from sparda_compile.testing.zoo import TINY_MODELS, ModelBuilder, build, tiny_llama, tiny_nosa

__all__ = [
    "FAMILIES",
    "TINY_MODELS",
    "UNSUPPORTED_MODELS",
    "BlockIds",
    "ModelBuilder",
    "PlainCausalLM",
    "build",
    "build_form",
    "random_forecast",
    "reference_decode",
    "tiny_llama",
    "tiny_nosa",
]
