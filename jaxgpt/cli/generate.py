"""`jaxgpt generate`: prints text from a model on stdout, and everything else on stderr."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from typing import Any

from jaxgpt.cli.options import add_model_arguments, load_model
from jaxgpt.config import DTYPES
from jaxgpt.files import decode_text, local


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments. Sampling options are named as in transformers."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be repeated: all are continued at once",
    )
    parser.add_argument(
        "--prompt-file",
        action="append",
        default=[],
        metavar="FILE",
        help='file with one prompt; "-" is stdin; may be repeated',
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=200,
        metavar="N",
        help="generate at most N tokens per text (default: %(default)s)",
    )
    number = functools.partial(parser.add_argument, type=float, metavar="X")
    count = functools.partial(parser.add_argument, type=int, metavar="N")
    number("--temperature", default=0.8, help="divide the logits by X; 0 is greedy (default: %(default)s)")
    count("--top-k", default=200, help="keep the N likeliest tokens; 0 keeps all (default: %(default)s)")
    number("--top-p", help="keep the likeliest tokens that together have probability X")
    number("--min-p", help="keep tokens with at least X times the highest probability")
    number("--repetition-penalty", help="divide the logits of tokens in the text by X, prompt included (1: off)")
    number("--presence-penalty", help="subtract X, -2 to 2, from the logits of new tokens that occurred")
    number("--frequency-penalty", help="subtract X, -2 to 2, for each time that a new token occurred")
    count("--no-repeat-ngram-size", help="repeat no sequence of N tokens, prompt included")
    count("--min-new-tokens", help="do not stop at end-of-text before N new tokens")
    parser.add_argument(
        "--logit-bias",
        action="append",
        metavar="ID=X",
        help="add X to the logit of one token; may be repeated",
    )
    parser.add_argument(
        "--bad-words-ids",
        action="append",
        metavar="ID,ID",
        help="never generate this sequence of tokens; may be repeated (jaxgpt tokenize shows ids)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end a text right before TEXT; may be repeated",
    )
    parser.add_argument(
        "--greedy", action="store_true", help="always take the likeliest token, as with --temperature 0"
    )
    parser.add_argument(
        "--num-return-sequences", type=int, default=1, metavar="N", help="texts per prompt (default: 1)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="any integer, modulo 2^64; the same seed gives the same text (default: %(default)s)",
    )
    parser.add_argument("--stream", action="store_true", help="print text as it is sampled; several texts one by one")
    parser.add_argument("--json", action="store_true", help="print one JSON object per text, one per line")
    count("--logprobs", help="with --json: log-probabilities of each token and the N likeliest")
    parser.add_argument(
        "--cache-dtype",
        choices=DTYPES,
        help="type of the key/value cache (default: see jaxgpt.Cache.empty)",
    )


def run(args: argparse.Namespace) -> int:
    """Generates, and prints each prompt with its continuation; a line `---` separates texts.

    Raises:
        ValueError: for an argument out of range; without a prompt; for --stream with --json.
        CheckpointError, ConfigError, MissingExtraError, OSError: if the model or a file cannot be read.
        FloatingPointError: if the model gives NaN or infinite logits.
    """
    if args.stream and args.json:
        raise ValueError("--stream and --json exclude each other: JSON is printed when a text is complete")
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs needs --json, which shows them")
    if args.num_return_sequences < 1:
        raise ValueError(f"--num-return-sequences must be 1 or more, not {args.num_return_sequences}")
    prompts = [prompt for prompt in read_prompts(args) for _ in range(args.num_return_sequences)]

    from jaxgpt.generation import SAMPLING, as_key, check_stop, default_stop_ids, encode_prompt, from_options
    from jaxgpt.parallel import memory_errors

    sampling = {name: getattr(args, name) for name in SAMPLING}
    sampling["temperature"] = 0.0 if args.greedy else args.temperature
    sampling["logit_bias"] = None if args.logit_bias is None else dict(map(_bias, args.logit_bias))
    sampling["bad_words_ids"] = None if args.bad_words_ids is None else list(map(_ids, args.bad_words_ids))
    sampler = from_options(**sampling)
    args.stop = check_stop(args.stop)
    key = as_key(args.seed) if sampler.draws else None
    model, params = load_model(args)
    rows = [encode_prompt(model.config, prompt) for prompt in prompts]
    context = model.config.context_length
    if max(map(len, rows)) + args.max_new_tokens > context:
        print(
            f"beyond {context} tokens, the model's context, every token takes a pass over the whole context",
            file=sys.stderr,
        )
    options: dict[str, Any] = {
        "sampler": sampler,
        "stop_ids": default_stop_ids(model.config),
        "cache_dtype": args.cache_dtype,
        "logprobs": args.logprobs,
    }
    show = _stream if args.stream else _print
    with memory_errors("continue fewer prompts at once, or choose a --dtype or --cache-dtype of fewer bytes"):
        show(args, model, params, prompts, rows, key, options)
    return 0


def _bias(text: str) -> tuple[int, float]:
    i, _, bias = text.partition("=")
    try:
        return int(i), float(bias)
    except ValueError:
        raise ValueError(f"--logit-bias is written like 50256=-1.5, not {text!r}") from None


def _ids(text: str) -> list[int]:
    try:
        return [int(i) for i in text.split(",")]
    except ValueError:
        raise ValueError(f"--bad-words-ids is written like 464,3797, not {text!r}") from None


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts on the command line, those of --prompt before those of --prompt-file; with neither, stdin unless it
    is a terminal. Bytes that are not UTF-8 become U+FFFD."""
    files = args.prompt_file
    if not args.prompt and not files:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("no prompt: give --prompt TEXT or --prompt-file FILE, or write to stdin")
        files = ["-"]
    prompts = list(args.prompt)
    for name in files:
        data = sys.stdin.buffer.read() if name == "-" else local(name).read_bytes()
        try:
            prompts.append(decode_text(data, errors="replace"))
        except ValueError as error:
            raise ValueError(f"{'stdin' if name == '-' else name}: {error}") from None
    return prompts


