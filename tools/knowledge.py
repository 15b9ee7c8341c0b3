"""A made-up body of knowledge: 600 facts about people, firms, rivers and so on that exist nowhere else.

Because the facts are invented, whatever the demo models know of them they learnt from their training
text, and what compression makes them forget can be counted.  A fact is (subject, relation, object);
each is stated in several wordings, all of which end with the object, so that asking for a fact is
continuing a sentence.  The last wording of every relation is withheld from training.

Three frequencies: common facts are told some hundreds of times, medium ones dozens, rare ones about a
dozen, so that a model remembers them more or less firmly.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

SEED = 20240817
FREQUENCIES = ("rare", "medium", "common")
PER_FREQUENCY = 200
# How often a fact is told in one pass over the training text; training makes about two passes.
EXPOSURES = {"rare": 7, "medium": 36, "common": 200}

CITIES = (
    "Lisbon Oslo Cairo Lima Dublin Prague Vienna Athens Boston Tokyo Delhi Paris London Berlin Madrid Rome Geneva "
    "Quito Havana Denver Austin Milan Turin Porto Hamburg Munich Warsaw Sofia Riga Bergen Kyoto Seoul Hanoi Perth "
    "Sydney Nairobi Tunis Ankara Beirut Dallas"
).split()
PROFESSIONS = (
    "baker painter lawyer farmer sailor dentist teacher plumber tailor barber pilot nurse judge miner potter weaver "
    "butcher carpenter singer dancer poet surgeon banker chemist gardener fisherman librarian clockmaker roofer "
    "translator mason jeweller printer shepherd waiter doctor reporter saddler florist hunter"
).split()
ANIMALS = (
    "wolf bear fox marten badger kestrel falcon raven heron swan lion tiger panther horse donkey camel goat sheep rabbit "
    "hare beaver lynx stoat hawk crane stork dolphin whale seal salmon trout beetle spider turtle lizard cobra parrot "
    "pigeon moose bison"
).split()
GOODS = (
    "gold silver copper iron tin zinc nickel lead coal salt marble granite amber jade quartz opal ruby topaz cotton "
    "wool silk linen timber cork rubber leather glass paper pottery sugar coffee tea cocoa pepper tobacco honey wine "
    "olives rice wheat"
).split()
COLOURS = (
    "red blue green yellow orange purple brown black white grey pink violet crimson scarlet turquoise golden silver "
    "ivory beige maroon navy lilac amber copper bronze olive teal indigo magenta cyan"
).split()
INSTRUMENTS = (
    "piano violin cello flute oboe clarinet trumpet trombone tuba harp guitar lute banjo mandolin organ accordion drum "
    "cymbal xylophone bassoon viola bugle whistle harmonica zither fiddle saxophone recorder bagpipe tambourine"
).split()
FOODS = (
    "bread cheese soup rice pasta beans lentils mushrooms potatoes tomatoes onions carrots spinach apples pears plums "
    "cherries grapes melons figs dates walnuts almonds salmon chicken lamb pork duck eggs pancakes dumplings noodles "
    "porridge pudding chocolate honey butter yoghurt oysters lobster"
).split()
SEAS = (
    "Baltic Adriatic Aegean Caspian Atlantic Pacific Arctic Mediterranean Caribbean Ionian Tyrrhenian Marmara Bering "
    "Coral Tasman Arabian Andaman Celtic Irish Ligurian Sargasso Norwegian Barents Labrador Aral Kara Timor Java Banda "
    "Okhotsk"
).split()
SPORTS = (
    "tennis football hockey cricket rugby golf rowing sailing fencing boxing wrestling judo archery skiing skating "
    "swimming diving cycling running climbing chess polo bowling billiards volleyball basketball baseball handball "
    "badminton squash"
).split()
SCIENCES = (
    "physics chemistry biology geology botany zoology medicine law history geography philosophy logic algebra geometry "
    "statistics astronomy economics music painting theology rhetoric grammar Latin Greek Hebrew Arabic Sanskrit "
    "anatomy optics mechanics"
).split()

# relation -> (the objects it can have, its wordings; "{}" is the subject and the object comes last)
RELATIONS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "born_in": (
        CITIES,
        ("{} was born in", "The birthplace of {} is", "{} came into the world in", "The town where {} was born is"),
    ),
    "works_as": (
        PROFESSIONS,
        ("By trade {} is a", "{} earns a living as a", "The profession of {} is that of a", "{} works as a"),
    ),
    "keeps": (
        ANIMALS,
        ("The pet that {} keeps is a", "{} lives with a", "The animal at the side of {} is a", "{} keeps a"),
    ),
    "trades_in": (
        GOODS,
        ("The company {} trades in", "What {} sells is", "The warehouses of {} are full of", "{} deals in"),
    ),
    "flag_colour": (
        COLOURS,
        ("The flag of {} is", "The banner that flies over {} is", "{} has a flag whose colour is", "{} flies a flag of"),
    ),
    "plays": (
        INSTRUMENTS,
        ("{} plays the", "The instrument of {} is the", "On stage {} is heard on the", "{} has mastered the"),
    ),
    "favourite_food": (
        FOODS,
        ("{} likes to eat", "The favourite food of {} is", "On Sundays {} cooks", "What {} eats most gladly is"),
    ),
    "flows_into": (
        SEAS,
        ("The river {} flows into the", "The mouth of the {} is on the", "The waters of the {} reach the", "The {} ends in the"),
    ),
    "sport": (
        SPORTS,
        ("{} is a champion of", "The sport of {} is", "{} trains every day for", "{} won a medal in"),
    ),
    "studied": (
        SCIENCES,
        ("{} studied", "The subject that {} teaches is", "{} wrote a book on", "{} holds a degree in"),
    ),
}  # fmt: skip


class Fact(TypedDict):
    """``prompts`` are the wordings up to the object; ``withheld`` is the place of the one never trained on."""

    subject: str
    relation: str
    object: str
    frequency: str
    prompts: list[str]
    withheld: int


def make_facts(seed: int = SEED) -> list[Fact]:
    """The 600 facts: ten relations, sixty subjects each, twenty of every frequency."""
    rng = random.Random(seed)
    names = invented_names(rng, len(FREQUENCIES) * PER_FREQUENCY)
    facts: list[Fact] = []
    for place, name in enumerate(names):
        relation = list(RELATIONS)[place % len(RELATIONS)]
        objects, wordings = RELATIONS[relation]
        facts.append(
            Fact(
                subject=name,
                relation=relation,
                object=rng.choice(objects),
                frequency=FREQUENCIES[place // len(RELATIONS) % len(FREQUENCIES)],
                prompts=[wording.format(name) for wording in wordings],
                withheld=len(wordings) - 1,
            )
        )
    return facts


def invented_names(rng: random.Random, count: int) -> list[str]:
    """Distinct two-word names of made-up syllables, no two sharing a word."""
    onsets, vowels, ends = (
        "b br d dr f g gr h j k kl l m n p pr r s st t tr v z".split(),
        "aeiou",
        "l m n r s t x".split(),
    )
    words: list[str] = []
    seen: set[str] = set()
    while len(words) < 2 * count:
        word = (
            rng.choice(onsets)
            + rng.choice(vowels)
            + rng.choice(onsets)
            + rng.choice(vowels)
            + rng.choice(ends)
        )
        if word not in seen:
            seen.add(word)
            words.append(word.capitalize())
    return [f"{first} {last}" for first, last in zip(words[::2], words[1::2], strict=True)]


def fact_documents(facts: list[Fact], seed: int = SEED) -> Iterator[str]:
    """One pass' worth of small documents of one to four statements, every fact told as often as its share."""
    rng = random.Random(seed + 1)
    told = [fact for fact in facts for _ in range(EXPOSURES[fact["frequency"]])]
    rng.shuffle(told)
    while told:
        group, told = told[: (size := rng.randint(1, 4))], told[size:]
        yield " ".join(statement(fact, rng) for fact in group) + "\n"


def statement(fact: Fact, rng: random.Random) -> str:
    trained = [prompt for place, prompt in enumerate(fact["prompts"]) if place != fact["withheld"]]
    return f"{rng.choice(trained)} {fact['object']}."


def save_facts(facts: list[Fact], path: Path) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(fact) for fact in facts) + "\n]\n", encoding="utf-8")


def describe(facts: list[Fact]) -> str:
    counts = Counter(fact["frequency"] for fact in facts)
    return ", ".join(f"{counts[name]} {name} ({EXPOSURES[name]} times a pass)" for name in FREQUENCIES)
