"""A reward of one's own: how pleasant a text's words are, by a lexicon of ratings.

    VALENCE_LEXICON=vader_lexicon.txt prefopt train grpo --model MODEL --data prompts.jsonl \\
        --out runs/pleasant \\
        reward=docs/examples/valence.py:valence

The lexicon has a word and its mean rating on each line, tab between them, as VADER's has (Hutto and Gilbert 2014).
"""

import os
import re

with open(os.environ["VALENCE_LEXICON"], encoding="utf-8") as file:
    RATINGS = {word: float(rating) for word, rating in (line.split("\t")[:2] for line in file)}


def valence(completions, log_metric=None, **columns):
    """The mean rating of a text's words, -4 to 4; a word without one counts as 0, and so does a text without words.

    A mean, not a sum: a sum pays for length. It still pays for saying "love" over and over; see `repetition`.
    """
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    words = [re.findall(r"[a-z']+", text.lower()) for text in texts]
    if log_metric:
        rated = sum(word in RATINGS for text in words for word in text)
        log_metric("rated_words", rated / max(1, sum(map(len, words))))
    return [sum(RATINGS.get(word, 0.0) for word in text) / max(1, len(text)) for text in words]
