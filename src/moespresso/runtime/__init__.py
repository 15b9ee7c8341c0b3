"""What a pressed model needs where it is loaded: transformers taught about layers that differ from one another.

`import moespresso` comes through this door for `watch`, and must not pull in torch. So what does need torch is imported
from its own module: `anatomy` (what a decoder layer adds to the residual stream) and `unequal` (`install`, and what
`per_layer_config` may say).
"""

from moespresso.runtime.hook import watch

__all__ = ["watch"]
