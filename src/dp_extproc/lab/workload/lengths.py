"""How long prompts and answers are, in several kinds of traffic.

Tokens by 100,000 draws; a test holds the means to it:

=============  ======  ======  ======  ======  ======  ======
.              prompt                  answer
-------------  ----------------------  ----------------------
name           mean    median  99 %    mean    median  99 %
=============  ======  ======  ======  ======  ======  ======
seed             2560    2390    4080    1160     835    3950
sharegpt          280     130    2440     245     150    1560
azure            1330     900    7430     215     160    1000
agent            6660    4010  30,000     270     180    1490
long             6680     990   107 k     230     170    1000
=============  ======  ======  ======  ======  ======  ======
"""

from collections.abc import Callable
from random import Random
from typing import Final

Lengths = Callable[[Random], tuple[int, int]]
"""Draws the tokens of one prompt and of its answer."""


def _lognormal(rng: Random, median: float, sigma: float, least: int, most: int) -> int:
    return min(most, max(least, round(median * rng.lognormvariate(0, sigma))))


def _even(rng: Random, least: int, mean: int, most: int) -> int:
    """Draw evenly from least to mean or from mean to most, each as often as it takes to have that mean."""
    # The means of the halves are (least + mean) / 2 and (mean + most) / 2; their mix has to have the mean.
    lower = (most - mean) / (most - least)
    return rng.randint(least, mean) if rng.random() < lower else rng.randint(mean, most)


def seed(rng: Random) -> tuple[int, int]:
    """The benchmark of sgl-project/sglang#20435: inputs 1481-4120, mean 2560; outputs 187-4068, mean 1160."""
    return _even(rng, 1481, 2560, 4120), _even(rng, 187, 1160, 4068)


def seed_prompts(rng: Random) -> tuple[int, int]:
    """The same inputs with one token of output: its runs for the time to first token."""
    return _even(rng, 1481, 2560, 4120), 1


def sharegpt(rng: Random) -> tuple[int, int]:
    """Chats: short, with a long tail, as the ShareGPT conversations that serving benchmarks replay."""
    return _lognormal(rng, 130, 1.25, 4, 4000), _lognormal(rng, 150, 1.0, 4, 2000)


def azure(rng: Random) -> tuple[int, int]:
    """Much like the conversations of the Azure LLM inference trace of 2023, with a longer tail.

    There inputs have mean 1155 and median 1020, outputs mean 211 and median 129.
    """
    return _lognormal(rng, 900, 0.9, 16, 8000), _lognormal(rng, 160, 0.8, 4, 1000)


def agent(rng: Random) -> tuple[int, int]:
    """Coding agents: long and very uneven inputs, mean 7000, short answers."""
    return _lognormal(rng, 4000, 1.1, 64, 30_000), _lognormal(rng, 180, 0.9, 8, 2000)


def long_context(rng: Random) -> tuple[int, int]:
    """Chats, of which 8 % bring a document of 32k to 128k tokens."""
    if rng.random() < 0.08:
        return round(32_000 * 4 ** rng.random()), _lognormal(rng, 300, 0.8, 16, 2000)
    return azure(rng)


def conversation_text(rng: Random) -> int:
    """Draw the tokens that a user adds in one turn of a long conversation: a question, or a page with it."""
    return _lognormal(rng, 1200, 1.0, 50, 8000)


def conversation_output(rng: Random) -> int:
    """Draw the tokens of the answer to one turn."""
    return _lognormal(rng, 200, 0.7, 16, 1500)


LENGTHS: Final[dict[str, Lengths]] = {
    "seed": seed,
    "seed-prompts": seed_prompts,
    "sharegpt": sharegpt,
    "azure": azure,
    "agent": agent,
    "long": long_context,
}
