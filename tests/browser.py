"""Chromium for tests of what a visitor sees: what it may do, what it must not say, and a hand that drags."""

import shutil
import time

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars"
).split()
# The mouse is held down; the page itself moves it 125 times a second, so that nothing but the page sets the pace.
DRAG = """async (seconds) => {
  const pad = document.querySelector(".lx-pad"), lx = pad.closest(".lx"), box = pad.getBoundingClientRect();
  let turn = 0;
  const moving = setInterval(() => {
    turn += 0.05;
    const [x, y] = [0.5 + 0.35 * Math.cos(turn), 0.5 + 0.35 * Math.sin(turn)];
    const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
    pad.dispatchEvent(new PointerEvent("pointermove", { pointerId: 1, bubbles: true, ...at }));
  }, 8);
  const [frames, since] = [Number(lx.dataset.frames), performance.now()];
  await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
  clearInterval(moving);
  return (Number(lx.dataset.frames) - frames) / (performance.now() - since) * 1000;
}"""


class Explorer:
    """The explorer on a page, as a visitor uses it."""

    def __init__(self, page):
        self.page, self.pad = page, page.locator(".lx-pad")
        page.wait_for_function("Number(document.querySelector('.lx')?.dataset.frames) > 0", timeout=60_000)

    def picture(self):
        """The pixels that are shown, as an address."""
        return self.page.locator(".lx-picture").evaluate("canvas => canvas.toDataURL()")

    def frames(self):
        return int(self.page.locator(".lx").get_attribute("data-frames"))

    def place(self):
        """The first two numbers of where the dot is."""
        words = self.pad.get_attribute("aria-valuetext").replace("\u2212", "-")
        return [float(word.rpartition("=")[2]) for word in words.split(",")]

    def settle(self):
        """Wait until no new frame has come for a while."""
        before = -1
        while before != self.frames():
            before = self.frames()
            self.page.wait_for_timeout(400)

    def drag(self, *places):
        """Press at the first place, shares of the pad from its left and top, and drag along the others."""
        box = self.pad.bounding_box()
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points[1:]:
            self.page.mouse.move(*point, steps=5)
        self.page.mouse.up()

    def frames_per_second(self, seconds=3):
        """Decoded frames a second while the dot is dragged round."""
        box = self.pad.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        self.page.mouse.down()
        found = self.page.evaluate(DRAG, seconds)
        self.page.mouse.up()
        return found


def watched(context, allowed):
    """A page with the lists of what it complained about and of what it asked elsewhere."""
    page, complaints, strangers = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith(allowed) else strangers.append(request.url))
    return page, complaints, strangers


def share_of_a_core():
    """How much of a core a busy loop gets here while others work too, from 0 to 1."""
    began, used = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < 0.5:
        pass
    return (time.process_time() - used) / (time.perf_counter() - began)
