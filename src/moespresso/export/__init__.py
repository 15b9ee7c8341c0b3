"""What each engine can load, as data, so that a plan is refused before an hour is spent on it."""

from moespresso.export.targets import TARGETS, Target, check_target, find_target

__all__ = ["TARGETS", "Target", "check_target", "find_target"]
