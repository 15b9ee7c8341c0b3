"""The words everyone speaks. No input or output."""
