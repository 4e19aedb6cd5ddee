"""Tests of the page with colored text: what it contains, and in a browser, how it answers to mouse, touch and keys."""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe.data.blocks import Batch
from moe.specialization import page as page_module
from moe.specialization.observation import Observation
from moe.specialization.page import LOOKS, expert_style, token_page

DOMAINS = ("<code>", "prose")
HOSTILE = "</script><script>console.error('ran')</script>"


def byte_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes whose first tokens are some words."""
    letters = [*words, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(letters)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def observed(ids: np.ndarray, *, layers: int, experts: int, k: int) -> Observation:
    """Return random routing of two blocks, one in each domain."""
    score = np.random.default_rng(0).random((layers, ids.size, experts))
    chosen = score >= np.sort(score, axis=-1)[..., -k][..., None]
    weight = np.where(chosen, score, 0)
    tokens = torch.from_numpy(ids)
    batch = Batch(tokens, torch.tensor([0, 1]), tokens, None)
    return Observation(ids, np.array([0, 1]), [*chosen], [*weight], ids, np.zeros(ids.shape), batch)


def test_the_page_holds_text_and_routing_once() -> None:
    """The text is escaped, a token has the class of its heaviest expert, and the JSON has all experts and weights."""
    seen = observed(np.array([[0, 1, 2], [2, 1, 0]]), layers=2, experts=10, k=2)
    text = token_page(seen, byte_tokenizer(HOSTILE, "a&b", '"quoted"'), domains=DOMAINS, title=f"<run>{HOSTILE}")
    for raw in (HOSTILE, "a&b", "<code>", "<run>"):
        assert raw not in text.replace("<code>python -m", "").replace("<code>--text", "").replace("<code>moe.", "")
    for shown in ("a&amp;b", "&#34;quoted&#34;", ">&lt;code&gt;</h2>", ">prose</h2>"):
        assert shown in text
    heaviest = seen.weight[0].argmax(-1)
    assert f'<span class="e{heaviest[1]}">a&amp;b</span>' in text
    [data] = re.findall(r'<script type="application/json" id="routing">(.*?)</script>', text)
    routing = json.loads(data)
    assert np.shape(routing) == (2, 6, 4)
    weights = np.take_along_axis(seen.weight[1], np.array(routing)[1, :, ::2], axis=-1)
    np.testing.assert_allclose(weights, np.array(routing)[1, :, 1::2] / 1000, atol=0.0006)
    assert (weights[:, 0] >= weights[:, 1]).all()
    assert "http" not in text.replace("http-equiv", "")


def test_the_policy_of_the_page_names_its_script_alone() -> None:
    text = token_page(
        observed(np.zeros((2, 3), int), layers=1, experts=4, k=1), byte_tokenizer("a"), domains=DOMAINS, title=""
    )
    [script] = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.findall(r"script-src ([^;\"]*)", text) == [f"'sha256-{digest}'"]


def test_a_token_without_an_expert_has_no_color_and_a_weight_that_is_no_number_is_null() -> None:
    seen = observed(np.zeros((2, 2), int), layers=1, experts=4, k=1)
    seen.chosen[0][0] = False
    seen.weight[0][1, seen.chosen[0][1]] = np.nan
    text = token_page(seen, byte_tokenizer("word"), domains=DOMAINS, title="")
    assert "<span>word</span><span" in text
    assert "1 without color have no expert" in text
    assert json.loads(text.split('id="routing">')[1].split("<")[0])[0][:2] == [[], [seen.chosen[0][1].argmax(), None]]


def test_experts_look_different_and_eight_of_them_without_color() -> None:
    """Up to `LOOKS` experts differ in color or line. Eight in a row differ in their lines alone, and in color alone."""
    looks = [expert_style(expert)[1:] for expert in range(LOOKS)]
    assert len(set(looks)) == LOOKS == 64
    for first in range(0, LOOKS, 8):
        assert len({look[1:] for look in looks[first : first + 8]}) == 8
        assert len({look[0] for look in looks[first : first + 8]}) == 8


def test_a_character_of_several_tokens_is_shown_once() -> None:
    """Its first token has the character, the others are marked as parts of it; a lone part is a replacement sign."""
    tokenizer = byte_tokenizer("caf")
    ids = np.array([[*tokenizer.convert_tokens_to_ids(["caf", "Ã", "©", "!", "Ã", "!"])]] * 2)
    text = token_page(observed(ids, layers=1, experts=4, k=1), tokenizer, domains=DOMAINS, title="")
    shown = re.sub(r" ?e\d", "", text.split('class="text"')[1].split("</div>")[0]).split(">", 1)[1]
    assert shown == (
        '<span class="">caf</span><span class="">é</span><span class="part"></span>'
        '<span class="">!</span><span class="broken">\ufffd</span><span class="">!</span>'
    )
    assert "a part of a character of which the rest is missing" in text
    assert "continues the character before it" in text
    assert "a token of line breaks" not in text


def test_a_study_with_many_assignments_shows_the_beginning_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MOST_ASSIGNMENTS", 48)
    seen = observed(np.zeros((2, 32), int), layers=3, experts=4, k=2)
    text = token_page(seen, byte_tokenizer("word"), domains=DOMAINS, title="")
    assert text.count(">word</span>") == 8
    assert "2 blocks of 32 tokens; the first 4 are shown." in text


# ---- In a browser -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Observation]:
    """Return a page of 16 layers and 64 experts, and the routing that it shows. Its text contains a script."""
    ids = np.random.default_rng(1).integers(3, size=(2, 200))
    seen = observed(ids, layers=16, experts=64, k=4)
    path = tmp_path_factory.mktemp("page") / "tokens.html"
    path.write_text(token_page(seen, byte_tokenizer(HOSTILE, "Ġ42", "Ġdog"), domains=DOMAINS, title="a run"))
    return path, seen


@pytest.fixture
def opened(written: tuple[Path, Observation], browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return the open page, 1400 pixels wide and light unless parameters say otherwise. It may ask for nothing."""
    width, scheme = getattr(request, "param", (1400, "light"))
    context = browser.new_context(
        viewport={"width": width, "height": 844}, color_scheme=scheme, has_touch=width < 1000, is_mobile=width < 1000
    )
    page = context.new_page()
    messages: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(written[0].as_uri())
    yield page
    assert messages == []
    assert requests == [written[0].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing is wider than the page"
    context.close()


def expected(seen: Observation, token: int) -> list[str]:
    """Return what the panel shows of each layer: the layer, then experts and weights, the heaviest first."""
    rows = []
    for layer, weight in enumerate(of_layer[token] for of_layer in seen.weight):
        best = np.argsort(-weight)[:4]
        rows.append(" ".join([str(layer), *(f"{expert} {weight[expert]:.3f}" for expert in best)]))
    return rows


def panel(page: Any) -> list[str]:
    return [" ".join(row.split()) for row in page.locator("tbody tr").all_inner_texts()]


def expert_of(page: Any, token: int) -> str:
    return str(page.locator(".text > span").nth(token).get_attribute("class")).split()[0]


@pytest.mark.browser
@pytest.mark.parametrize("opened", [(w, s) for w in (390, 1400) for s in ("light", "dark")], indirect=True)
def test_a_tap_shows_all_experts_of_a_token_in_every_layer(opened: Any, written: tuple[Path, Observation]) -> None:
    page, token = opened, opened.locator(".text > span").nth(7)
    phone = page.viewport_size["width"] < 1000
    assert (page.evaluate("getComputedStyle(panel).position") == "static") == phone, "an empty panel covers no text"
    assert page.locator("#hint").is_visible() == phone
    assert page.locator(".keys").is_visible() != phone
    token.tap() if phone else token.click()
    assert panel(page) == expected(written[1], 7)
    assert page.locator("#token").inner_text().endswith("token 8 of 400")
    box, visible = page.locator("#panel").bounding_box(), page.viewport_size
    assert box["y"] + box["height"] <= visible["height"], "the panel is on the screen"
    assert (box["width"] == visible["width"]) == phone, "below the text on a phone, beside it on a wide screen"
    place = token.bounding_box()
    assert not phone or place["y"] + place["height"] <= box["y"], "the panel does not cover the token"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == (
        "rgb(22, 22, 22)"
        if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        else "rgb(255, 255, 255)"
    )


@pytest.mark.browser
def test_keys_move_from_token_to_token_and_switch_layers(opened: Any, written: tuple[Path, Observation]) -> None:
    """The text is one stop of the tab key, between the experts and the buttons of the panel."""
    page, seen = opened, written[1]
    page.locator("ul button").first.focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "option"
    assert panel(page) == expected(seen, 0)
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert panel(page) == expected(seen, 1)
    page.keyboard.press("ArrowDown")
    below = page.evaluate("[...document.querySelectorAll('.text > span')].indexOf(document.activeElement)")
    assert below > 1
    assert panel(page) == expected(seen, below)
    page.keyboard.press("End")
    assert panel(page) == expected(seen, 399)
    assert page.locator("[role=option][tabindex='0']").count() == 1
    assert page.locator("[role=option][aria-selected=true]").count() == 1
    for key, layer in (("3", 3), ("]", 4), ("[", 3)):
        page.keyboard.press(key)
        assert expert_of(page, 399) == f"e{seen.weight[layer][399].argmax()}"
        assert page.locator("tr.on th").inner_text() == str(layer)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "previous"


@pytest.mark.browser
def test_a_button_selects_the_layer_whose_experts_color_the_tokens(
    opened: Any, written: tuple[Path, Observation]
) -> None:
    page, token = opened, opened.locator(".text > span").nth(5)
    colors = []
    for layer in (0, 15):
        page.locator(f"input[value='{layer}']").check(force=True)
        assert expert_of(page, 5) == f"e{written[1].weight[layer][5].argmax()}"
        colors.append(token.evaluate("token => getComputedStyle(token).background"))
    assert colors[0] != colors[1]


@pytest.mark.browser
def test_the_mouse_shows_a_token_until_it_leaves_the_text(opened: Any, written: tuple[Path, Observation]) -> None:
    page = opened
    page.locator(".text > span").nth(3).click()
    page.locator(".text > span").nth(9).hover()
    assert panel(page) == expected(written[1], 9)
    page.locator("h1").hover()
    assert panel(page) == expected(written[1], 3)


@pytest.mark.browser
def test_an_expert_of_the_legend_shows_its_tokens_alone(opened: Any, written: tuple[Path, Observation]) -> None:
    page, chosen = opened, written[1].chosen[0]
    most = chosen.sum(1).max()
    assert f"A token goes to up to {most} experts, so the shares add up" in page.locator("#status").inner_text()
    expert = int(chosen.sum(0).argmax())
    page.locator("ul button").nth(expert).click()
    assert page.locator(".text .other").count() == 400 - chosen[:, expert].sum()
    assert page.locator(f".text .e{expert}").count() == chosen[:, expert].sum()
    assert (
        f"Expert {expert} takes {chosen[:, expert].sum()} of 400 tokens in layer 0."
        in page.locator("#status").inner_text()
    )
    page.keyboard.press("Escape")
    assert page.locator(".text .other").count() == 0


@pytest.mark.browser
def test_numbers_of_experts_are_not_copied_with_the_text(opened: Any) -> None:
    page = opened
    before = page.locator(".text").first.inner_text()
    page.locator("#numbers").check()
    content = page.locator(".text > span").first.evaluate("token => getComputedStyle(token, '::after').content")
    assert content == f'"{expert_of(page, 0)[1:]}"'
    copied = "(text) => { getSelection().selectAllChildren(text); return getSelection().toString(); }"
    assert page.locator(".text").first.evaluate(copied) == before


@pytest.mark.browser
def test_without_scripts_the_page_is_text_with_the_colors_of_the_first_layer(
    browser: Any, written: tuple[Path, Observation]
) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written[0].as_uri())
    assert "42" in page.locator(".text").first.inner_text()
    assert expert_of(page, 5) == f"e{written[1].weight[0][5].argmax()}"
    assert page.get_by_text("shows layer 0 alone").is_visible()
    assert not page.locator("fieldset").is_visible()
    context.close()
