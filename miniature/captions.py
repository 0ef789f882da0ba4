"""The text from which the miniature's tokenizers learn: what it is trained on, and other captions.

The captions of the scenes come first and often, so that each of their words becomes one token; a few
hundred other words stand for everything else that people write.
"""

import numpy as np

from miniature.grammar import caption
from miniature.scenes import scenes

COLOURS = """
red orange yellow green blue purple pink brown black white grey gray golden silver crimson turquoise
violet teal beige amber emerald scarlet indigo magenta cyan
"""

SHAPES = """
circle square triangle star ring cross stripe diamond heart moon arrow wave spiral cube sphere cone
cylinder pyramid oval rectangle hexagon polygon dot line grid
"""

PLACES = """
left right top bottom middle centre center corner edge above below beside behind between under over
near inside outside around across along front back foreground background
"""

THINGS = """
cat dog fox bird horse lion tiger bear wolf rabbit owl fish whale dragon robot astronaut person
woman man child girl boy king queen knight wizard farmer fisherman dancer musician chef doctor
soldier house castle tower bridge church temple station market street city village harbour
lighthouse garden forest mountain river lake ocean sea beach island desert valley waterfall field
meadow sky cloud sun rain snow storm fog mist night morning evening sunset sunrise winter summer
spring autumn tree flower rose leaf grass root mushroom apple lemon cherry bread cake coffee tea
bottle glass cup plate table chair lamp book letter map clock mirror window door stairs wall roof
car train ship boat bicycle plane balloon rocket bus engine wheel machine camera computer phone
guitar piano violin drum hat coat dress suitcase umbrella crown sword ring stone crystal gold iron
wood paper fabric leather smoke fire water ice light shadow reflection pattern texture poster logo
sign word text portrait landscape photograph picture image painting drawing sketch illustration
watercolour watercolor render cartoon comic icon print sculpture mosaic hair eye face hand beard
smile skin feather fur wing tail
"""

QUALITIES = """
small large big tiny huge tall short long wide narrow round flat bright dark light soft hard old
young new ancient modern futuristic medieval vintage beautiful elegant simple detailed intricate
realistic abstract minimal surreal dramatic cinematic colourful colorful vivid pale warm cold wet
dry quiet busy empty crowded single double broken shiny rusty wooden metal stone transparent glowing
floating flying running sitting standing sleeping walking looking holding wearing waiting smiling
reading playing dancing fine full open closed high low deep shallow sharp blurry noisy ugly bad poor
best good great quality professional natural studio macro overcast foggy sunny rainy snowy
"""

SMALL_WORDS = """
a an the of on in at with without and or to from by for as is are it its this that two three four
five many some no not one very against into through while during up down off out like style view
made depth field focus lens shot angle close wide eight seven six nine ten hundred
"""

PHRASES = (
    "a photograph of an astronaut riding a horse on the moon",
    "a capybara holding a sign that reads hello world",
    "portrait of an old fisherman with a white beard, knitted cap, overcast light, 85mm",
    "low quality, blurry, ugly, bad anatomy, watermark, signature, extra fingers, jpeg artifacts",
    "highly detailed, sharp focus, cinematic lighting, 4k, masterpiece, trending, concept art",
    "oil on canvas, in the style of the seventeenth century, chiaroscuro, dramatic shadows",
    "an isometric view of a tiny city inside a glass bottle, soft studio light",
    "the quick brown fox jumps over the lazy dog, isn't it? we're sure they've seen what she'd do!",
    "macro photograph of a bee on a sunflower; shallow depth of field (f/2.8), golden hour",
    "a watercolour of a village by the sea: boats, nets and gulls, 1920 to 1930",
)


def captions() -> list[str]:
    """The training text: the same sentences every time, with every word above in several."""
    colours, shapes, places = COLOURS.split(), SHAPES.split(), PLACES.split()
    things, qualities, small_words = THINGS.split(), QUALITIES.split(), SMALL_WORDS.split()
    sentences = list(PHRASES)
    for index, colour in enumerate(colours):
        for offset, shape in enumerate(shapes):
            place = places[(index + offset) % len(places)]
            other = colours[(index + offset + 1) % len(colours)]
            sentences.append(f"a {colour} {shape} at the {place} on a {other} background")
    for repeat in range(4):
        for index, thing in enumerate(things):
            quality = qualities[(index + 31 * repeat) % len(qualities)]
            small = small_words[(index + 17 * repeat) % len(small_words)]
            scene = things[(index * (2 * repeat + 3) + repeat) % len(things)]
            sentences.append(f"a {quality} {thing} {small} the {scene}")
    rng = np.random.default_rng(0)
    seen = [caption(scene, rng) for scene in scenes()[::6]]
    words = sorted({word for sentence in seen for word in sentence.replace(",", "").split()})
    # SentencePiece takes a whole word only when it stands in two forms: with a comma and without.
    return [*seen, ", ".join(words) + ".", *sentences]
