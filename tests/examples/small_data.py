"""Data of the form that the examples read, but tiny and easy: packages in a folder, as they would lie installed."""

from __future__ import annotations

import gzip
import math
import random
from collections.abc import Callable
from pathlib import Path

DRAW = random.Random


def movie_reviews(path: Path) -> None:
    """One word of four that all the others hide says it, wherever it stands."""
    draw, lines = DRAW(0), ["text,label,source"]
    for i in range(400):
        words = draw.choices(["the", "film", "of", "a"], k=draw.randint(0, 9))
        words.insert(draw.randint(0, len(words)), draw.choice(["good", "fine"] if i % 2 else ["bad", "poor"]))
        lines.append(f'"{" ".join(words)}",{i % 2},{"imdb" if i > 360 else "rotten_tomatoes"}')
    path.write_text("\n".join(lines) + "\n")


def cmudict(path: Path) -> None:
    """A letter is a phoneme, but so is "sh", and "e" is silent. The last vowel is stressed; "a" has two sounds."""
    draw, lines = DRAW(1), []
    parts = ["a", "o", "sh", "s", "t", "te"]
    for word in sorted({"".join(draw.choices(parts, k=draw.randint(1, 4))) for _ in range(700)}):
        sounds = word.replace("sh", "X").replace("e", "")
        last = max(sounds.rfind("a"), sounds.rfind("o"))
        said = {"a": "AE", "o": "OW", "X": "SH", "s": "S", "t": "T"}
        phonemes = [said[s] + str(int(i == last)) * (s in "ao") for i, s in enumerate(sounds)]
        lines.append(f"{word} {' '.join(phonemes)}")
        if "a" in word:
            lines.append(f"{word}(2) {' '.join(phonemes).replace('AE', 'EY')} # a comment")
    path.write_text("\n".join(["o'clock K", *lines]) + "\n")


def japanese_vowels(path: Path) -> None:
    """Every speaker has another four of the first nine series high."""
    draw, lines = DRAW(4), ["# comment", "@classLabel true 1 2 3 4 5 6 7 8 9", "@data"]
    for i in range(180 if "TRAIN" in path.name else 45):
        steps, speaker = draw.randint(7, 12), i % 9
        series = [[draw.gauss(1.5 * ((speaker + channel) % 9 < 4), 0.3) for _ in range(steps)] for channel in range(12)]
        lines.append(":".join(",".join(f"{x:.3f}" for x in one) for one in series) + f":{speaker + 1}")
    path.write_text("\n".join(lines) + "\n")


def digits(path: Path) -> None:
    """Two rows of pixels for each bit of the digit, dark for 1."""
    draw, lines = DRAW(2), []
    for i in range(300):
        pixels = [draw.randint(0, 4) + 12 * (i % 10 >> bit & 1) for bit in range(4) for _ in range(16)]
        lines.append(",".join(map(str, [*pixels, i % 10])))
    with gzip.open(path, "wt") as file:
        file.write("\n".join(lines) + "\n")


def play(path: Path) -> None:
    """Eight words in random order: 3 bits a word, which has 5.5 characters with the space."""
    words = ["to", "be", "or", "question", "whether", "nobler", "in", "mind"]
    path.write_text(" ".join(DRAW(5).choices(words, k=4000)), encoding="utf-8")


def temperatures(path: Path) -> None:
    """A hundred days, each warm or cold: after midnight one knows which."""
    draw, lines = DRAW(3), ["date,temp"]
    for _ in range(100):
        warm = draw.choice([10, 30])
        lines += [f"2010/01/01 {hour:02d}:00,{50 + warm * math.sin(math.pi * hour / 24):.1f}" for hour in range(24)]
    path.write_text("\n".join(lines) + "\n")


def environments(path: Path) -> None:
    """An episode's first observation says which action is right in all of it; a wrong one ends it, so do ten steps."""
    path.write_text(
        '''
from types import SimpleNamespace

import numpy as np


def make_vec(name, number):
    return Environments(number)


class Environments:
    """As gymnasium's: the step after an episode's last one begins the next, whatever the action, and pays nothing."""

    spec = SimpleNamespace(reward_threshold=9.0)

    def __init__(self, number):
        self.number = number

    def reset(self, seed):
        self.draw = np.random.default_rng(seed)
        self.ages, self.over = np.zeros(self.number), np.zeros(self.number, bool)
        self.right = self.draw.integers(2, size=self.number)
        return self.observation(), {}

    def observation(self):
        x = np.full((self.number, 4), np.nan, np.float32)  # what nobody is to look at
        x[:, 0], x[:, 2] = (self.ages == 0) * (2 * self.right - 1), 0
        return x

    def step(self, actions):
        begun = self.over
        self.ages = np.where(begun, 0, self.ages + 1)
        self.right = np.where(begun, self.draw.integers(2, size=self.number), self.right)
        terminated = ~begun & (actions != self.right)
        truncated = ~begun & ~terminated & (self.ages == 10)
        self.over = terminated | truncated
        return self.observation(), (~begun).astype(np.float32), terminated, truncated, {}
'''
    )


PACKAGES: dict[str, Callable[[Path], None]] = {
    "aeon/datasets/data/JapaneseVowels/JapaneseVowels_TRAIN.ts": japanese_vowels,
    "aeon/datasets/data/JapaneseVowels/JapaneseVowels_TEST.ts": japanese_vowels,
    "cmudict/data/cmudict.dict": cmudict,
    "vega_datasets/_data/seattle-temps.csv": temperatures,
    "shksprdata/texts/play_gut.txt": play,
    "sklearn/datasets/data/digits.csv.gz": digits,
    "movie_reviews/data/combined_movie_reviews.csv": movie_reviews,
    "gymnasium/__init__.py": environments,
}


def install(folder: Path) -> None:
    """Writes all of them below folder, which then stands on Python's path for packages."""
    for name, write in PACKAGES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name.split("/")[0] / "__init__.py").write_text("raise AssertionError('is read, not imported')\n")
        write(folder / name)
