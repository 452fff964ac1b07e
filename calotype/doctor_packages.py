"""`calotype doctor`: the packages that are installed, and what they are told about the network."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from calotype import __version__
from calotype.finding import Finding, examine
from calotype.known_holes import HOLES

EXTRAS = {
    "track": "curves in TensorBoard",
    "eval": "LPIPS, probes, features from ONNX files",
    "data": "codes as parquet",
    "flows": "flow priors, exact likelihoods",
    "text": "models that draw from text, DINOv2",
    "export": "networks as ONNX files",
}
_TOLD = ("torch", "diffusers", "gradio")
_ON = ("1", "on", "yes", "true")


def examine_packages() -> list[Finding]:
    """Python, versions, extras and the policy towards the network, without importing anything heavy."""
    examinations = {"Versions": versions, "Known holes": holes, "Extras": extras, "Network policy": policy}
    return [finding for what, of in examinations.items() for finding in examine(what, of)]


def installed(name: str) -> Version | None:
    """The version of a distribution, or None."""
    try:
        return Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        return None


def requirements() -> list[tuple[str, Requirement]]:
    """What Calotype's own metadata asks for, each with the extra that asks for it (or "")."""
    found = []
    for text in metadata.requires("calotype") or []:
        requirement = Requirement(text)
        extra = next((name for name in EXTRAS if _asked_by(requirement, name)), None)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            extra = ""
        if extra is not None:
            found.append((extra, requirement))
    return found


def _asked_by(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def versions() -> Finding:
    """Whether everything installed is as new as Calotype asks for."""
    python = f"Calotype {__version__}, Python {platform.python_version()}"
    try:
        asked = requirements()
    except metadata.PackageNotFoundError:
        return Finding("Versions", "note", f"{python}; Calotype is not installed as a package, so nobody checks others")
    wrong = [
        f"{requirement.name} {version or 'is missing'}, needed {requirement.specifier}"
        for extra, requirement in asked
        if not _suits(requirement, version := installed(requirement.name)) and (version or not extra)
    ]
    if wrong:
        return Finding("Versions", "FAIL", "; ".join(wrong), "pip install --upgrade calotype, with the extras you use.")
    told = ", ".join(f"{name} {installed(name)}" for name in _TOLD)
    return Finding("Versions", "pass", f"{python}, {told}")


def _suits(requirement: Requirement, version: Version | None) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def holes() -> Finding:
    """Installed versions against those with known security holes."""
    found = {name: version for name in HOLES if (version := installed(name))}
    open_ = [name for name, version in found.items() if version < Version(HOLES[name].fixed)]
    if open_:
        text = "; ".join(f"{name} {found[name]} ({HOLES[name].known_as})" for name in open_)
        words = " ".join(f"'{name}>={HOLES[name].fixed}'" for name in open_)
        return Finding("Known holes", "FAIL", text, f"{sys.executable} -m pip install --upgrade {words}")
    return Finding("Known holes", "pass", f"none in the {len(found)} packages that Calotype keeps an eye on")


def extras() -> Finding:
    """Which optional extras are there, what the others are for, and how to get them."""
    try:
        asked = requirements()
    except metadata.PackageNotFoundError:
        asked = []
    by_extra = {name: [requirement for extra, requirement in asked if extra == name] for name in EXTRAS}
    missing = {
        name: [canonicalize_name(r.name) for r in needed if installed(r.name) is None]
        for name, needed in by_extra.items()
        if needed
    }
    there = ", ".join(name for name, lacks in missing.items() if not lacks) or "none"
    lacking = [f"{name} ({EXTRAS[name]}; {', '.join(lacks)})" for name, lacks in missing.items() if lacks]
    if not lacking:
        return Finding("Extras", "pass", f"{there}: all are installed" if missing else "not known here")
    wanted = ",".join(name for name, lacks in missing.items() if lacks)
    way_out = f"Only if you want them: pip install 'calotype[{wanted}]'"
    return Finding("Extras", "note", f"installed: {there}; not installed: {'; '.join(lacking)}", way_out)


def policy() -> Iterator[Finding]:
    """Environment variables that decide who is spoken to."""
    told = {name: os.environ.get(name, "").strip().lower() for name in _POLICY}
    loud = [name for name, allowed in _POLICY.items() if told[name] and (told[name] in _ON) != allowed]
    if loud:
        found = ", ".join(f"{name}={os.environ[name]}" for name in loud)
        yield Finding("Network policy", "FAIL", f"{found}: something would report home", f"unset {' '.join(loud)}")
        return
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in _ON
    found = "telemetry is off; weights are fetched with --allow-download only"
    more = "; HF_HUB_OFFLINE forbids even that" if offline else " (HF_HUB_OFFLINE=1 forbids even that)"
    yield Finding("Network policy", "pass", found + more)


_POLICY = {  # variables, and whether "on" is the quiet value
    "HF_HUB_DISABLE_TELEMETRY": True,
    "GRADIO_ANALYTICS_ENABLED": False,
    "GRADIO_SHARE": False,
}
