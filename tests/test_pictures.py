"""What the model computes inside, against float64; its pictures, their page, and training curves."""

from __future__ import annotations

import base64
import hashlib
import html
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ALTERNATING, SCALED, TINY, make_model, make_model_that_draws, random_ids, stack_blocks, to_numpy

import jaxgpt
from jaxgpt.cli import main
from jaxgpt.config import PRESETS, ComputeConfig, GPTConfig
from jaxgpt.errors import ConfigError, DataError
from jaxgpt.interpret import Inside, lens_logits, look_inside, token_labels
from jaxgpt.model import reference
from jaxgpt.tokenizer import get_tokenizer
from jaxgpt.training.run_directory import Run

matplotlib = pytest.importorskip("matplotlib")

from jaxgpt.pictures import reading, readout, report, style  # noqa: E402
from jaxgpt.pictures.architecture import architecture, describe  # noqa: E402
from jaxgpt.training import curves  # noqa: E402

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BYTES = TINY.replace(vocab_size=257, tokenizer="bytes", context_length=160)
PROMPT = 'To be, $5 < "né"\n'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def inside64(params, config, ids) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(attention_LxHxTxT, residual_NxTxD, probabilities_NxTxV), by the reference's formulas."""
    x = params["tok_emb"]["weight"][ids] + params["pos_emb"]["weight"][: len(ids)]
    attention, residual = [], [x]
    for i in range(config.n_layers):
        p, window = reference.block_params(params, i), config.attention_window if i in config.banded_layers else None
        normed = reference.layer_norm(p["norm1"], x, config.layer_norm_eps)
        biases = p["att"]["qkv"].get("bias", np.zeros((3, config.emb_dim)))
        q, k = (normed @ p["att"]["qkv"]["weight"][j].T + biases[j] for j in range(2))
        heads = [slice(h * config.head_dim, (h + 1) * config.head_dim) for h in range(config.n_heads)]
        divisor = config.head_dim**0.5 * (i + 1 if config.scale_attn_by_inverse_layer_idx else 1)
        attention.append([reference.attention_weights(q[:, head], k[:, head], window, divisor) for head in heads])
        x = reference.block(p, config, x, window, i)
        residual.append(x)
    head = params["tok_emb" if config.tie_embeddings else "out_head"]["weight"]
    logits = [reference.layer_norm(params["final_norm"], x, config.layer_norm_eps) @ head.T for x in residual]
    return np.array(attention), np.array(residual), reference.softmax(np.array(logits))


def forms():
    plain = TINY.replace(tie_embeddings=False, qkv_bias=False, bias=False, activation="relu", n_layers=1)
    return {"gpt2": TINY, "untied": plain, "banded": ALTERNATING, "scanned": ALTERNATING, "scaled": SCALED}


@pytest.mark.parametrize("name", forms())
def test_everything_inside_equals_the_float64_reference(name):
    config = forms()[name]
    model, params = make_model(config, seed=3)
    if name == "scanned":
        model = jaxgpt.GPT(config, ComputeConfig(scan_layers=True))
        params = stack_blocks(params, config.n_layers)
    ids = random_ids(config, 1, 13)[0]
    seen = look_inside(model, params, ids, top=4)
    attention, residual, probabilities = inside64(to_numpy(params), config, ids)
    np.testing.assert_allclose(seen.attention_LxHxTxT, attention, atol=2e-6)
    np.testing.assert_allclose(seen.residual_NxTxD, residual, atol=2e-5)
    np.testing.assert_allclose(seen.top_probabilities_NxTxK, np.sort(probabilities)[..., :-5:-1], atol=5e-6)
    told = np.take_along_axis(probabilities, seen.top_ids_NxTxK, axis=-1)  # by id, where there might be ties
    np.testing.assert_allclose(seen.top_probabilities_NxTxK, told, atol=5e-6)
    true = probabilities[:, np.arange(12), ids[1:]]
    np.testing.assert_allclose(seen.true_probabilities_NxS, true, atol=5e-6)
    assert seen.ids_T.tolist() == ids.tolist()


@pytest.fixture(scope="module")
def banded() -> Inside:
    return look_inside(*make_model(ALTERNATING), random_ids(ALTERNATING, 1, 16)[0])


def test_attention_rows_sum_to_1_and_are_exactly_0_where_a_query_sees_nothing(banded):
    weights_LxHxTxT = banded.attention_LxHxTxT
    np.testing.assert_allclose(weights_LxHxTxT.sum(-1), 1, atol=1e-6)
    query, key = np.indices((16, 16))
    assert not weights_LxHxTxT[..., key > query].any()
    assert not weights_LxHxTxT[1][..., key <= query - ALTERNATING.attention_window].any()
    assert weights_LxHxTxT[1][..., (key <= query) & (key > query - ALTERNATING.attention_window)].all()
    assert weights_LxHxTxT[[0, 2]][..., key <= query].all()


# The tolerance lets two programs round differently: operands to bfloat16, and int8's digits.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 5e-3), ("int8", 2e-4)])
def test_the_last_place_is_the_model_itself(dtype, tolerance):
    model, params = jaxgpt.prepare(*make_model(TINY.replace(n_layers=1)), dtype)
    ids = random_ids(TINY, 1, 9)[0]
    seen = look_inside(model, params, ids, top=TINY.vocab_size)
    logits_1xTxV = jax.jit(model.apply)({"params": params}, ids[None])
    own = np.take_along_axis(np.asarray(jax.nn.softmax(logits_1xTxV[0])), seen.top_ids_NxTxK[-1], axis=-1)
    np.testing.assert_allclose(seen.top_probabilities_NxTxK[-1], own, atol=tolerance)
    by_lens = jax.jit(lens_logits, static_argnums=0)(model, params, seen.residual_NxTxD[-1:])
    np.testing.assert_allclose(by_lens, logits_1xTxV, atol=100 * tolerance)


