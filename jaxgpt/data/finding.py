"""Which files a path stands for, and which of them are a split to validate or to test on."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from jaxgpt.errors import DataError
from jaxgpt.files import local

# What a directory is searched for: texts, and what `find_splits` searches it for besides.
TEXT_ENDINGS = (".txt", ".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
_ENDINGS = (*TEXT_ENDINGS, ".tokens", ".safetensors", ".bin", ".idx")
# Names of files that hold a split: nanoGPT's val.bin, llm.c's fineweb_val_000000.bin, WikiText's wiki.test.tokens.
_VALIDATION = re.compile(r"(.*[_.-])?val(id|idation)?([_.-].*)?", re.IGNORECASE)
_TEST = re.compile(r"(.*[_.-])?test([_.-].*)?", re.IGNORECASE)


def find_files(path: str | Path, endings: tuple[str, ...]) -> list[Path]:
    """The files that a path stands for: the file itself; those in a directory, by name; or those that match a pattern.

    Args:
        path: of a file or a directory, or a pattern of files, such as `corpus/**/*.jsonl`.
        endings: what names of files in a directory end in.

    Raises:
        DataError: if there are none in the directory, or none that match.
    """
    place = local(path)
    if os.path.isdir(place):
        try:
            found = [file for file in place.iterdir() if file.name.lower().endswith(endings) and file.name[0] != "."]
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        missing = f"a directory without data: expected files that end in {', '.join(endings)}"
    elif glob.has_magic(os.fspath(path)) and not os.path.exists(place):
        found = [Path(file) for file in glob.glob(os.fspath(place), recursive=True)]
        missing = "no file has such a name"
    else:
        return [place]
    # A link to nothing is kept: opening it tells that a file is missing.
    files = sorted(file for file in found if not file.is_dir())
    if not files:
        raise DataError(f"{path}: {missing}")
    return files


def find_splits(path: str) -> tuple[list[Path], list[Path], tuple[str, ...]]:
    """The files of a source: those to train on, those that are its validation split, and what is left out, and why.

    Raises:
        DataError: if there are none.
    """
    files = find_files(path, _ENDINGS)
    if files == [local(path)]:
        return files, [], ()
    indexed = {file.with_suffix(".bin") for file in files if file.suffix == ".idx"}
    files = [file for file in files if file not in indexed]
    texts = [file for file in files if file.name.lower().endswith(TEXT_ENDINGS)]
    left_out = []
    if len(texts) < len(files):  # such as input.txt, from which nanoGPT's prepare.py has made train.bin and val.bin
        left_out += [f"{file.name} (a text beside token files)" for file in texts]
        files = [file for file in files if file not in texts]
    val = [file for file in files if _VALIDATION.fullmatch(file.stem)]
    test = [file for file in files if _TEST.fullmatch(file.stem) and file not in val]
    train = [file for file in files if file not in val and file not in test]
    if not train:
        return files, [], tuple(left_out)
    return train, val, (*left_out, *(f"{file.name} (a test split)" for file in test))
