"""Is a written folder right? Every check is one function that returns what it found wrong.

`verify` proves that the files are those that were written (digests), that they make the whole model the
config asks for (names, shapes, every expert), that every value is finite, that stock transformers loads them
with no key missing, unexpected or mismatched, generate with a cache and give the logits that our streamed
forward gives, and, against the original, that each tensor is byte for byte what the plan says.
"""

from moespresso.verify.checks import verify

__all__ = ["verify"]
