"""Take the picture of the web page that README.md and web_page.md show, with the default checkpoint.

python docs/make_app_png.py
"""

from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from au_llava import default_checkpoint
from au_llava.app import launch
from au_llava.photos import load_pipeline


_, address, _ = launch(load_pipeline(), prevent_thread_lock=True, quiet=True)
with sync_playwright() as driver:
    view = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"]).new_page()
    view.set_viewport_size({"width": 1100, "height": 1000})
    view.set_default_timeout(120_000)
    view.goto(address)
    view.get_by_label("Intensity level: a whole").check()
    view.get_by_label("Detection: 0").uncheck()
    view.locator("input[type=file]").set_input_files(Path(default_checkpoint(), "examples/surprise.jpg"))
    view.get_by_alt_text("The photograph to recognise").wait_for()
    view.get_by_role("button", name="Recognise").click()
    view.locator("#photo-answer table").wait_for()
    view.mouse.move(0, 0)
    picture = Image.open(BytesIO(view.screenshot(full_page=True)))
    view.context.browser.close()
picture.quantize(128).save(Path(__file__).with_name("app.png"), optimize=True)
