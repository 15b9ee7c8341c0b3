"""How good a model is, against text and against the model it was made from: perplexity, KL, agreement.

The text streams through each model layer by layer; only the last hidden states stay. Then both heads are
computed chunk by chunk, so the exact mean token KL(original || pressed) needs no tokens x vocabulary matrix.
Intervals are 95% bootstrap intervals over sequences.
"""

from moespresso.quality.bootstrap import mean_interval
from moespresso.quality.compare import evaluate, score_tokens, token_kl

__all__ = ["evaluate", "mean_interval", "score_tokens", "token_kl"]
