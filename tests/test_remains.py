"""What of a model is left after a plan, worked out by hand on a small one."""

from __future__ import annotations

from conftest import Zoo
from moespresso.build import open_view
from moespresso.core.blueprint import Blueprint
from moespresso.core.plan import Plan, Stage, Treatment
from moespresso.core.unit import Unit
from moespresso.effect.remains import Remains, merged_into, remains

EXPERTS = range(8)


def left(blueprint: Blueprint, *stages: dict[Unit, Treatment]) -> Remains:
    return remains(planned(blueprint, *stages), blueprint)


def planned(blueprint: Blueprint, *stages: dict[Unit, Treatment]) -> Plan:
    return Plan(blueprint.digest, tuple(Stage({"kind": "by hand"}, stage) for stage in stages))


def test_an_expert_has_the_channels_that_every_stage_leaves_it_and_its_own_word_counts_first(zoo: Zoo):
    blueprint = open_view(zoo("mixtral")).source
    all_of_it, one, other = (Unit(1, "experts", expert) for expert in (None, 3, 5))
    first = {all_of_it: Treatment(channels=24), one: Treatment(channels=8), other: Treatment(channels=32)}
    found = left(blueprint, first).widths
    assert found == {1: {expert: {3: 8, 5: 32}.get(expert, 24) for expert in EXPERTS}}
    for second in ({all_of_it: Treatment(channels=16)}, {all_of_it: Treatment(channels=30)}):
        wanted = {expert: min(width, second[all_of_it].channels or 0) for expert, width in found[1].items()}
        assert left(blueprint, first, second).widths == left(blueprint, second, first).widths == {1: wanted}


def test_behind_a_router_that_stays_whole_those_are_gone_that_were_there(zoo: Zoo):
    blueprint = open_view(zoo("mixtral")).source
    unit, fewer = Unit(2, "experts"), Treatment(keep=(0, 1, 2, 4, 6, 7))
    for repair, novices in (("skip", frozenset()), ("novice", frozenset({2}))):
        found = left(blueprint, {unit: fewer}, {unit: Treatment(keep=(0, 2, 7), repair=repair)})
        assert found.experts[2] == (0, 2, 7)
        assert found.gone == {2: (1, 4, 6)}
        assert found.rows(2) == fewer.keep
        assert found.novices == novices
    assert not left(blueprint, {unit: fewer}).gone


def test_who_joined_an_average_goes_where_the_average_goes(zoo: Zoo):
    blueprint = open_view(zoo("mixtral")).source

    def into(leader: int, *members: int) -> dict[Unit, Treatment]:
        return {
            Unit(0, "experts", expert): Treatment(into=leader, share=0.5) for expert in (leader, *members)
        }

    plan = planned(blueprint, into(1, 4), into(0, 1), into(6, 7))
    assert merged_into(plan, 0) == {4: 0, 1: 0, 7: 6}
    assert merged_into(plan, 1) == {}