def test_one_id_and_more_tops_than_the_vocabulary_holds(tiny):
    seen = look_inside(*tiny, [5], top=1000)
    assert seen.attention_LxHxTxT.tolist() == [[[[1.0]]] * 3] * 2
    assert seen.top_ids_NxTxK.shape == (3, 1, TINY.vocab_size)
    assert seen.true_probabilities_NxS.shape == (3, 0)


@pytest.mark.parametrize(
    ("ids", "top", "message"),
    [
        ([], 5, "no ids: a model must read something"),
        ([1] * 17, 5, "17 ids do not fit context_length=16"),
        ([1, 97], 5, r"ids\[1\] is 97, outside the vocabulary: 0 to 96"),
        ([1], 0, "top must be at least 1, not 0"),
    ],
)
def test_looking_inside_refuses_what_cannot_be_read(tiny, ids, top, message):
    with pytest.raises(ValueError, match=message):
        look_inside(*tiny, ids, top=top)


def test_parameters_that_are_not_numbers_are_named_by_place(tiny):
    model, params = tiny
    broken = jax.tree_util.tree_map_with_path(
        lambda path, x: x * math.nan if "trf_blocks_0" in str(path) and "fc_out" in str(path) else x, params
    )
    with pytest.raises(FloatingPointError, match="the logits after block 0, position 0, are NaN"):
        look_inside(model, broken, [1, 2])


def test_labels_show_what_does_not_print():
    assert token_labels(get_tokenizer("bytes"), [84, 32, 10, 0xC3, 256]) == ["T", "␣", "\\n", "\\xc3", "<|endoftext|>"]
    gpt2 = get_tokenizer("gpt2")
    ids = gpt2.encode(" the é 你\x1b\u200b")
    assert "".join(token_labels(gpt2, ids)) == "␣the␣é␣\\xe4\\xbd\\xa0\\x1b\\u200b"
    assert token_labels(gpt2, [50256, 50257]) == ["<|endoftext|>", "<|50257|>"]


@pytest.fixture(scope="module")
def read() -> tuple[GPTConfig, Inside]:
    model, params = make_model(BYTES)
    return BYTES, look_inside(model, params, list(PROMPT.encode()))


@pytest.fixture(scope="module")
def written(read, tmp_path_factory) -> tuple[Path, list[Path]]:
    directory = tmp_path_factory.mktemp("pictures") / "deep"
    return directory, report.write_pictures(directory, "a <model> of $1", *read, PROMPT)


def test_pictures_are_written(written):
    directory, (page, *pictures) = written
    names = ["architecture", "attention-00", "attention-01", "lens", "next-tokens"]
    assert (page.name, sorted(path.stem for path in pictures)) == ("index.html", names)
    assert {path.name for path in directory.iterdir()} == {"index.html", *(f"{name}.png" for name in names)}
    for path in pictures:
        pixels = matplotlib.image.imread(path)
        assert pixels.shape[0] > 300
        assert pixels.shape[1] > 600
        assert len(np.unique(pixels @ (1, 100, 10_000, 0))) > 50  # colours


