"""What a step is: one contract for every method, by the role that it has in a run.

```
Step
├── Selects      chooses units (experts, branches, blocks) by statistics
│   └── Searches     may compare candidates by the whole model's loss instead
└── Treats       gives matrices another form
    ├── Quantizes    each by itself, from its weights alone, into codes
    ├── Prunes       each by itself, from its weights alone, into a matrix with zeros
    └── Refits       all of a layer, on the text that reaches it
```

A method is a frozen dataclass of settings that extends one role: its fields are the schema of the step, and
every other member has its default here. The conductor asks for the role, never for a member that may not be
there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from moespresso.core.blueprint import Blueprint
from moespresso.core.format import Format
from moespresso.core.unit import Unit

if TYPE_CHECKING:  # a stage of a plan knows its step
    from moespresso.core.plan import Decision, Plan, Stage, Treatment
    from moespresso.core.stats import Stats

# What a step wants to see beside the layer and the tokens that the router sends to its experts: what the original layer
# answers, how the model's loss bends, every token at every expert.
Sight = Literal["original", "gradient", "all_tokens"]
NOTHING: frozenset[Sight] = frozenset()
# Parts of a model whose matrices can be given another form.
MATRIX_PARTS = ("experts", "shared", "attention", "dense", "head")

# What a candidate of a search does to the model as it is, and the losses of the model as each of some candidates leaves it.
Candidate = Mapping[Unit, "Treatment"]
Losses = Callable[[Sequence[Candidate]], list[float]]

ContextT = TypeVar("ContextT")
ResultT = TypeVar("ResultT")


class Step(ABC):
    """Settings of one step of a recipe, and what it decides."""

    __slots__ = ()

    kind: ClassVar[str] = ""
    # Measured on the model as the earlier steps leave it (else on the original).
    rescore: bool = True
    # Decided or fitted layer by layer, each on what the changed layers before it let through.
    sequential: bool = False

    @property
    def uneven(self) -> bool:
        """Whether layers or experts may come to differ, which only the plugin loads."""
        return False

    @property
    def why_uneven(self) -> str:
        """The setting that lets them differ, and what comes of it."""
        return "scope=global leaves unequal layers"

    @property
    def without_text(self) -> str:
        """What would do instead and needs no text; nothing where that is not known."""
        return ""

    @property
    def by_matrix(self) -> bool:
        """Whether experts in a stack come out otherwise than the same experts apart."""
        return False

    def stands_for(self) -> tuple[Mapping[str, Any], ...]:
        """The steps that this one is short for; none where it is itself."""
        return ()

    def describe(self) -> dict[str, Any]:
        """The step as data: its kind and every setting."""
        settings = (each.name for each in fields(cast("Any", self)))
        return {"kind": self.kind} | {name: getattr(self, name) for name in settings}

    @property
    def sees_text(self) -> bool:
        """Whether it is found on text itself, whatever else is measured for it."""
        return False

    def needs(self) -> frozenset[str]:
        """The statistics that must be measured for this step, by name."""
        return frozenset()

    def check(self, blueprint: Blueprint) -> None:
        """Raise `UserError` when the step cannot be done on this model, before anything is measured."""
        _ = blueprint

    def amounts(self, blueprint: Blueprint) -> Sequence[Step]:
        """This step with every amount it could take, least first (for a byte budget)."""
        _ = blueprint
        return [self]

    def even(self, blueprint: Blueprint) -> str:
        """The settings of the nearest plan with equal layers."""
        _ = blueprint
        return ""

    @abstractmethod
    def outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage of the right size, before anything is measured."""

    def uneven_outline(self, source: Blueprint, before: Plan) -> Stage:
        """A stage as uneven as this step may come to make it."""
        return self.outline(source, before)

    @abstractmethod
    def decide(self, stats: Stats, blueprint: Blueprint) -> Decision:
        """Choose by what was measured."""


class Selects(Step):
    """A step that chooses which units are kept."""

    __slots__ = ()


class Searches(Selects):
    """A step that may compare candidates by the whole model's loss, on so many `rows` of the text."""

    __slots__ = ()

    rows: int = 16

    @property
    @abstractmethod
    def searches(self) -> bool:
        """Whether it does, as it is set; else it goes by statistics."""

    @property
    def sees_text(self) -> bool:
        """Candidates are tried on text."""
        return self.searches

    @abstractmethod
    def search(self, blueprint: Blueprint, judge: Losses) -> Decision:
        """Choose by the losses that `judge` finds."""


class Treats(Step):
    """A step that gives matrices another form; `able` are the parts of a model that it can treat."""

    __slots__ = ()

    able: ClassVar[tuple[str, ...]] = MATRIX_PARTS

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of formats that it makes."""
        return frozenset()

    @property
    def plainly(self) -> tuple[str, ...]:
        """Steps near to this one whose matrices engines read, as they are written, nearest first."""
        return ("rtn",)


class Quantizes(Treats):
    """A step that encodes each matrix from its weights alone."""

    __slots__ = ()

    @abstractmethod
    def quantize(self, weights: Tensor, format: Format, dtype: torch.dtype) -> Any:
        """What its codec stores (`formats.QuantizedWeights`) of `weights` [N, out, in], scales as `dtype`."""


class Prunes(Treats):
    """A step that prunes each matrix by its weights alone."""

    __slots__ = ()

    @abstractmethod
    def prune(self, weights: Tensor, format: Format) -> Tensor:
        """`weights` [N, out, in] with zeros for those that are pruned."""


class Refits(Treats, Generic[ContextT, ResultT]):
    """A step that treats a whole layer on the text that reaches it."""

    __slots__ = ()

    sequential: bool = True

    @property
    def shows(self) -> frozenset[Sight]:
        """What it wants to see beside the layer and its tokens."""
        return NOTHING

    @property
    def sees_text(self) -> bool:
        """It is fitted on text."""
        return True

    @abstractmethod
    def solve(self, context: ContextT) -> ResultT:
        """What becomes of one layer (`methods.LayerContext` to `methods.LayerResult`)."""
