"""What each engine can load, as data, so that a plan is refused before an hour is spent on it."""

from moespresso.export.targets import check_even, find_target, formed

__all__ = ["check_even", "find_target", "formed"]
