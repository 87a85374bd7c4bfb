"""The closed vocabulary of the lab: one word is one token.

Ids are stable: special tokens, relation words, then the four classes of entities
in the order of `ENTITY_CLASSES`.  A text is words joined by one blank, so
``encode(a) + encode(b) == encode(a + " " + b)`` holds for any split between words.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD: Final = "<pad>"
BOS: Final = "<s>"
EOS: Final = "</s>"
UNKNOWN: Final = "<unk>"
STOP: Final = "."
QUESTION: Final = "Q:"
PASSAGE: Final = "Passage:"

SPECIAL_WORDS: Final = (PAD, BOS, EOS, UNKNOWN, STOP, QUESTION, PASSAGE)

RELATION_WORDS: Final = (
    "employer-of",
    "interests-of",
    "city-of",
    "employer-and-city-of",
    "words-after",
    "workplace-of",
    "interests-reversed-of",
    "employee-of",
    "fan-of",
    "tenants-of",
)

PERSONS: Final = tuple(
    """
    Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nathan Olivia Peter
    Quinn Rachel Simon Tina Ulrich Vera Walter Xenia Yusuf Zoe Adam Bella Cedric Diana Edgar Fiona
    Gustav Helen Ivan Julia Kevin Laura Martin Nina Oscar Paula Ralph Sofia Thomas Ursula Victor Wendy
    Xavier Yvonne Zachary Anton Bianca Carlos Daphne Erik Flora George Hanna Igor Jasmine Klaus Lydia
    Marcus Nora Otto Petra Quentin Rosa Stefan Theresa Umberto Valerie William Ximena Yannick Zelda Arthur
    Beatrice Conrad Dora Elias Felicia Gordon Hilda Isaac Joanna Kurt Louise Miguel Naomi Orlando Priya
    Robert Sylvia Tobias
    """.split()
)

ORGANISATIONS: Final = tuple(
    """
    Acme Borealis Cobalt Dynamo Everest Falcon Globex Helix Initech Juniper Kestrel Lumen Meridian Nimbus
    Orion Pinnacle Quasar Redwood Solaris Titan Umbra Vertex Wayfarer Xylon Yonder Zenith Apex Beacon
    Cascade Delphi Ember Frontier Granite Horizon Ironclad Jetstream Keystone Lattice Monolith Nexus Obsidian
    Paragon Quarry Ridgeline Summit Terrace Upland Vanguard Whitestone Xenon Yellowtail Zephyr Anchor
    Bluebird Citadel Drift Eclipse Foundry Glacier Harbor Indigo Javelin Kite Lantern Mosaic Northstar
    Oakley Prism Quill Rampart Sextant Tundra Unison Vortex Willow Xebec Yarrow Zodiac Argon Bastion
    Compass Dovetail Element Firefly Gateway Hammer Isotope Jigsaw Kiln Ledger Magnet Needle Outpost
    Pylon Quiver Rocket
    """.split()
)

CITIES: Final = tuple(
    """
    Athens Berlin Cairo Dublin Edinburgh Florence Geneva Hamburg Istanbul Jakarta Kyoto Lisbon Madrid Nairobi
    Oslo Paris Quito Rome Seoul Tokyo Utrecht Vienna Warsaw Xiamen Yerevan Zurich Ankara Boston Chicago
    Denver Essen Frankfurt Glasgow Houston Innsbruck Jerusalem Kolkata London Milan Naples Ottawa Prague
    Quebec Riga Sydney Toronto Ulm Venice Wellington Xining York Zagreb Austin Brussels Copenhagen Dallas
    Eindhoven Freiburg Ghent Helsinki Incheon Johannesburg Kigali Lima Manila Nice Osaka Perth Qingdao
    Rotterdam Stockholm Taipei Uppsala Valencia Wuhan Xalapa Yokohama Zaragoza Accra Bergen Cologne Delhi
    Erfurt Fukuoka Granada Havana Izmir Jaipur Krakow Lyon Munich Nagoya Odense Porto Reykjavik Salzburg
    """.split()
)

INTERESTS: Final = tuple(
    """
    apples baking chess dancing engraving fishing gardening hiking icons jazz knitting lemons music novels
    opera painting quilts running sailing tennis umbrellas violins walking xylophones yoga zithers archery
    books cycling drawing espresso fencing guitars hockey islands juggling karate languages mountains nuts
    origami poetry quizzes rowing skiing tea ukuleles vases weaving yachts zebras almonds birds candles
    dogs embroidery films ginger honey insects jade kayaks lilies maps noodles oysters pottery quartz
    rugby stamps trains urns velvet wine yarn zinnias astronomy ballet cats dominoes eggs flutes geology
    horses ink jewels kites lace magic nature olives puzzles radios roses singing theatre
    """.split()
)

ENTITY_CLASSES: Final = (PERSONS, ORGANISATIONS, CITIES, INTERESTS)
ENTITIES_PER_CLASS: Final = len(PERSONS)

WORDS: Final = SPECIAL_WORDS + RELATION_WORDS + tuple(word for members in ENTITY_CLASSES for word in members)
TOKEN_IDS: Final = {word: index for index, word in enumerate(WORDS)}
VOCABULARY_SIZE: Final = len(WORDS)


def encode(words: list[str]) -> list[int]:
    """Token ids of `words`; an unknown word raises `KeyError`."""
    return [TOKEN_IDS[word] for word in words]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer; it adds no special tokens of its own."""
    backend = Tokenizer(WordLevel(dict(TOKEN_IDS), unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` into `folder`.

    The class is written under the name that every transformers release knows.
    """
    make_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
