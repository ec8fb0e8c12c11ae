# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Renew the pictures of the demo's page, docs/images/demo_*.jpg.

    python docs/screenshots.py

Needs the extra `demo`, `pip install playwright`, and a Chromium that is installed (Debian: `apt install chromium`).
"""

import io
import shutil
import socket
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.demo import DemoModel
from transformers_aurea.demo_page import serve


FOLDER = Path(__file__).resolve().parent / "images"
EXAMPLE = 0
PATIENCE = 300_000  # milliseconds


def main() -> int:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("There is no chromium on the path: install one.", file=sys.stderr)
        return 1
    parts = (part.from_pretrained(embedded_model_path()) for part in (AureaForConditionalGeneration, AureaProcessor))
    listening = socket.create_server(("127.0.0.1", 0))
    models = [DemoModel("embedded model", *parts)]
    threading.Thread(target=serve, args=(models, listening), daemon=True).start()
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, width, height, scale in (("desktop", 1280, 900, 1), ("phone", 390, 844, 2)):
            page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=scale)
            page.set_default_timeout(PATIENCE)
            page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
            ask(page)
            if name == "desktop":
                look(page)
            else:
                page.locator(".aurea-words label").nth(3).click()
                page.wait_for_function("document.querySelector('.aurea-seen h4').innerText.includes('“')")
                page.evaluate("document.querySelector('.aurea-answer').scrollIntoView()")
            page.wait_for_timeout(2000)  # images are decoded, and what scrolls has come to rest
            save(page.screenshot(), FOLDER / f"demo_{name}.jpg")
        browser.close()
    return 0


def ask(page: Page) -> None:
    """Takes an example, and waits for the answer and where it looked."""
    page.locator("#examples .grid-container button").nth(EXAMPLE).click()
    page.wait_for_selector("#picture img")
    page.locator("#ask").click()
    page.wait_for_selector(".aurea-panels img")


def look(page: Page) -> None:
    """Clicks on the middle of the picture, and waits for what is there."""
    page.locator("#picture img").click()
    page.wait_for_function("document.querySelector('.aurea-seen h4').innerText.includes('patch')")


def save(png: bytes, path: Path) -> None:
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=85, optimize=True)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
