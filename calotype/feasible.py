"""Whether pictures have what a run asks of them."""

from calotype.errors import UserError
from calotype.sheet import Sheet, refuse_flip


def refuse_what_pictures_lack(settings, sheet: Sheet) -> None:
    """Raise UserError for what stage 2 would refuse, before stage 1 is trained for it."""
    refuse_flip(settings.flip, sheet)
    kind, _, shrunk = (settings.condition or "none").partition(":")
    if kind == "class" and not sheet.classes:
        raise UserError(f"--condition class: the pictures of {settings.source} have no classes; give none or text.")
    if kind == "text" and not sheet.captions:
        raise UserError(
            f"--condition text: no picture of {settings.source} has a caption; give them in metadata.jsonl, or as "
            "x.txt beside x.jpg."
        )
    if kind == "superres" and min(sheet.image_size) < int(shrunk):
        raise UserError(
            f"--condition {settings.condition}: pictures of {'x'.join(map(str, sheet.image_size))} cannot be made so "
            "much smaller; try superres:2."
        )
