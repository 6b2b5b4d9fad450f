"""The page in a real browser: Debian's chromium, without a window. Skipped, with the reason, where there is none."""

import math
import re
import shutil

import pytest
import torch

playwright = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium")

from test_serve import SHAPE, generate, serving  # noqa: E402

from config import Config  # noqa: E402
from model import Transformer  # noqa: E402
from training.checkpoints import save_checkpoint  # noqa: E402

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def service(tokenizer, tmp_path_factory):
    torch.manual_seed(2)
    path = tmp_path_factory.mktemp("run") / "best_model.pth"
    save_checkpoint(path, {"model": Transformer(SHAPE).state_dict(), "config": Config(model=SHAPE).to_dict(),
                           "tokenizer": tokenizer.to_str(), "iter_num": 1234, "epoch": 0.5, "best_val_loss": math.inf})
    with serving(path) as service:
        service.threads[0].engine.end = -1  # no story ends by itself
        yield service


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, service):
    """The page, ready; at the end of a test no error may have been printed to the console."""
    context = browser.new_context(viewport={"width": 400, "height": 800}, accept_downloads=True,
                                  permissions=["clipboard-read", "clipboard-write"])
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if f":{service.port}/" not in request.url
            and not request.url.startswith(("data:", "blob:")) else None)
    page.goto(f"http://127.0.0.1:{service.port}/")
    page.locator("#examples button").first.wait_for()
    yield page
    context.close()
    assert not errors


def write(page, beginning="Tom", tokens=12, seed=5):
    """Write a story by the keyboard, and wait until it has ended."""
    page.locator("#settings").evaluate("settings => settings.parentElement.open = true")
    page.fill("#max_new_tokens", str(tokens))
    page.fill("#seed", str(seed))
    page.fill("#beginning", beginning)
    page.press("#beginning", "Control+Enter")
    ended(page)


def ended(page, card=0):
    page.locator("article:not(.running)").nth(card).locator("small", has_text="a second").wait_for()


def story(page, card=0):
    return page.locator("article .text").nth(card).text_content()


def test_a_story_streams_and_again_is_the_same_and_another_is_not(page, service):
    write(page, "One day", 40)
    first = story(page)
    assert first.startswith("One day") and page.locator(".token").count() == 40
    assert "stopped at the length, 40 tokens" in page.locator("article small").text_content()
    page.click("text=Again")
    ended(page)
    assert story(page) == first
    page.click("text=Another")
    ended(page)
    assert story(page) != first and page.locator(".token").count() == 40
    about = page.locator("#about").text_content()
    assert "best_model.pth" in about and "step 1,234" in about and "not evaluated" in about and "cpu, float32" in about


@pytest.mark.parametrize("how", ["button", "Escape", "card"])
def test_stop_stops(page, service, how):
    page.fill("#beginning", "Tom")
    page.locator("#settings").evaluate("settings => settings.parentElement.open = true")
    page.fill("#max_new_tokens", "2048")
    page.click("#write")
    page.locator(".token").nth(3).wait_for()
    (running,) = service.threads[0].open
    {"button": lambda: page.click("#stop"), "Escape": lambda: page.keyboard.press("Escape"),
     "card": lambda: page.locator("article button", has_text="Stop").click()}[how]()
    page.locator("small", has_text="stopped by you").wait_for()
    assert 3 < page.locator(".token").count() < 2048 and page.locator("#stop").is_disabled()
    write(page, "Lily", 5)  # which is computed after the row of the first was taken
    assert running not in service.threads[0].open and len(running.row.new) < 2048


def test_an_alternative_is_taken_and_the_story_goes_on_from_there(page, service):
    """By touch; and by keyboard alone."""
    write(page)
    before = page.locator(".token").all_text_contents()
    page.locator(".token").nth(4).click()
    assert page.locator("#choices button").count() in (5, 6)
    assert page.locator("#choices [aria-current]").count() == 1
    taken = page.locator("#choices button:not([aria-current])").first
    assert taken.locator("span").nth(1).text_content().endswith("%")
    _, tokens, _ = generate(service, prompt="Tom", seed=5, max_new_tokens=12)
    ids = service.prompt({"prompt": "Tom"})[1:] + [token["id"] for token in tokens[:4]]
    with page.expect_request("**/generate") as request:
        taken.click()
    *before_it, other = request.value.post_data_json["tokens"]  # so that the story continues exactly
    assert before_it == ids and other in {likely["id"] for likely in tokens[4]["likeliest"]} - {tokens[4]["id"]}
    ended(page)
    after = page.locator(".token").all_text_contents()
    assert after[:4] == before[:4] and len(after) == 5 + 12 and page.locator(".token").nth(4).get_attribute(
        "class") == "token chosen"
    page.locator(".text").focus()
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.locator("#choices").is_visible() and page.locator("#choices button:focus").count() == 1
    page.keyboard.press("Escape")
    assert page.locator("#choices").is_hidden() and page.locator(".text:focus").count() == 1
    page.keyboard.press("Enter")
    page.locator("#choices button:not([aria-current])").first.focus()
    page.keyboard.press("Enter")
    ended(page)
    assert page.locator(".token").all_text_contents()[:2] == before[:2] and page.locator(".token").count() == 3 + 12


