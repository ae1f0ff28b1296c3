"""`jaxgpt generate`: prints text from a model on stdout, and everything else on stderr."""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

from jaxgpt.checks import whole_number
from jaxgpt.cli.options import add_model_arguments, given, load_model
from jaxgpt.config import PARAM_DTYPES
from jaxgpt.files import decode_text, local


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand's arguments. Sampling options are named as in transformers."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="text to continue; may be repeated: all are continued at once (default: stdin, or what is typed)",
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
        help="never generate this sequence of tokens; may be repeated (the ids are the tokenizer's)",
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
        "--num-return-sequences", type=int, default=1, metavar="N", help="texts per prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--num-beams",
        type=int,
        default=1,
        metavar="N",
        help="search with N beams for the likeliest texts instead of sampling (default: %(default)s, no search)",
    )
    parser.add_argument(
        "--length-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="with --num-beams: divide log-probabilities by length ** X; above 0 favours long texts (%(default)s)",
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
        "--lookup",
        type=int,
        nargs="?",
        const=8,
        metavar="N",
        help="guess what the text repeats, and read up to N tokens at once: same text, sooner (%(const)s)",
    )
    parser.add_argument(
        "--cache-dtype",
        choices=PARAM_DTYPES,
        help="type of the key/value cache (default: see jaxgpt.Cache.empty)",
    )


def run(args: argparse.Namespace) -> int:
    """Generates, and prints each prompt with its continuation; a line `---` separates texts. On a terminal without a
    prompt, asks for one after the other.

    Raises:
        ValueError: for an argument out of range; without a prompt; for options that exclude each other.
        CheckpointError, ConfigError, MissingExtraError, OSError: if the model or a file cannot be read.
        FloatingPointError: if the model gives NaN or infinite logits.
    """
    if args.stream and args.json:
        raise ValueError("--stream and --json exclude each other: JSON is printed when a text is complete")
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs needs --json, which shows them")
    searches = whole_number("--num-beams", args.num_beams, 1) > 1
    _refuse_other_mode(args, searches)
    asks = _is_terminal() and not (args.prompt or args.prompt_file or args.json or searches)
    prompts = [] if asks else read_prompts(args)

    from jaxgpt.generation import as_key, check_num_return_sequences, check_stop, default_stop_ids, encode_prompt
    from jaxgpt.parallel import memory_errors

    args.stop = check_stop(args.stop)
    key, options = None, dict[str, Any](cache_dtype=args.cache_dtype)
    if searches:
        options |= {"num_beams": args.num_beams, "length_penalty": args.length_penalty}
    else:
        sampler = _sampler(args)
        check_num_return_sequences(args.num_return_sequences, sampler)
        key = as_key(args.seed) if sampler.draws else None
        options |= {"sampler": sampler, "logprobs": args.logprobs, "lookup": args.lookup}
    model, params = load_model(args)
    rows = [encode_prompt(model.config, prompt) for prompt in prompts]
    options["stop_ids"] = default_stop_ids(model.config)
    context = model.config.context_length
    if max(map(len, rows), default=0) + args.max_new_tokens > context and not searches:
        print(
            f"beyond {context} tokens, the model's context, every token takes a pass over the whole context",
            file=sys.stderr,
        )
    show = _ask if asks else _stream if args.stream else _print
    with memory_errors("continue fewer prompts at once, or choose a --dtype or --cache-dtype of fewer bytes"):
        show(args, model, params, prompts, rows, key, options)
    return 0


def _refuse_other_mode(args: argparse.Namespace, searches: bool) -> None:
    """Raises a ValueError for an option that has no effect: of drawing beside --greedy, of sampling beside --num-beams,
    or of a search without."""
    if not searches:
        if given(args, "--length-penalty"):
            raise ValueError("--length-penalty needs --num-beams: without it nothing is searched for")
        draws = given(args, "--temperature", "--top-k", "--top-p", "--min-p", "--seed")
        if args.greedy and draws:
            raise ValueError(f"{draws} and --greedy exclude each other: the likeliest token is taken, and none drawn")
        return
    if args.stream:
        raise ValueError("--stream and --num-beams exclude each other: no text is certain before the search ends")
    from jaxgpt.generation import SAMPLING

    sampling = (f"--{name.replace('_', '-')}" for name in SAMPLING)
    if option := given(args, *sampling, "--seed", "--greedy", "--stop", "--logprobs", "--lookup"):
        raise ValueError(f"{option} and --num-beams exclude each other: a search only ranks what the model says")