class _Page(html.parser.HTMLParser):
    """Collects every tag in order; raises if a tag is closed that is not open."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), attributes
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(written):
    text = written[1][0].read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "img", "base", "form"}
    assert [attributes for tag, attributes in page.tags if tag == "script"] == [
        {"id": "values", "type": "application/json"},
        {},
    ]
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:image/png;base64,")), (tag, attributes)
    assert set(re.findall(r"url\(\s*['\"]?(.)", text)) <= {"#"}
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    pointed = [*re.findall(r'href="#([^"]+)"', text), *re.findall(r"url\(#([^)]+)\)", text)]
    assert set(pointed) <= set(ids)
    # The browser runs the script with this digest, and no other.
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    assert ("meta", policy) in [(tag, attributes.get("content")) for tag, attributes in page.tags]


def test_the_pages_pictures_are_svg_with_words_and_in_the_pages_colours(written):
    text = written[1][0].read_text(encoding="utf-8")
    svgs = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    assert len(svgs) == 5
    for svg in svgs:
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img"
        assert len(root.get("aria-label", "")) > 60
        assert "currentColor" in svg
        assert not re.search(f"{style.INK}|{style.MUTED}|{style.PAPER}", svg)
    assert "after T " in ElementTree.fromstring(svgs[0]).get("aria-label", "")
    assert "<h1>Inside a &lt;model&gt; of $1</h1>" in text
    assert "<blockquote>To be, $5 &lt; &quot;né&quot;\n</blockquote>" in text


def test_the_same_pictures_make_the_same_files(read, written, tmp_path):
    again = report.write_pictures(tmp_path, "a <model> of $1", *read, PROMPT)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in written[1]]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page with")
def test_a_browser_without_network_shows_the_page(written, tmp_path):
    page, shot = written[1][0], tmp_path / "shot.png"
    common = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    offline = "--disable-component-update --disable-sync --host-resolver-rules=MAP * ~NOTFOUND"
    command = [
        *(CHROMIUM, *common.split(), *offline.split(maxsplit=2), f"--user-data-dir={tmp_path / 'profile'}"),
        *("--enable-logging=stderr", "--window-size=1000,1400", "--hide-scrollbars", page.as_uri()),
    ]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, encoding="utf-8", timeout=120)
        assert done.returncode == 0, done.stderr
        assert "CONSOLE" not in done.stderr, done.stderr
        return done

    dom = run("--dump-dom").stdout
    assert dom.count("<svg ") == 5
    assert dom.count("<image ") == len(re.findall("<image ", page.read_text(encoding="utf-8"))) > 4
    run(f"--screenshot={shot}")
    pixels = matplotlib.image.imread(shot)[..., :3]
    paper = pixels[0, 0]
    drawn = np.abs(pixels - paper).max(-1) > 0.05
    coloured = pixels.max(-1) - pixels.min(-1) > 0.3  # text has no colour of its own, only the pictures do
    assert pixels.shape[:2] == (1400, 1000)
    assert 0.1 < drawn.mean() < 0.9
    assert coloured.mean() > 0.03


def readouts(page: Path) -> list[dict | None]:
    """What the page holds for its script, a picture each."""
    found = re.search(r'<script id="values" type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"))
    assert found is not None
    return json.loads(found[1])


def test_every_cell_says_what_was_seen(read, written):
    seen, (after, lens, *maps, architecture_) = read[1], readouts(written[1][0])
    labels, T = token_labels(get_tokenizer("bytes"), seen.ids_T), len(seen.ids_T)
    tops = [[token_labels(get_tokenizer("bytes"), ids) for ids in place] for place in seen.top_ids_NxTxK]
    assert architecture_ is None
    assert after["texts"][5 * 3 + 2] == f"{tops[-1][3][2]} {seen.top_probabilities_NxTxK[-1, 3, 2]:.2%}"
    assert after["rows"] == [f"after {t} {label}" for t, label in enumerate(labels)]
    # The top row is the model.
    assert lens["texts"][T + 4].startswith(f"{tops[1][4][0]} {seen.top_probabilities_NxTxK[1, 4, 0]:.2%}, ")
    assert lens["rows"] == ["after block 1 (the model)", "after block 0", "at the embeddings"]
    assert len(lens["texts"]) == 3 * T
    for layer, told in enumerate(maps):
        weights = np.frombuffer(base64.b64decode(told["weights"]), "<u2").reshape(len(told["tiles"]), -1) / 65535
        below = np.tril_indices(T)
        np.testing.assert_allclose(weights, seen.attention_LxHxTxT[layer][:, *below], atol=1e-5)


def test_a_readout_lies_where_the_cells_are(banded):
    figure = reading.attention(ALTERNATING, banded, 1, [f"t{i}" for i in range(16)])
    style.styled(figure.draw_without_rendering)()
    told = readout.attention(figure, banded, 1, [f"t{i}" for i in range(16)])
    axes = figure.axes[0]
    for head, (name, left, top) in enumerate(told.tiles):
        assert name == f"head {head}"
        # The middle of the cell of query 2 and key 1, in the image's own coordinates.
        x, y = left + told.width * 1.5 / 16, top + told.height * 2.5 / 16
        column, row = axes.transData.inverted().transform((x, 1 - y) * figure.bbox.size)
        np.testing.assert_allclose((column, row), (head * 17 + 1, 2), atol=0.01)


DRIVE = """<!DOCTYPE html><meta charset="utf-8"><body>
<iframe src="PAGE" style="width: 375px; height: 800px"></iframe><pre id="told"></pre><script>
onload = async () => {
  const frame = document.querySelector("iframe"), page = frame.contentDocument, win = frame.contentWindow, told = {};
  told.wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const svgs = [...page.querySelectorAll("figure svg")], tip = page.getElementById("tip");
  const values = JSON.parse(page.getElementById("values").textContent);
  // Under a finger on the middle of the cell in the given row and column of a picture's first table.
  const at = (i, row, column) => {
    const box = svgs[i].getBoundingClientRect(), [, left, top] = values[i].tiles[0];
    const x = left + values[i].width * (column + 0.5) / values[i].columns.length;
    const y = top + values[i].height * (row + 0.5) / values[i].rows.length;
    const where = {clientX: box.left + x * box.width, clientY: box.top + y * box.height, bubbles: true};
    svgs[i].dispatchEvent(new win.PointerEvent("pointerdown", where));
    return tip.hidden ? null : tip.textContent;
  };
  told.tips = [at(0, 3, 2), at(1, 1, 4), at(2, 3, 1), at(2, 1, 3), at(2, -1, 0)];
  told.fits = svgs.map(svg => svg.getBoundingClientRect().width <= svg.parentElement.clientWidth);
  const [svg, png, size] = page.querySelectorAll("figcaption button");
  size.click();
  told.whole = [svgs[0].getBoundingClientRect().width, parseFloat(svgs[0].style.getPropertyValue("--width"))];
  let saved = null;
  win.URL.createObjectURL = blob => { saved = blob; return "#"; };
  svg.click();
  told.svg = await saved.text();
  saved = null;
  png.click();
  for (let i = 0; i < 100 && !saved; i++) await new Promise(done => setTimeout(done, 100));
  told.png = [...new Uint8Array(await saved.arrayBuffer())].slice(0, 4);
  document.getElementById("told").textContent = JSON.stringify(told);
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page with")
def test_on_a_phone_the_page_fits_tells_values_and_saves_pictures(read, written, tmp_path):
    (tmp_path / "drive.html").write_text(DRIVE.replace("PAGE", written[1][0].as_uri()), encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
        *("--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--virtual-time-budget=30000", "--dump-dom", (tmp_path / "drive.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300, check=True)
    told = json.loads(html.unescape(done.stdout.partition('<pre id="told">')[2].partition("</pre>")[0]))
    seen = read[1]
    labels = token_labels(get_tokenizer("bytes"), seen.ids_T)
    after, lens, map_ = readouts(written[1][0])[:3]
    weight = seen.attention_LxHxTxT[0, 0, 3, 1]
    assert told["tips"] == [
        f"after 3 {labels[3]}, no. 3: {after['texts'][5 * 3 + 2]}",
        f"after block 0, having read 4 {labels[4]}: {lens['texts'][len(labels) + 4]}",
        f"head 0: from 3 {labels[3]}, to 1 {labels[1]}: {weight:.2%}",
        f"head 0: from 1 {labels[1]}, to 3 {labels[3]}: not seen",
        None,
    ]
    assert map_["tiles"][0][0] == "head 0"
    assert told["wide"] == 0
    assert all(told["fits"])
    assert told["whole"][0] == pytest.approx(told["whole"][1], abs=1)
    assert told["whole"][0] > 375
    picture = ElementTree.fromstring(told["svg"])
    assert "--paper:#fefefe" in picture.get("style", "")
    assert bytes(told["png"]) == b"\x89PNG"


def test_two_models_are_compared_on_the_same_text(read, tmp_path):
    config, first = read
    second = look_inside(*make_model(BYTES, seed=7), first.ids_T)
    page, *pictures = report.write_comparison(tmp_path, ("a", "b <c>"), config, (first, second), PROMPT)
    assert [path.stem for path in pictures] == ["side-by-side", "lens-1", "lens-2"]
    assert "<h1>a and b &lt;c&gt;</h1>" in page.read_text(encoding="utf-8")
    tokenizer, T = get_tokenizer("bytes"), len(first.ids_T)
    labels = token_labels(tokenizer, first.ids_T)
    tops = [[[token_labels(tokenizer, k) for k in t] for t in seen.top_ids_NxTxK] for seen in (first, second)]
    (figure,) = reading.comparison(("a", "b"), (first, second), labels, tops)
    for axes, seen in zip(figure.axes[:2], (first, second), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), seen.top_probabilities_NxTxK[-1, :, :3])
    bits = np.log2(second.true_probabilities_NxS[-1] / first.true_probabilities_NxS[-1])
    np.testing.assert_allclose([bar.get_width() for bar in figure.axes[2].patches], bits, rtol=1e-4)
    (told, *_) = readouts(page)
    assert [name for name, *_ in told["tiles"]] == ["a", "b <c>"]
    came = f"{labels[5]} came: {readout.percent(second.true_probabilities_NxS[-1, 4])}"
    assert (
        told["texts"][3 * (T + 4)]
        == f"{tops[1][-1][4][0]} {readout.percent(second.top_probabilities_NxTxK[-1, 4, 0])}; {came}"
    )
    with pytest.raises(ValueError, match="have not read the same ids"):
        report.write_comparison(tmp_path, ("a", "b"), config, (first, look_inside(*make_model(BYTES), [1])), PROMPT)


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_visible()]


def test_a_map_of_each_head_holds_its_weights_and_is_blank_where_nothing_is_seen(banded):
    figure = reading.attention(ALTERNATING, banded, 1, [f"t{i}" for i in range(16)])
    image = figure.axes[0].images[0].get_array()
    seen = np.tril(np.ones((16, 16), bool)) & ~np.tril(np.ones((16, 16), bool), -ALTERNATING.attention_window)
    assert image.shape == (16, 3 * 17 - 1)
    for head in range(3):
        tile = image[:, 17 * head : 17 * head + 16]
        assert (np.ma.getmaskarray(tile) == ~seen).all()
        np.testing.assert_array_equal(tile.filled(0), banded.attention_LxHxTxT[1, head])
    assert {"head 0", "head 1", "head 2", "t0", "t15"} <= set(texts(figure))


def blank(T: int, heads: int = 1) -> Inside:
    """What `look_inside` would return for a model of two blocks that knows nothing."""
    weights = np.tril(np.ones((2, heads, T, T), np.float32))
    return Inside(np.arange(T), weights, np.zeros((3, T, 1)), *np.zeros((2, 3, T, 5)), np.zeros((3, T - 1)))


@pytest.mark.parametrize("width", [1, 10])
@pytest.mark.parametrize(("heads", "shape"), [(1, (1, 1)), (6, (2, 3)), (12, (3, 4)), (25, (5, 5)), (7, (2, 4))])
def test_heads_fill_a_grid(heads, shape, width):
    T, config = 30, TINY.replace(n_heads=heads, emb_dim=heads)
    figure = reading.attention(config, blank(T, heads), 0, [f"t{i}".ljust(width, "m") for i in range(T)])
    rows, columns = shape
    assert figure.axes[0].images[0].get_array().shape == (rows * (T + 3) - 3, columns * (T + 3) - 3)
    names = texts(figure)
    assert {"t0".ljust(width, "m"), "t2".ljust(width, "m"), "t28".ljust(width, "m")} <= set(names)
    assert not any(name.startswith("t1m") or name == "t1" for name in names)
    assert "key: the token looked at (every 2nd is labelled)" in names
    style.styled(figure.draw_without_rendering)()
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_visible() and text.get_text():
            x0, y0, x1, y1 = text.get_window_extent().extents / np.tile(figure.bbox.size, 2)
            assert 0 <= min(x0, y0) <= max(x1, y1) <= 1, text


def test_the_next_tokens_and_the_lens_say_what_was_seen(read):
    seen = read[1]
    tokenizer = get_tokenizer("bytes")
    labels = token_labels(tokenizer, seen.ids_T)
    tops = [[token_labels(tokenizer, ids) for ids in place] for place in seen.top_ids_NxTxK]
    (figure,) = reading.next_tokens(seen, labels, tops)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), seen.top_probabilities_NxTxK[-1])
    shown = texts(figure)
    for t, label in enumerate(labels):
        assert f"{t}   {style.drawable(label)}" in shown
    assert {style.drawable(label) for ranks in tops[-1] for label in ranks} <= set(shown)
    came = [text for text in shown if text.startswith("o   ")]
    assert came == [f"o   {reading._percent(seen.true_probabilities_NxS[-1, 0])}"]
    outlined = {(box.get_x() + 0.5, box.get_y() + 0.5) for box in figure.axes[0].patches}
    follows = seen.top_ids_NxTxK[-1, :-1] == seen.ids_T[1:, None]
    assert outlined == {(rank, t) for t, rank in np.argwhere(follows)}
    (figure,) = reading.lens(seen, labels, tops)
    np.testing.assert_array_equal(figure.axes[0].images[0].get_array(), seen.top_probabilities_NxTxK[..., 0])
    assert {style.drawable(place[t][0]) for place in tops for t in range(len(labels))} <= set(texts(figure))
    assert {"embeddings", "block 0", "block 1: the model"} <= set(texts(figure))