def test_edit_and_go_on_copy_and_save(page):
    write(page)
    first = story(page)
    page.click("text=Continue from here")
    ended(page)
    assert story(page).startswith(first) and page.locator(".token").count() == 24
    page.click("text=Edit")
    page.fill("article textarea", "Tom saw a <b>fox</b>.")
    page.click("text=Continue from here")
    ended(page)
    edited = story(page)
    assert edited.startswith("Tom saw a <b>fox</b>.") and page.locator(".token").count() == 12
    page.click("text=Copy")
    page.locator("small", has_text="copied").wait_for()
    assert page.evaluate("() => navigator.clipboard.readText()") == edited
    with page.expect_download() as download:
        page.click("text=Save")
    assert download.value.suggested_filename == "story.txt"
    assert download.value.path().read_text(encoding="utf-8") == edited + "\n"


def test_markup_stays_text_wherever_it_comes_from(page, service, monkeypatch):
    """From the beginning, from the model's tokens, and from their alternatives."""
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    page.on("dialog", lambda dialog: pytest.fail("a script from a story ran"))
    monkeypatch.setattr(service.threads[0], "pieces", [markup.encode()] * len(service.threads[0].pieces))
    write(page, markup, 3)
    assert story(page) == markup * 4
    page.locator(".token").first.click()
    assert markup in page.locator("#choices").text_content()
    assert page.locator("article img, article script, #choices img, #choices script").count() == 0
    page.locator("#choices button").nth(1).click()
    ended(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_three_stories_at_400_pixels_in_light_and_dark(page, scheme):
    """Nothing is wider than the screen, not even a word of 80 letters; text has enough contrast."""
    page.emulate_media(color_scheme=scheme)
    page.select_option("#count", "3")
    write(page, "x" * 80)
    for card in range(3):
        ended(page, card)
    assert len({story(page, card) for card in range(3)}) == 3
    page.locator(".token", has_text=re.compile(r"\w\w")).first.click()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 400
    box = page.locator("#choices").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 400
    for selector in ("body", "article h2", "small", "#about", "button.main", "article button", ".prompt"):
        assert contrast(page, selector) >= 4.5, selector


def contrast(page, selector):
    """WCAG's contrast of an element's text and the nearest background behind it."""
    colors = page.locator(selector).first.evaluate("""element => {
        let behind = element;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [getComputedStyle(element).color, getComputedStyle(behind).backgroundColor]
            .map(color => color.match(/[\\d.]+/g).slice(0, 3).map(Number)); }""")

    def luminance(color):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                  for part in (value / 255 for value in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, colors))
    return (light + 0.05) / (dark + 0.05)


def test_every_control_has_a_name_and_the_story_is_spoken(page):
    write(page, "Tom", 60)
    for control in page.locator("button, input, select, textarea, [role=group], [role=dialog], section").all():
        if control.is_visible():
            name = control.evaluate(
                """e => e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent""")
            assert name.strip(), control.evaluate("e => e.outerHTML")
    assert page.locator("#say[aria-live=polite]").text_content().strip()
    assert "60 tokens" in page.locator("#say p").last.text_content()
    page.locator(".text").focus()
    page.keyboard.press("Home")
    assert page.locator("#say p").last.text_content().endswith("%")


def test_a_wrong_setting_is_named_on_the_page_until_it_is_right(browser, service):
    """The browser prints the status 400 to its console, so this page is not the one that may print nothing."""
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"http://127.0.0.1:{service.port}/")
        page.locator("#examples button").first.wait_for()
        page.click("summary")
        page.fill("#top_p", "7")
        page.click("#write")
        page.locator("small.bad", has_text="top_p: found 7, expected a number, at most 1").wait_for()
        page.fill("#top_p", "0.9")
        page.fill("#max_new_tokens", "5")
        page.click("#write")
        ended(page)
        assert page.locator(".token").count() == 5 and not page.locator("small.bad:visible").count()
