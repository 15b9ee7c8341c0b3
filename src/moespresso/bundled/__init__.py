"""What travels with the package: two small trained models, text to calibrate and measure on, and facts.

Made by ``tools/corpus.py`` and ``tools/train_demo.py``; docs/demo-models.md tells how, NOTICE from what.
"""

from pathlib import Path

__all__ = ["FACTS", "MODELS", "TEXT"]

_HERE = Path(__file__).parent

MODELS: dict[str, Path] = {form: _HERE / form for form in ("mixtral", "deepseek_v2")}
TEXT: Path = _HERE / "text"
"""``TEXT / split / f"{domain}.jsonl"``, split being ``calibration`` or ``heldout``; a JSON object a line."""
FACTS: Path = _HERE / "facts.json"
