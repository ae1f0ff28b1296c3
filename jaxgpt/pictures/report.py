"""Writes the pictures of a model and of what it does with a text: PNG files, and one HTML page with all of them as
SVG."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxgpt.config import GPTConfig
from jaxgpt.files import new_directory, write_text
from jaxgpt.interpret import Inside, token_labels
from jaxgpt.pictures import reading, readout
from jaxgpt.pictures.architecture import architecture, describe
from jaxgpt.pictures.page import Section, page
from jaxgpt.pictures.readout import Readout
from jaxgpt.pictures.style import save, to_svg
from jaxgpt.tokenizer import Tokenizer, get_tokenizer

# With more, the maps would be unreadable.
MOST_TOKENS = 128

# The file's name without suffix, the figure, its description in words, and what makes its readout once it is laid out.
Picture = tuple[str, Figure, str, Callable[[], Readout | None]]
Part = tuple[str, str, str, Iterator[Picture]]  # a section's anchor, title, text and pictures

_LENS = (
    "Every block adds to the same stream of numbers, and the output head normally reads only its last state. Here it "
    "reads every state: each row is what the model would predict if it stopped there, from the embeddings at the "
    "bottom to its real answer at the top. Tokens that did come next are outlined."
)


def write_pictures(
    directory: str | Path, name: str, config: GPTConfig, inside: Inside | None = None, prompt: str | None = None
) -> list[Path]:
    """Draws the architecture and, with `inside`, what happened while the model read the prompt: attention by block and
    head, the next token at each position, and the logit lens. Overwrites files of the same names.

    Args:
        directory: where to write; created if it does not exist.
        name: the model's name, for titles.
        config: the model's config.
        inside: from `jaxgpt.interpret.look_inside`.
        prompt: the text that `inside` is about, to be quoted.

    Returns:
        The paths of index.html, which needs no other file, and then of the PNG files.

    Raises:
        ValueError: for more than `MOST_TOKENS` tokens.
        MissingExtraError: without the extra [plot].
        OSError: if the files cannot be written.
    """
    _check_length(inside)
    return _write(directory, f"Inside {name}", prompt, _sections(name, config, inside))


def write_comparison(
    directory: str | Path, names: Sequence[str], config: GPTConfig, insides: Sequence[Inside], prompt: str
) -> list[Path]:
    """Draws what two models with the same tokenizer make of the same text: the next token after each position side by
    side, and the logit lens of each. Overwrites files of the same names.

    Args:
        directory: where to write; created if it does not exist.
        names: the models' names, for titles.
        config: the first one's config, for the tokenizer.
        insides: what `jaxgpt.interpret.look_inside` saw in each, of the same ids.
        prompt: the text, to be quoted.

    Returns:
        The paths of index.html, which needs no other file, and then of the PNG files.

    Raises:
        ValueError: for more than `MOST_TOKENS` tokens, or for models that did not read the same ids.
        MissingExtraError: without the extra [plot].
        OSError: if the files cannot be written.
    """
    _check_length(insides[0])
    if insides[0].ids_T.tolist() != insides[1].ids_T.tolist():
        raise ValueError("the two models have not read the same ids: compare models with the same tokenizer")
    return _write(directory, f"{names[0]} and {names[1]}", prompt, _compared(names, config, insides))


def _check_length(inside: Inside | None) -> None:
    if inside is not None and len(inside.ids_T) > MOST_TOKENS:
        raise ValueError(
            f"pictures of {len(inside.ids_T)} tokens could not be read: the most is {MOST_TOKENS}; shorten the prompt"
        )


def _write(directory: str | Path, title: str, prompt: str | None, parts: Iterator[Part]) -> list[Path]:
    directory = new_directory(directory, force=True)
    directory.mkdir(parents=True, exist_ok=True)
    sections, paths = [], [directory / "index.html"]
    for anchor, heading, text, pictures in parts:
        svgs, readouts = [], []
        for file_name, figure, words, tell in pictures:
            paths.append(directory / f"{file_name}.png")
            save(figure, paths[-1])
            svgs.append(to_svg(figure, file_name, words))
            readouts.append(tell())
        sections.append(Section(anchor, heading, text, svgs, readouts))
    write_text(paths[0], page(title, prompt, sections))
    return paths


def _compared(names: Sequence[str], config: GPTConfig, insides: Sequence[Inside]) -> Iterator[Part]:
    tokenizer = get_tokenizer(config.tokenizer)
    labels = token_labels(tokenizer, insides[0].ids_T)
    top_labels = [_top_labels(tokenizer, inside) for inside in insides]
    said = [_next_in_words(labels, tops) for tops in top_labels]
    yield (
        "side-by-side",
        "The next token, side by side",
        "The likeliest next tokens after each position, of both models; the one that did come is outlined. A bar says "
        f"by how many bits {names[1]} finds what came likelier (to the right) or less likely (to the left) than "
        f"{names[0]}.",
        _numbered(
            "side-by-side",
            reading.comparison(names, insides, labels, top_labels),
            f"{names[0]}: {said[0]} {names[1]}: {said[1]}",
            lambda figures: readout.comparison(figures, names, insides, labels, top_labels),
        ),
    )
    for i, (name, inside, tops) in enumerate(zip(names, insides, top_labels, strict=True), start=1):
        yield f"lens-{i}", f"The logit lens: {name}", _LENS, _lens_pictures(f"lens-{i}", inside, labels, tops)


def _lens_pictures(name: str, inside: Inside, labels: Sequence[str], top_labels: Any) -> Iterator[Picture]:
    return _numbered(
        name,
        reading.lens(inside, labels, top_labels),
        _lens_in_words(top_labels),
        lambda figures: readout.lens(figures, inside, labels, top_labels),
    )


def _top_labels(tokenizer: Tokenizer, inside: Inside) -> list[list[list[str]]]:
    return [[token_labels(tokenizer, ids_K) for ids_K in ids_TxK] for ids_TxK in inside.top_ids_NxTxK]


def _sections(name: str, config: GPTConfig, inside: Inside | None) -> Iterator[Part]:
    """Yields each section's anchor, title, text and pictures. Figures are large, so they are made one at a time."""
    if inside is not None:
        tokenizer = get_tokenizer(config.tokenizer)
        labels = token_labels(tokenizer, inside.ids_T)
        top_labels = _top_labels(tokenizer, inside)
        yield (
            "next-tokens",
            "The next token",
            "After each token that it reads, the model gives every token of its vocabulary a probability of coming "
            "next. A row shows the most likely ones, and on its right the token that did come, outlined if it is among "
            "them.",
            _numbered(
                "next-tokens",
                reading.next_tokens(inside, labels, top_labels),
                _next_in_words(labels, top_labels),
                lambda figures: readout.next_tokens(figures, inside, labels, top_labels),
            ),
        )
        yield (
            "lens",
            "The logit lens",
            _LENS,
            _lens_pictures("lens", inside, labels, top_labels),
        )
        yield (
            "attention",
            "Attention",
            "Where each token (a row) looks for what it needs, among the tokens before it and itself (the columns). "
            "The weights of a row add up to 1. The colour scale is a square root, so that small weights are visible; "
            "positions that a token cannot see are blank.",
            (_attention(config, inside, layer, labels) for layer in range(config.n_layers)),
        )
    yield (
        "architecture",
        "The architecture",
        "T tokens enter at the bottom; the shapes on the way up are those for one text. Dropout, which acts only in "
        "training, is not drawn.",
        iter([("architecture", architecture(name, config), describe(config), lambda: None)]),
    )


