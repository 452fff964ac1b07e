"""Asks public databases for known security holes in what is installed: `make audit`.

Exit code 1 where there are some. Where no database can be asked, or one is silent even about a hole that everybody
knows, it says SKIPPED and ends with 0: silence must not be taken for safety, nor a missing network for a fault.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONTROL = "jinja2==3.1.5"  # CVE-2025-27516
SERVICES = (["--vulnerability-service", "osv"], ["--vulnerability-service", "pypi"])
ACCEPTED = {  # without a version that is free of it
    "GHSA-4j2p-28q2-5m79": "accelerate: an index of shards may name files elsewhere, which are opened as safetensors",
}


def main(more: list[str]) -> int:
    """Audit the environment of this Python, or what `more` words of pip-audit say."""
    reasons = []
    for service in SERVICES:
        words = service + [word for word in more if service[1] == "osv" or not word.startswith("--osv-url")]
        reason = why_not_to_be_trusted(words)
        if reason is None:
            return report(ask(words + [word for name in ACCEPTED for word in ("--ignore-vuln", name)]), service[1])
        reasons.append(f"{service[1]}: {reason}")
    print(f"audit: SKIPPED, nobody was asked about known holes ({'; '.join(reasons)})", file=sys.stderr)
    return 0


def why_not_to_be_trusted(words: list[str]) -> str | None:
    """None if a database knows the hole of an old version; else what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "control.txt"
        file.write_text(CONTROL)
        told = ask([*words, "--requirement", str(file), "--no-deps", "--disable-pip"])
    if isinstance(told, str):
        return told
    if not any(entry.get("vulns") for entry in told):
        return f"it knows of no hole in {CONTROL}"
    return None


def ask(words: list[str]) -> list[dict] | str:
    """The packages of pip-audit's report, or the last line of what it says instead."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return (done.stderr.strip() or "no answer").splitlines()[-1][:200]


def report(packages: list[dict] | str, service: str) -> int:
    """Print what was found; 1 if a package has a hole."""
    if isinstance(packages, str):
        print(f"audit: SKIPPED, {service} broke off on the way: {packages}", file=sys.stderr)
        return 0
    skipped = [entry["name"] for entry in packages if "skip_reason" in entry]
    for entry in packages:
        for hole in entry.get("vulns", []):
            versions = ", ".join(hole["fix_versions"]) or "no version yet"
            print(f"audit: {entry['name']} {entry['version']}: {hole['id']}, fixed in {versions}", file=sys.stderr)
    found = sum(bool(entry.get("vulns")) for entry in packages)
    asked = len(packages) - len(skipped)
    print(f"audit: {service} knows of holes in {found} of {asked} packages; {len(ACCEPTED)} without a remedy let be")
    if skipped:
        print(f"audit: not asked about: {', '.join(skipped)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
