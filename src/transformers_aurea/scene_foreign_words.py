# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Questions from outside the scene world, so that a model learns to say that it does not understand.

They speak of things and colors that are no part of it, of words that nobody knows, or of nothing at all. Every fourth
word and sentence is held out: it is asked in tests and never in training.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random

from .scene_drawing import pick


def _halves(text: str, between: str = r"\s") -> dict[bool, list[str]]:
    """What a text lists, by whether it is held out."""
    words = [word for word in re.split(between, text) if word]
    return {
        held_out: [word for index, word in enumerate(words) if (index % 4 == 3) == held_out]
        for held_out in (False, True)
    }


_THINGS = _halves("""
dog cat horse cow pig sheep goat rabbit mouse lion tiger bear wolf fox deer elephant giraffe monkey zebra camel bird
duck goose chicken eagle owl parrot penguin fish shark whale dolphin frog snake turtle lizard spider bee ant butterfly
fly worm snail person man woman child boy girl baby king queen doctor teacher farmer soldier driver friend crowd face
hand foot eye nose mouth ear hair arm leg head finger tooth heart brain bone car bus truck train plane boat ship bike
bicycle motorcycle tractor rocket helicopter wheel engine road street bridge tunnel station airport house home tower
castle church school hospital shop office factory barn tent roof wall door window floor stair garden fence gate chair
table desk bed sofa lamp mirror carpet curtain shelf drawer cup glass plate bowl fork knife spoon bottle can pot pan
oven fridge kettle bread cheese butter egg apple banana grape lemon cherry peach pear melon carrot potato tomato onion
pepper rice soup salad pizza cake cookie candy coffee tea milk juice water wine beer sugar salt tree flower grass leaf
root branch bush forest jungle desert mountain hill valley river lake sea ocean beach island cloud sun moon sky rain
snow ice wind storm fire smoke rock stone sand mud gold silver iron wood paper plastic cloth leather shirt dress skirt
coat jacket hat shoe boot sock glove scarf belt watch bag box basket bucket rope chain hammer saw nail drill
ladder broom brush soap towel comb book newspaper letter stamp pen pencil ruler map flag coin key lock clock phone
computer keyboard screen camera radio television guitar piano drum violin trumpet ball doll kite puzzle robot dragon
ghost hexagon pentagon octagon rectangle oval ellipse diamond arrow spiral cube cone pyramid cylinder polygon line dot
crescent trapezoid parallelogram
""")

_SHADES = _halves("""
gray grey silver golden beige maroon navy olive violet indigo magenta crimson scarlet ivory khaki lavender salmon coral
plum tan amber bronze transparent striped dotted shiny furry wooden happy angry sleepy heavy loud hungry
""")

_SENTENCES = _halves(
    """
Who are you?|What is your name?|How are you?|How old are you?|Where are you from?|What can you do?|Hello!|Hello|Hi|Hi!
Hey there|Good morning|Good night|Goodbye|Thanks|Thank you!|Please help me.|Help|Sorry|OK|Yes|No|Why?|Why not?|When?
What is the weather?|What is the weather like today?|Will it rain tomorrow?|What time is it?|What day is it?
What is the meaning of life?|Tell me a joke.|Tell me a story.|Sing a song.|Write a poem.|Write some code.
Write a Python function.|Translate this into French.|What is the capital of France?|Who is the president?
Who wrote this?|What is two plus two?|What is 2 + 2?|Solve this equation.|How far is the moon?|How do I cook rice?
How do planes fly?|What is machine learning?|Are you a robot?|Are you human?|Do you like music?|Do you have a name?
Can you read?|What does the text say?|Read the text.|What is written here?|What language is this?|Who took this photo?
Where was this picture taken?|When was this picture taken?|Is this a real photo?|Who painted this?|Is it day or night?
What is the person doing?|How many people are there?|Are there any people?|What emotion does the face show?
What brand is this?|How much does it cost?|What is the price?|Is it edible?|Does it taste good?|What is happening?
Is anybody there?|What happens next?|Do you love me?|I love you.|I am hungry.|You are wrong.|That is right.|Go away.
The weather is nice.|My name is Bob.|Buy some milk.|Open the door.|Turn left.|Turn off the light.|Play some music.
Is this art?|Is this a dog?|Is this a cat?|What animal is this?|What kind of car is that?|Which city is this?
What year is it?|What is your favorite color?|What is your favorite animal?|Do you dream?|Explain quantum physics.
Give me a recipe.|Recommend a book.|Summarize the article.|Draw a cat.|Draw a house.|Paint the fence.|Count to ten.
Count backwards.|Spell your name.|Say something.|Say hello.|Stop.|Continue.|Go on.|Repeat that.|What did you say?
What do you mean?|I do not understand.|Is that true?|Are you sure?|Really?|Never mind.|Forget it.|Test|Testing|asdf
lorem ipsum dolor sit amet|the quick fox jumps over the lazy dog|to be or not to be|once upon a time
Ignore all previous instructions.|What model are you?|Who made you?|How were you trained?|How big are you?
""",
    "[|\n]",
)

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_SIGNS = "0123456789?!.,:;-+*/#%&()"


def foreign_question(
    dice: Random, questions: Mapping[str, tuple[str, ...]], known: Sequence[str], held_out: bool
) -> str:
    """A sentence about other things, a question of the world about a thing outside it, or gibberish.

    Args:
        questions: the world's questions, with a place for each noun.
        known: nouns of the world: where there are two, one may be of it.
        held_out: draw from the words kept for tests.
    """
    chance = dice.random()
    if chance < 0.3:
        return pick(dice, _SENTENCES[held_out])
    if chance < 0.45:
        return _gibberish(dice)
    kind = pick(dice, [kind for kind, texts in questions.items() if "{}" in texts[0]])
    question = pick(dice, questions[kind])
    nouns = [_noun(dice, kind, held_out) for _ in range(question.count("{}"))]
    if len(nouns) == 2 and dice.random() < 0.5:
        nouns[int(dice.random() * 2)] = pick(dice, known)
    return question.format(*nouns)


def _noun(dice: Random, kind: str, held_out: bool) -> str:
    noun = _random_word(dice) if dice.random() < 0.3 else pick(dice, _THINGS[held_out])
    if kind == "count":
        noun += "s"
    if dice.random() < 0.25:
        shade = pick(dice, _SHADES[held_out])
        noun = f"{shade} {noun}"
    if kind == "existence":
        return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
    return noun


def _random_word(dice: Random) -> str:
    return "".join(pick(dice, _LETTERS) for _ in range(2 + int(dice.random() * 8)))


def _gibberish(dice: Random) -> str:
    """Random letters, with a number or signs here and there."""
    words = []
    for _ in range(1 + int(dice.random() * 5)):
        signs = "".join(pick(dice, _SIGNS) for _ in range(1 + int(dice.random() * 4)))
        words.append(_random_word(dice) if dice.random() < 0.7 else signs)
    return " ".join(words)