def _attention(config: GPTConfig, inside: Inside, layer: int, labels: Sequence[str]) -> Picture:
    figure = reading.attention(config, inside, layer, labels)
    words = (
        f"Attention weights of the {config.n_heads} heads of block {layer}, one map each, over {len(labels)} tokens."
    )
    return f"attention-{layer:02d}", figure, words, functools.partial(readout.attention, figure, inside, layer, labels)


def _numbered(
    name: str, figures: Sequence[Figure], words: str, tell: Callable[[Sequence[Figure]], Iterator[Readout]]
) -> Iterator[Picture]:
    readouts = tell(figures)
    for i, figure in enumerate(figures):
        numbered = name if len(figures) == 1 else f"{name}-{i + 1}"
        yield numbered, figure, words, functools.partial(next, readouts)


def _next_in_words(labels: Sequence[str], top_labels: Sequence) -> str:
    likeliest = ", ".join(f"after {label} {tops[0]}" for label, tops in zip(labels, top_labels[-1], strict=True))
    return f"The likeliest next token: {likeliest}."


def _lens_in_words(top_labels: Sequence) -> str:
    said = [places[-1][0] for places in top_labels]
    after = ", ".join(f"block {i} {label}" for i, label in enumerate(said[1:]))
    return f"What the model would predict after the last token: at the embeddings {said[0]}, after {after}."
