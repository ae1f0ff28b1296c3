"""Writes the pictures of a model and of what it does with a text: PNG files, and one HTML page with all of them as
SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from jaxgpt.config import GPTConfig
from jaxgpt.files import new_directory, write_text
from jaxgpt.interpret import Inside, token_labels
from jaxgpt.pictures import reading
from jaxgpt.pictures.architecture import architecture, describe
from jaxgpt.pictures.page import Section, page
from jaxgpt.pictures.style import save, to_svg
from jaxgpt.tokenizer import get_tokenizer

# With more, the maps would be unreadable.
MOST_TOKENS = 128

Picture = tuple[str, Figure, str]  # the file's name without suffix, the figure, and its description in words


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
    if inside is not None and len(inside.ids_T) > MOST_TOKENS:
        raise ValueError(
            f"pictures of {len(inside.ids_T)} tokens could not be read: the most is {MOST_TOKENS}; shorten the prompt"
        )
    directory = new_directory(directory, force=True)
    directory.mkdir(parents=True, exist_ok=True)
    sections, paths = [], [directory / "index.html"]
    for anchor, title, text, pictures in _sections(name, config, inside):
        svgs = []
        for file_name, figure, words in pictures:
            paths.append(directory / f"{file_name}.png")
            save(figure, paths[-1])
            svgs.append(to_svg(figure, file_name, words))
        sections.append(Section(anchor, title, text, svgs))
    write_text(paths[0], page(f"Inside {name}", prompt, sections))
    return paths


def _sections(name: str, config: GPTConfig, inside: Inside | None) -> Iterator[tuple[str, str, str, Iterator[Picture]]]:
    """Yields each section's anchor, title, text and pictures. Figures are large, so they are made one at a time."""
    if inside is not None:
        tokenizer = get_tokenizer(config.tokenizer)
        labels = token_labels(tokenizer, inside.ids_T)
        top_labels = [[token_labels(tokenizer, ids_K) for ids_K in ids_TxK] for ids_TxK in inside.top_ids_NxTxK]
        yield (
            "next-tokens",
            "The next token",
            "After each token that it reads, the model gives every token of its vocabulary a probability of coming "
            "next. A row shows the most likely ones, and on its right the token that did come, outlined if it is among "
            "them.",
            _numbered(
                "next-tokens", reading.next_tokens(inside, labels, top_labels), _next_in_words(labels, top_labels)
            ),
        )
        yield (
            "lens",
            "The logit lens",
            "Every block adds to the same stream of numbers, and the output head normally reads only its last state. "
            "Here it reads every state: each row is what the model would predict if it stopped there, from the "
            "embeddings at the bottom to its real answer at the top. Tokens that did come next are outlined.",
            _numbered("lens", reading.lens(inside, labels, top_labels), _lens_in_words(top_labels)),
        )
        yield (
            "attention",
            "Attention",
            "Where each token (a row) looks for what it needs, among the tokens before it and itself (the columns). "
            "The weights of a row add up to 1. The colour scale is a square root, so that small weights are visible; "
            "positions that a token cannot see are blank.",
            (
                (
                    f"attention-{layer:02d}",
                    reading.attention(config, inside, layer, labels),
                    f"Attention weights of the {config.n_heads} heads of block {layer}, one map per head, over "
                    f"{len(labels)} tokens.",
                )
                for layer in range(config.n_layers)
            ),
        )
    yield (
        "architecture",
        "The architecture",
        "T tokens enter at the bottom; the shapes on the way up are those for one text. Dropout, which acts only in "
        "training, is not drawn.",
        iter([("architecture", architecture(name, config), describe(config))]),
    )


def _numbered(name: str, figures: Sequence[Figure], words: str) -> Iterator[Picture]:
    for i, figure in enumerate(figures):
        yield (name if len(figures) == 1 else f"{name}-{i + 1}"), figure, words


def _next_in_words(labels: Sequence[str], top_labels: Sequence) -> str:
    likeliest = ", ".join(f"after {label} {tops[0]}" for label, tops in zip(labels, top_labels[-1], strict=True))
    return f"The likeliest next token: {likeliest}."


def _lens_in_words(top_labels: Sequence) -> str:
    said = [places[-1][0] for places in top_labels]
    after = ", ".join(f"block {i} {label}" for i, label in enumerate(said[1:]))
    return f"What the model would predict after the last token: at the embeddings {said[0]}, after {after}."