def luminance(colour: str) -> float:
    """Of "#rrggbb", relative: WCAG 2.2."""
    parts = np.array([*bytes.fromhex(colour.removeprefix("#"))]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("picture", sorted(PICTURES.glob("*.svg")), ids=lambda path: path.stem)
def test_pictures_of_the_pages_are_readable_on_white_and_on_black(picture):
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.parse(picture).getroot()
    # Matplotlib draws the paper of the figure and of its axes as the first path within each.
    for group in root.iter(f"{svg}g"):
        if re.fullmatch(r"(figure|axes)_\d+", group.get("id", "")):
            paper = group.find(f"{svg}g/{svg}path")
            assert paper is None or "fill: none" in paper.get("style", ""), group.get("id")
    # What is written and ruled; what is drawn as data, or on it, need not contrast with the page.
    inks = {style.GREY, *style.COLOURS[:2]}
    assert all(1.05 / (luminance(ink) + 0.05) > 3.5 and (luminance(ink) + 0.05) / 0.05 > 3.5 for ink in inks)
    text = picture.read_text(encoding="utf-8").lower()
    assert not re.search(f"{style.INK}|{style.MUTED}|{style.PAPER}", text)
    assert style.GREY in text


@pytest.mark.exhaustive
def test_the_first_picture_of_the_readme_is_what_the_package_draws(tmp_path):
    root = Path(__file__).parent.parent
    committed = root / "docs" / "pictures" / "first-page.svg"
    [prompt] = re.findall(r'inspect\s+shakespeare --prompt "(.*?)" --plot', (root / "README.md").read_text("utf-8"))
    model, params = jaxgpt.load("shakespeare")
    tokenizer = get_tokenizer("bytes")
    seen = look_inside(model, params, tokenizer.encode(prompt))
    tops = [[token_labels(tokenizer, ids) for ids in place] for place in seen.top_ids_NxTxK]
    first, *_ = reading.lens(seen, token_labels(tokenizer, seen.ids_T), tops)
    style.save(first, tmp_path / "drawn.svg")
    words, cells = [], []
    for path in (tmp_path / "drawn.svg", committed):
        text = path.read_text(encoding="utf-8")
        words.append(re.findall(r"<!-- (.*?) -->", text))
        image = re.search(r'data:image/png;base64,\s*(.*?)"', text, re.DOTALL)
        cells.append(matplotlib.image.imread(io.BytesIO(base64.b64decode(image[1]))))
    assert words[0] == words[1], f"draw {committed.name} again: `save` of the figure that this test makes"
    np.testing.assert_allclose(cells[0], cells[1], atol=2 / 255)


def test_long_texts_take_several_pictures_and_too_long_ones_are_refused(tmp_path):
    labels, tops = ["W" * 20] * 40, [[["$x$" * 7] * 5] * 40] * 3
    figures = reading.next_tokens(blank(40), labels, tops)
    assert len(figures) == 2
    assert "the next token, positions 32 to 39" in texts(figures[-1])
    figures = reading.lens(blank(40), labels, tops)
    assert sum(figure.axes[0].images[0].get_array().shape[1] for figure in figures) == 40
    assert max(figure.get_size_inches()[0] for figure in figures) < 14
    style.save(figures[-1], tmp_path / "formula.png")  # a dollar sign starts no formula
    with pytest.raises(ValueError, match="pictures of 129 tokens could not be read: the most is 128"):
        report.write_pictures(tmp_path / "none", "m", BYTES, blank(129), "T" * 129)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_the_parameters_beside_the_diagram_add_up(name):
    config = GPTConfig.preset(name)
    shown = texts(architecture(name, config))
    total = jaxgpt.accounting.count_parameters(config).total
    assert f"{total:,} parameters" in shown
    numbers = [re.fullmatch(rf"(?:(\d+) {style.TIMES} )?([\d,]+)", text) for text in shown]
    assert sum(int(n[1] or 1) * int(n[2].replace(",", "")) for n in numbers if n) == total
    shares = [float(text[:-1]) for text in shown if re.fullmatch(r"[\d.]+%", text)]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert f"T {style.TIMES} {config.emb_dim:,}" in shown
    assert f"{config.n_layers} blocks" in describe(config)


def test_characters_that_the_font_lacks_are_spelled_out():
    assert style.drawable("a你$é") == r"a\u4f60\$é"
    assert style.drawable("abcdef", 4) == "abc…"


def test_nothing_of_pyplot_or_of_the_users_settings_is_touched():
    code = (
        "import sys, matplotlib\nread = lambda x: {k: dict.__getitem__(x, k) for k in x if k != 'backend'}\n"
        "before = read(matplotlib.rcParams)\n"
        "from jaxgpt.config import GPTConfig\nfrom jaxgpt.pictures import style\n"
        "from jaxgpt.pictures.architecture import architecture\n"
        "style.to_svg(architecture('gpt2', GPTConfig.preset('gpt2')), 'a', 'b')\n"
        "assert read(matplotlib.rcParams) == before\n"
        "assert not {'matplotlib.pyplot', 'jax'} & {*sys.modules}"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# Training curves


def metrics(*steps: int, scale: float = 1.0) -> list[dict]:
    return [{"step": s, "loss": scale / s, "learning_rate": 1e-3, "tokens_per_second": 100.0 * s} for s in steps]


def write_run(directory: Path, lines: list[dict], batch: int | None = 2) -> Path:
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if batch:
        config = jaxgpt.TrainConfig(model=TINY, batch_size=batch, seq_len=8)
        (directory / "run.json").write_text(json.dumps({"config": config.to_dict()}), encoding="utf-8")
    return directory


def lines_of(figure, panel: int) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[panel].lines]


def test_a_resumed_run_is_drawn_once_a_step():
    lines = [*metrics(10, 20, 30, 40), {"step": 40, "val_loss": 9.0}, *metrics(30, 40, scale=2.0)]
    points = curves.from_metrics("a", lines).points
    assert points["loss"] == {10: 0.1, 20: 0.05, 30: 2 / 30, 40: 2 / 40}
    assert points["val_loss"] == {}  # measured in steps that were discarded
    points = curves.from_metrics("a", [*metrics(10, 20), {"step": 20, "val_loss": 9.0}, *metrics(30, 20)]).points
    assert (list(points["loss"]), points["val_loss"]) == ([10, 20], {})


def test_losses_that_are_not_finite_are_left_out():
    lines = [
        {"step": 1, "loss": None},
        {"step": 2, "loss": math.nan},
        {"step": 3, "loss": True},
        {"step": 4, "loss": 2},
    ]
    assert curves.from_metrics("a", lines).points["loss"] == {4: 2.0}


def test_damaged_lines_are_passed_over(tmp_path):
    directory = write_run(tmp_path / "run", metrics(1, 2))
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(b'17\n[1]\n{"loss": 3.0}\n{"step": "4", "loss": 1}\n\xff\xfe\n{"step": 3, "loss": 0.')
    assert [line["step"] for line in Run(directory).read_metrics()] == [1, 2]
    (run,) = curves.read_runs([directory])
    assert (run.last_step, run.points["loss"], run.tokens_per_step) == (2, {1: 1.0, 2: 0.5}, 16)


def test_runs_are_overlaid_against_tokens_or_steps(tmp_path):
    write_run(tmp_path / "a", [*metrics(1, 2), {"step": 2, "val_loss": 3.0}], batch=2)
    write_run(tmp_path / "x" / "b", metrics(1, 3), batch=4)
    runs = curves.read_runs([tmp_path / "a", tmp_path / "x" / "b" / "metrics.jsonl"])
    assert [run.name for run in runs] == ["a", "b"]
    figure = curves.draw(runs)
    assert lines_of(figure, 0) == [([16, 32], [1, 0.5]), ([32], [3.0]), ([32, 96], [1, 1 / 3]), ([], [])]
    assert lines_of(figure, 1) == [([16, 32], [1e-3] * 2), ([32, 96], [1e-3] * 2)]
    assert lines_of(figure, 2) == [([16, 32], [100, 200]), ([32, 96], [100, 300])]
    assert {"tokens", "a", "b", "training", "validation"} <= set(texts(figure))
    assert lines_of(curves.draw(runs, "steps"), 2) == [([1, 2], [100, 200]), ([1, 3], [100, 300])]


def test_runs_that_do_not_tell_their_tokens_are_drawn_against_steps(tmp_path):
    runs = curves.read_runs(
        [write_run(tmp_path / "a", metrics(1, 2)), write_run(tmp_path / "b", metrics(1), batch=None)]
    )
    assert "steps" in texts(curves.draw(runs))
    with pytest.raises(ConfigError, match=r"b has no run\.json that says how many tokens it reads per step"):
        curves.draw(runs, "tokens")
    with pytest.raises(ConfigError, match="x must be one of tokens, steps, not 'epochs'"):
        curves.draw(runs, "epochs")


def test_smoothing_halves_a_values_weight_at_its_half_life():
    # By hand: weights 1, then 1/2 and 1, then 1/16, 1/8 and 1, because the last step is three half-lives on.
    got = curves.smoothed({10: 4.0, 20: 1.0, 50: 2.0}, 10)
    expected = {10: 4.0, 20: (0.5 * 4 + 1) / 1.5, 50: (4 / 16 + 1 / 8 + 2) / (1 / 16 + 1 / 8 + 1)}
    assert got == pytest.approx(expected)
    constant = curves.smoothed(dict.fromkeys([3, 4, 900], 2.5), 50)
    assert list(constant.values()) == pytest.approx([2.5] * 3)


def test_axes_are_logarithmic_and_the_smoothed_loss_lies_over_the_pale_one(tmp_path):
    runs = curves.read_runs([write_run(tmp_path / name, metrics(1, 2, 4)) for name in "ab"])
    figure = curves.draw(runs, "steps", log=("x", "loss"), smooth=1)
    assert (figure.axes[0].get_yscale(), figure.axes[1].get_yscale()) == ("log", "linear")
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    pale, over = figure.axes[0].lines[:2]
    assert pale.get_alpha() < over.get_alpha()
    assert list(over.get_ydata()) == pytest.approx(list(curves.smoothed(runs[0].points["loss"], 1).values()))
    with pytest.raises(ConfigError, match="log must be of x and loss, not y"):
        curves.draw(runs, log=("y",))
    for smooth in (-1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="smooth must be a number of steps from 0 on"):
            curves.draw(runs, smooth=smooth)


def test_runs_stand_side_by_side_on_the_same_scales(tmp_path):
    runs = curves.read_runs(
        [write_run(tmp_path / "a", metrics(1, 2)), write_run(tmp_path / "b", metrics(1, 30, scale=9.0))]
    )
    figure = curves.draw(runs, "steps", side_by_side=True)
    assert len(figure.axes) == 6
    assert lines_of(figure, 0)[0] == ([1, 2], [1, 0.5])
    assert lines_of(figure, 1)[0] == ([1, 30], [9, 0.3])
    assert {"a", "b"} <= set(texts(figure))
    first, second = figure.axes[:2]
    assert (first.get_xlim(), first.get_ylim()) == (second.get_xlim(), second.get_ylim())


def test_runs_of_one_name_are_told_apart_by_path(tmp_path):
    paths = [write_run(tmp_path / parent / "run", metrics(1)) for parent in "ab"]
    assert [run.name for run in curves.read_runs(paths)] == [str(path) for path in paths]


def test_many_runs_look_different():
    assert len({curves._look(i) for i in range(24)}) == 24


@pytest.mark.parametrize("lines", [[], [{"step": 1, "loss": None}]])
def test_a_run_without_figures_is_refused(tmp_path, lines):
    with pytest.raises(DataError, match="holds no metrics to draw"):
        curves.read_runs([write_run(tmp_path / "run", lines)])


# The commands


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_plot_writes_what_the_suffix_says(tmp_path, capsys, suffix, start):
    run, out = write_run(tmp_path / "run", [*metrics(1, 2), {"step": 2, "val_loss": 3.0}]), tmp_path / f"c.{suffix}"
    assert main(["plot", str(run), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(start)
    captured = capsys.readouterr()
    assert captured.out == "run: step 2, training loss 0.5000, best validation loss 3.0000 at step 2\n"
    assert captured.err == f"drawn to {out}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "nothing: expected a run's directory, with a metrics.jsonl in it"),
        (["run", "--out", "curves.gif"], "--out must end with .svg, .png, .pdf, not 'curves.gif'"),
        (["run", "--out", "absent/curves.svg"], "absent is not a directory: make it first"),
        (["run", "--smooth", "-3"], "smooth must be a number of steps from 0 on, not -3.0"),
    ],
)
def test_plot_says_what_is_wrong(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run", metrics(1))
    assert main(["plot", *argv]) == 2
    assert message in capsys.readouterr().err


BARE = """
import sys

class NoMatplotlib:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoMatplotlib())
from jaxgpt.cli import main
print([main(arguments.split()) for arguments in sys.argv[1:]])
"""


@pytest.mark.exhaustive
def test_drawing_without_its_extra_names_it_and_training_does_without(tmp_path):
    write_run(tmp_path / "run", metrics(1))
    sizes = "context_length = 8\nemb_dim = 8\nn_heads = 1\nn_layers = 1\n"
    (tmp_path / "config.toml").write_text(
        f'[model]\ntokenizer = "bytes"\nvocab_size = 257\n{sizes}[train]\nsteps = 2\nwarmup_steps = 0\nbatch_size = 1\n'
    )
    (tmp_path / "text").write_text("a text " * 100)
    commands = ["plot run", "inspect gpt2 --plot out", "train config.toml --data text --out trained"]
    done = subprocess.run([sys.executable, "-c", BARE, *commands], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "[2, 2, 0]\n", done.stderr
    assert done.stderr.count("drawing needs 'matplotlib': pip install 'jaxgpt[plot]'") == 2
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "curves.png").exists()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("saved") / "model"
    jaxgpt.save(path, *make_model(BYTES))
    return str(path)


def test_inspect_tells_what_the_model_makes_of_a_prompt(saved, read, capsys):
    assert main(["inspect", saved, "--prompt", PROMPT, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["inside"]
    seen = read[1]
    assert [position["id"] for position in told["positions"]] == seen.ids_T.tolist()
    assert [position["token"] for position in told["positions"]][:3] == ["T", "o", "␣"]
    last = [[token["id"] for token in position["next"]] for position in told["positions"]]
    assert last == seen.top_ids_NxTxK[-1].tolist()
    assert [place["after_block"] for place in told["lens"]] == [None, 0, 1]
    lens = [[[token["probability"] for token in tops] for tops in place["positions"]] for place in told["lens"]]
    np.testing.assert_allclose(lens, seen.top_probabilities_NxTxK, rtol=1e-6)
    came = [position["came_next"] for position in told["positions"]]
    assert came[-1] is None
    assert [token["id"] for token in came[:-1]] == seen.ids_T[1:].tolist()
    np.testing.assert_allclose(
        [token["probability"] for token in came[:-1]], seen.true_probabilities_NxS[-1], rtol=1e-6
    )


def test_inspect_prints_the_prompt_and_the_lens(saved, read, capsys):
    assert main(["inspect", saved, "--prompt", PROMPT]) == 0
    out = capsys.readouterr().out
    assert "total" in out
    assert re.search(r"^ +0 +T .*%", out, re.MULTILINE)
    assert "\\xc3" in out
    for place in ("the embeddings", "block 0", "block 1"):
        assert re.search(rf"^ *{place} .*\d%", out, re.MULTILINE)
    assert max(map(len, out.splitlines())) <= 120
    assert "no. 5" in out


def test_inspect_leaves_out_tokens_that_a_narrow_terminal_does_not_hold(saved, monkeypatch, capsys):
    monkeypatch.setattr("jaxgpt.cli.inspect._PIPED_WIDTH", 80)
    assert main(["inspect", saved, "--prompt", PROMPT]) == 0
    out = capsys.readouterr().out.partition("What the model expects")[2]
    assert max(map(len, out.splitlines())) <= 80
    assert "no. 2" in out
    assert "no. 5" not in out
    assert "…" not in out


def test_inspect_shows_a_likely_id_without_text_as_a_placeholder(tmp_path, capsys):
    model, params = make_model_that_draws(258, TINY.replace(vocab_size=259, tokenizer="bytes"))
    jaxgpt.save(tmp_path, model, params)
    assert main(["inspect", str(tmp_path), "--prompt", "Ab", "--json"]) == 0
    (after, _) = json.loads(capsys.readouterr().out)["inside"]["positions"]
    assert after["next"][0]["token"] == "<|258|>"


def test_inspect_of_an_empty_prompt_starts_from_end_of_text(saved, capsys):
    assert main(["inspect", saved, "--prompt", "", "--json"]) == 0
    (position,) = json.loads(capsys.readouterr().out)["inside"]["positions"]
    assert (position["id"], position["token"], position["came_next"]) == (256, "<|endoftext|>", None)


def test_inspect_draws_the_prompt(saved, tmp_path, capsys):
    assert main(["inspect", saved, "--prompt", "Hi", "--plot", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"{tmp_path / 'out' / 'index.html'} shows 5 pictures, beside it as PNG\n"
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>Inside model</h1>" in text  # only the path's name
    assert "<blockquote>Hi</blockquote>" in text


def test_inspect_compares_two_models(saved, read, tmp_path, capsys):
    second = tmp_path / "second"
    jaxgpt.save(second, *make_model(BYTES, seed=7))
    argv = ["inspect", saved, "--prompt", "Hi!", "--against", str(second)]
    assert main([*argv, "--plot", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert captured.err == f"{tmp_path / 'out' / 'index.html'} shows 3 pictures, beside it as PNG\n"
    assert told["against"]["model"] == str(second)
    seen = look_inside(*make_model(BYTES, seed=7), list(b"Hi!"))
    came = [position["came_next"]["probability"] for position in told["against"]["positions"][:-1]]
    np.testing.assert_allclose(came, seen.true_probabilities_NxS[-1], rtol=1e-5)
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert f"{-np.log2(came).mean():.3f} bits per token of the text: {second}" in out


def test_inspect_compares_only_what_reads_the_same(saved, tmp_path, capsys):
    assert main(["inspect", saved, "--against", saved]) == 2
    assert "--against compares what two models make of a text: give it (--prompt TEXT)" in capsys.readouterr().err
    assert main(["inspect", saved, "--against", "book-124m", "--prompt", "Hi"]) == 2
    assert "book-124m is a config without weights" in capsys.readouterr().err
    jaxgpt.save(tmp_path / "other", *make_model(TINY.replace(vocab_size=50257, tokenizer="gpt2")))
    assert main(["inspect", saved, "--against", str(tmp_path / "other"), "--prompt", "Hi"]) == 2
    error = capsys.readouterr().err
    assert "has tokenizer gpt2, and " in error
    assert "only models with the same tokenizer read the same ids" in error


def test_inspect_without_a_prompt_draws_the_architecture(tmp_path, capsys):
    assert main(["inspect", "gpt3-175b", "--plot", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"architecture.png", "index.html"}
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "<h1>Inside gpt3-175b</h1>" in text
    assert "<blockquote>" not in text


@pytest.mark.parametrize("model", ["book-124m", "configs/gpt2.toml"])
def test_inspect_cannot_prompt_what_has_no_weights(model, capsys):
    assert main(["inspect", model, "--prompt", "Hi"]) == 2
    assert f"{model} is a config without weights, and --prompt needs a model that can read" in capsys.readouterr().err


def test_inspect_refuses_a_prompt_beyond_the_context(saved, capsys):
    assert main(["inspect", saved, "--prompt", "a" * 161]) == 2
    assert capsys.readouterr().err == "jaxgpt: error: 161 ids do not fit context_length=160: shorten the text\n"
