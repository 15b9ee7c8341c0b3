"""What a checkpoint's names mean: config to blueprint, layers on and off, names both ways, lock-step forward."""

from moespresso.model.blueprint import read_blueprint
from moespresso.model.lockstep import Waiting, start
from moespresso.model.skeleton import Skeleton, quiet_transformers, read_config
from moespresso.model.view import View

__all__ = ["Skeleton", "View", "Waiting", "quiet_transformers", "read_blueprint", "read_config", "start"]