def _is_terminal() -> bool:
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def _sampler(args: argparse.Namespace) -> Any:
    """The sampler that the options mean."""
    from jaxgpt.generation import SAMPLING, from_options

    sampling = {name: getattr(args, name) for name in SAMPLING}
    sampling["temperature"] = 0.0 if args.greedy else args.temperature
    sampling["logit_bias"] = None if args.logit_bias is None else dict(map(_bias, args.logit_bias))
    sampling["bad_words_ids"] = None if args.bad_words_ids is None else list(map(_ids, args.bad_words_ids))
    return from_options(**sampling)


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
    from jaxgpt.generation import CHUNK, STREAM_CHUNK, Generation, beam_search, completions, decode_new

    copies = args.num_return_sequences
    options["num_return_sequences"] = copies
    result: Any
    if searches := "num_beams" in options:
        result = beam_search(model, params, rows, args.max_new_tokens, **options)
        texts = [decode_new(model.config, new, options["stop_ids"]) for new in result.new_tokens]
    else:
        chunk = STREAM_CHUNK if args.stop else CHUNK
        session = Generation(model, params, rows, args.max_new_tokens, key=key, chunk=chunk, **options)
        texts = completions(session, args.stop)
        result = session.result()
    prompts = [prompt for prompt in prompts for _ in range(copies)]
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
            if searches:
                fields["score"] = float(result.scores[i])
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
    results = []
    texts = [pair for pair in zip(prompts, rows, strict=True) for _ in range(args.num_return_sequences)]
    for i, (prompt, row) in enumerate(texts):
        print("---\n" * bool(i) + prompt, end="", flush=True)
        results.append(_stream_row(args, model, params, row, i, key, options))
    _report(results)


def _stream_row(args, model, params, row, i, key, options) -> Any:
    """Prints what row i gets, as it is drawn, with the key that the row has when all are sampled at once."""
    import jax

    from jaxgpt.generation import STREAM_CHUNK, Generation, text_pieces

    row_key = None if key is None else jax.random.fold_in(key, i)[None]
    session = Generation(model, params, [row], args.max_new_tokens, key=row_key, chunk=STREAM_CHUNK, **options)
    for piece in text_pieces(session, args.stop):
        print(piece, end="", flush=True)
    print()
    return session.result()


def _ask(args, model, params, prompts, rows, key, options) -> None:
    """Asks for prompts on the terminal, and prints each one's continuations as they are drawn."""
    from jaxgpt.generation import encode_prompt

    whole_number("max_new_tokens", args.max_new_tokens)
    numbers = itertools.count()
    for prompt in _typed():
        try:
            row = encode_prompt(model.config, prompt)
        except ValueError as error:
            print(f"jaxgpt: error: {error}", file=sys.stderr)
            continue
        try:
            for i in range(args.num_return_sequences):
                print("---\n" * bool(i), end="")
                _stream_row(args, model, params, row, next(numbers), key, options)
        except KeyboardInterrupt:
            print()


def _typed() -> Iterator[str]:
    """The lines that are typed on the terminal, until Ctrl-D or an empty one."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401 - gives `input` line editing and a history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    print("Type a text to continue. Ctrl-C stops an answer; Ctrl-D or an empty line ends.", file=sys.stderr)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        if not line:
            return
        yield line


def _report(results) -> None:
    count = sum(len(new) for result in results for new in result.new_tokens)
    line = f"{count} tokens in {sum(result.seconds for result in results):.1f} s"
    rates = [result.tokens_per_second for result in results if result.tokens_per_second]
    if rates:
        line += f", compilation included; {sum(rates) / len(rates):,.0f} tokens/s without it"
    if looked_up := sum(result.looked_up for result in results):
        line += f"; {looked_up} looked up"
    print(line, file=sys.stderr)
