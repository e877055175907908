"The page to explore with: asked by its client, clicked through in a browser, closed to others."

import os
import re
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_chromium
from PIL import Image

import uniemo
from uniemo.explore.studio import Studio, Wish, layer_maps

gradio = pytest.importorskip("gradio", reason="gradio is an extra: pip install 'uniemo[demo]'")

from uniemo.explore.page import build_page, serve  # noqa: E402


@pytest.fixture(scope="module")
def pipe():
    pipe = uniemo.UniEmoPipeline.from_pretrained("mini")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def address(pipe):
    # pictures for the documentation are painted as a person sees them
    settings = {} if "UNIEMO_SCREENSHOTS" in os.environ else dict(steps=3, sketch_steps=3)
    page = build_page(pipe, **settings)
    yield serve(page)
    page.close()


@pytest.fixture(scope="module")
def photo(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    pipe.generate("awe", seed=2, num_inference_steps=4, judge=False).images[0].save(path)
    return path


@pytest.fixture(scope="module")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


WISH = ["awe", "fear", 0.3, 0, 0, "<emotion>", 1, 0]


def test_the_package_has_the_page():
    from uniemo.explore.page import demo

    assert uniemo.demo is demo


def test_the_page_is_served_to_this_machine_alone(address, client):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"


def test_a_photograph_is_read(client, photo, pipe):
    from gradio_client import handle_file

    told = client.predict(handle_file(photo), 6, api_name="/read")
    read = pipe.understand([Image.open(photo)])
    shares = {row["label"]: row["confidence"] for row in told[2]["confidences"]}
    assert read.emotion[0] in told[1] and read.scene[0].replace("_", " ") in told[1]
    assert shares == pytest.approx(dict(zip(read.emotions, read.probabilities[0])), abs=1e-3)
    assert all(Path(path).exists() for path in told[3:5])


def test_images_are_painted_with_their_provenance(client, pipe):
    gallery, table, packed = client.predict(*WISH, 2, None, 0.5, api_name="/paint")
    assert len(gallery) == 2 and Path(packed).suffix == ".zip"
    row = dict(zip(table["headers"], table["data"][0]))
    assert row["emotion"] == "awe 0.70 + fear 0.30" and 0 <= row["confidence"] <= 1


def test_a_photograph_is_edited(client, photo):
    from gradio_client import handle_file

    own = np.asarray(Image.open(photo)).astype(float)

    def change(strength):
        gallery, *_ = client.predict(*WISH, 1, handle_file(photo), strength, api_name="/paint")
        return np.abs(np.asarray(Image.open(gallery[0]["image"])) - own).mean()

    assert change(0.4) < change(1.0)


def test_bad_input_gives_a_message(client, tmp_path):
    from gradio_client import handle_file

    wrong = tmp_path / "notes.png"
    wrong.write_text("no picture")
    with pytest.raises(Exception, match=r"notes\.png: cannot be decoded"):
        client.predict(handle_file(wrong), 6, api_name="/read")
    with pytest.raises(Exception, match="no place for the emotion"):
        client.predict(*WISH[:5], "a castle", 1, 0, api_name="/sketch")


def test_a_sketch_is_the_same_every_time(pipe):
    studio = Studio(pipe, sketch_steps=2)
    wish = Wish(None, valence=-0.5, arousal=0.5, seed=4)
    assert studio.sketch(wish).tobytes() == studio.sketch(wish).tobytes()


def test_maps_of_a_layer_stay_on_the_photograph(pipe, photo):
    maps = layer_maps(pipe.encoder, pipe.encoder_pixels([Image.open(photo)]))
    for of_layer in maps.values():
        for found in of_layer.values():
            assert found.min() >= 0 and found.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.skipif(find_chromium() is None, reason="there is no Chromium on this machine")
def test_a_person_clicks_through_it(address, photo, tmp_path):
    "Reads, moves a layer, paints, sketches, is told of a bad file; nothing from elsewhere."
    shots = Path(os.environ.get("UNIEMO_SCREENSHOTS", tmp_path))
    wrong = tmp_path / "notes.png"
    wrong.write_text("no picture")
    with Browser(tmp_path / "profile") as browser:
        browser.open(address)
        browser.wait_js("!!document.querySelector('#photo input[type=file]')", "the page")
        browser.upload("#photo input[type=file]", photo)
        said = "document.querySelector('#sentence').innerText.trim()"
        browser.wait_js(f"/scene: .*object: /.test({said})", "what was read")
        looks = (
            "[...document.querySelectorAll('img')].filter(i => i.complete && i.naturalWidth > 99)"
        )
        browser.wait_js(f"{looks}.length == 3", "the looks of the queries")
        browser.screenshot(shots / "demo-read.png")
        before = browser.js(f"{looks}.map(i => i.src).join()")
        browser.js(move("#layer input[type=range]", 3))
        browser.wait_js(f"{looks}.map(i => i.src).join() !== {before!r}", "the look of a layer")

        browser.js(tab("Paint"))
        browser.wait_js("!!document.querySelector('#paint')", "the button")
        browser.js("document.querySelector('#paint').click()")
        painted = "[...document.querySelectorAll('#gallery img')].filter(i => i.naturalWidth)"
        browser.wait_js(f"{painted}.length >= 4", "four images", 120)
        browser.screenshot(shots / "demo-paint.png")

        browser.js(tab("Live"))
        source = "(document.querySelector('#sketch img') || {}).src"
        shares = "[...document.querySelectorAll('input[type=range]')].filter(i => i.offsetParent)"
        browser.wait_js(f"{shares}.length == 4", "the live tab's sliders")
        browser.js(move(f"{shares}[3]", 1.5))
        first = browser.wait_js(source, "a sketch")
        browser.js(move(f"{shares}[3]", 0.5))
        browser.wait_js(f"{source} !== {first!r}", "another sketch")
        browser.screenshot(shots / "demo-live.png")
        assert browser.complaints == []

        browser.open(address)
        browser.wait_js("!!document.querySelector('#photo input[type=file]')", "the page again")
        browser.upload("#photo input[type=file]", wrong)
        browser.wait_js("document.body.innerText.includes('cannot be decoded')", "the message")
        assert browser.foreign() == []


def tab(name):
    "Click a tab."
    return (
        f"[...document.querySelectorAll('[role=tab]')].find(t => t.innerText === '{name}').click()"
    )


def move(slider, value):
    "Move a slider, given by a selector or an expression."
    found = f"document.querySelector('{slider}')" if slider.startswith("#") else slider
    return (
        f"(() => {{ const s = {found}; "
        "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set"
        f".call(s, {value}); "
        "s.dispatchEvent(new Event('input', {bubbles: true})); "
        "s.dispatchEvent(new Event('change', {bubbles: true})); "
        "s.dispatchEvent(new Event('pointerup', {bubbles: true})); })()"
    )


def test_a_text_is_painted_by_the_command(monkeypatch, tmp_path, capsys):
    "`uniemo generate --text`: what a classifier reads in it becomes a mixture."
    from uniemo.explore import media
    from uniemo.runs.cli import main

    asked = []

    def read(text, model):
        asked.append((text, model))
        return dict(fear=0.75, awe=0.25)

    monkeypatch.setattr(media, "emotion_of_text", read)
    out = tmp_path / "out"
    call = ["generate", "--text", "a storm came", "-n", "1", "--steps", "2", "--out", str(out)]
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    assert main([*call, "--classifier", str(classifier), "-q"]) == 0
    assert asked == [("a storm came", str(classifier))]
    assert "fear 0.75 + awe 0.25" in (out / "images.csv").read_text()
    assert main(["generate", "awe", "--text", "a storm"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_classifier_out_of_reach_is_told_in_one_line(monkeypatch, tmp_path, capsys):
    "Without a network nothing tries again and again."
    from uniemo.commands import terminal
    from uniemo.runs.cli import main

    monkeypatch.setattr(terminal, "hub_answers", lambda: False)
    monkeypatch.chdir(tmp_path)
    for call in (["--text", "a storm"], ["--text", "a storm", "--classifier", "nobody/nothing"]):
        assert main(["generate", *call]) == 2
        said = capsys.readouterr().err.strip()
        assert "--classifier" in said and len(said.splitlines()) == 1
    assert main(["generate", "awe", "-m", "nobody/nothing"]) == 2
    assert "nobody/nothing: there is no such folder" in capsys.readouterr().err
