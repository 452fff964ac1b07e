"""Versions of packages with known security holes, for `calotype doctor` and for the bounds in pyproject.toml.

Only packages that Calotype uses, or that the demo puts on the network, are named. `make audit` asks the public
databases, which know more and later.
"""

from typing import NamedTuple


class Hole(NamedTuple):
    """The first version that is free of what is known, and the names of what was known before it."""

    fixed: str
    known_as: str


HOLES = {
    "torch": Hole("2.11", "CVE-2026-24747, CVE-2026-4538"),  # weights_only and .pt2 files that run code
    "diffusers": Hole("0.38", "CVE-2026-44513, CVE-2026-44827"),  # runs a model's code without being told to
    "transformers": Hole("5.10", "CVE-2026-4372, CVE-2026-5241, CVE-2026-9856"),  # the same; writes outside a folder
    "gradio": Hole("6.25", "GHSA-j36p-7w88-g82j and others"),  # reads files outside its folder
    "pillow": Hole("12.3", "PYSEC-2026-2253 to 2257"),
    "filelock": Hole("3.20.3", "CVE-2025-68146, CVE-2026-22701"),  # follows a planted link
    "jinja2": Hole("3.1.6", "CVE-2025-27516"),
    "pydantic": Hole("2.4", "CVE-2024-3772"),
    "starlette": Hole("1.3.1", "CVE-2025-62727, CVE-2026-48710, CVE-2026-54283"),
    "python-multipart": Hole("0.0.32", "CVE-2026-24486, CVE-2026-42561, CVE-2026-53539"),
    "orjson": Hole("3.11.6", "CVE-2025-67221"),
    "h11": Hole("0.16", "CVE-2025-43859"),
    "pyarrow": Hole("23.0.1", "CVE-2026-25087"),
    "onnx": Hole("1.21", "CVE-2026-28500, CVE-2026-27489"),
    "scikit-learn": Hole("1.5", "CVE-2024-5206"),
    "protobuf": Hole("6.33.5", "CVE-2026-0994"),
    "urllib3": Hole("2.7", "CVE-2026-21441 and others"),
    "requests": Hole("2.33", "CVE-2026-25645"),
}