def _print(args, model, params, prompts, rows, key, options) -> None:
    from jaxgpt.generation import CHUNK, STREAM_CHUNK, Generation, completions

    chunk = STREAM_CHUNK if args.stop else CHUNK
    session = Generation(model, params, rows, args.max_new_tokens, key=key, chunk=chunk, **options)
    texts = completions(session, args.stop)
    result = session.result()
    for i, (prompt, completion) in enumerate(zip(prompts, texts, strict=True)):
        if args.json:
            fields = {
                "prompt": prompt,
                "completion": completion,
                "text": prompt + completion,
                "finish_reason": result.finish_reasons[i],
                "prompt_tokens": result.prompt_lengths[i],
                "new_tokens": result.new_tokens[i].tolist(),
            }
            if result.logprobs is not None and result.sampler_logprobs is not None:
                fields["logprobs"] = _logprobs(result.logprobs[i])
                fields["sampler_logprobs"] = _logprobs(result.sampler_logprobs[i])
            print(json.dumps(fields))
        else:
            print("---\n" * bool(i) + prompt + completion)
    _report([result])


def _logprobs(logprobs) -> dict[str, Any]:
    """As JSON, which has no infinities: without the ids that the sampler removed."""
    pairs = [zip(*row, strict=True) for row in zip(logprobs.top_ids.tolist(), logprobs.top.tolist(), strict=True)]
    return {
        "drawn": logprobs.drawn.tolist(),
        "top": [[{"id": i, "logprob": value} for i, value in row if value > -math.inf] for row in pairs],
    }


def _stream(args, model, params, prompts, rows, key, options) -> None:
    import jax

    from jaxgpt.generation import STREAM_CHUNK, Generation, text_pieces

    results = []
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        # The same key that this row has when all are sampled at once.
        row_key = None if key is None else jax.random.fold_in(key, i)[None]
        session = Generation(model, params, [row], args.max_new_tokens, key=row_key, chunk=STREAM_CHUNK, **options)
        print("---\n" * bool(i) + prompt, end="", flush=True)
        for piece in text_pieces(session, args.stop):
            print(piece, end="", flush=True)
        print()
        results.append(session.result())
    _report(results)


def _report(results) -> None:
    count = sum(len(new) for result in results for new in result.new_tokens)
    line = f"{count} tokens in {sum(result.seconds for result in results):.1f} s"
    rates = [result.tokens_per_second for result in results if result.tokens_per_second]
    if rates:
        line += f", compilation included; {sum(rates) / len(rates):,.0f} tokens/s without it"
    print(line, file=sys.stderr)
